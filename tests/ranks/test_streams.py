"""Streams: the same training on any number of ranks, and resumed bit by bit, though no sample has a number."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from lockstep.data.streams import Stream
from lockstep.errors import UserError
from recipes import ddp, fsdp, single
from tests.helpers import streamed
from tests.helpers.harness import assert_equal, command, execute, lines, result, train

TASK = f"task={streamed.__file__}:Streamed"
WORDS = (TASK, "precision=fp64", "epochs=4", "global_batch_size=12", "log_every=1", "optim.warmup_steps=2")


def totals(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([total for _, total in samples]), torch.zeros(len(samples))


@pytest.mark.parametrize("addressed", [True, False])
def test_an_example_that_is_read_meanwhile_moves_nothing(addressed: bool) -> None:
    """Not in this epoch, and not where the next one begins."""
    kind = streamed.Addressed if addressed else streamed.Numbers
    found = []
    for looked_at in (False, True):
        stream = Stream(kind(10), per_rank=False, group=None)
        batches = stream.batches(totals, 4, 0, 1, 0, pin_memory=False)
        found.append([])
        for number, batch in zip(range(8), batches, strict=False):
            found[-1].append(batch.inputs)
            if looked_at and number in (1, 4):
                stream.first(3)
    assert all(torch.equal(plain, other) for plain, other in zip(*found, strict=True))


@pytest.mark.slow_except("true")
@pytest.mark.parametrize("addressed", ["true", "false"])
def test_a_stream_trains_the_same_on_any_number_of_ranks(addressed: str, tmp_path: Path) -> None:
    """The stream ends within a batch, and begins anew in another epoch."""
    words = (*WORDS, f"task.addressed={addressed}")
    alone = train(single.train, tmp_path / "1", 1, *words)
    for ranks, more in ((2, ()), (3, ("data.workers=1",))):
        found = train(ddp.train, tmp_path / str(ranks), ranks, *words, *more)
        assert all(torch.allclose(found[name], alone[name], rtol=0, atol=1e-12) for name in alone)
    assert result(tmp_path / "2")["samples_seen"] == 16 * 12
    assert result(tmp_path / "2")["eval_loss"] == pytest.approx(result(tmp_path / "1")["eval_loss"], abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "task", "workers"),
    [
        (ddp, "task.addressed=true", 0),
        (ddp, "task.addressed=false", 1),
        (ddp, "task.per_rank=true", 0),
        (fsdp, "task.addressed=true", 0),  # whose evaluation reads an example of the stream
    ],
)
def test_a_stream_resumes_with_the_same_bits(recipe: ModuleType, task: str, workers: int, tmp_path: Path) -> None:
    """At step 7, after the stream has begun anew, from a checkpoint of step 6."""
    ranks = 2
    words = (*WORDS, task, "checkpoint.every=6", f"data.workers={workers}")
    whole = train(recipe.train, tmp_path / "whole", ranks, *words)
    execute(recipe.train, tmp_path / "parts", ranks, *words, "max_steps=6")
    parts = train(recipe.train, tmp_path / "parts", ranks, *words)
    assert result(tmp_path / "parts")["resumed_from"] == "checkpoints/step-00000006"
    assert_equal(parts, whole)
    assert [line for line in lines(tmp_path / "parts") if line["step"] > 6] == [
        line for line in lines(tmp_path / "whole") if line["step"] > 6
    ]


@pytest.mark.slow
def test_a_whole_stream_resumes_on_other_ranks(tmp_path: Path) -> None:
    words = (*WORDS, "checkpoint.every=6")
    whole = train(ddp.train, tmp_path / "whole", 2, *words)
    execute(ddp.train, tmp_path / "parts", 2, *words, "max_steps=6")
    parts = train(ddp.train, tmp_path / "parts", 3, *words)
    assert all(torch.allclose(parts[name], whole[name], rtol=0, atol=1e-12) for name in whole)


@pytest.mark.slow
def test_each_rank_s_own_stream_resumes_on_as_many_ranks_alone(tmp_path: Path) -> None:
    words = (*WORDS, "task.per_rank=true", "checkpoint.every=6")
    execute(ddp.train, tmp_path / "parts", 2, *words, "max_steps=6")
    with pytest.raises((AssertionError, UserError), match="the places of 2 ranks' streams, and these are 3"):
        execute(ddp.train, tmp_path / "parts", 3, *words)


def test_a_stream_without_a_length_is_told_how_long_to_train(tmp_path: Path) -> None:
    found = command("-m", "recipes.single", TASK, "task.epoch_samples=null", f"out={tmp_path / 'run'}")
    assert found.returncode == 2
    assert "its train_set is a stream without a length; set max_steps, or give the task epoch_samples" in found.stderr
    assert not (tmp_path / "run").exists()
