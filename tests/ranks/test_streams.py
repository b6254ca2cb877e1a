"""Streams: the same training on any number of ranks, and resumed bit by bit, though no sample has a number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lockstep.errors import UserError
from recipes import ddp, single
from tests.helpers import streamed
from tests.helpers.harness import assert_equal, command, execute, lines, result, train

TASK = f"task={streamed.__file__}:Streamed"
WORDS = (TASK, "precision=fp64", "epochs=4", "global_batch_size=12", "log_every=1", "optim.warmup_steps=2")


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
    ("task", "ranks", "workers"),
    [("task.addressed=true", 2, 0), ("task.addressed=false", 2, 1), ("task.per_rank=true", 2, 0)],
)
def test_a_stream_resumes_with_the_same_bits(task: str, ranks: int, workers: int, tmp_path: Path) -> None:
    """At step 7, after the stream has begun anew, from a checkpoint of step 6."""
    words = (*WORDS, task, "checkpoint.every=6", f"data.workers={workers}")
    whole = train(ddp.train, tmp_path / "whole", ranks, *words)
    execute(ddp.train, tmp_path / "parts", ranks, *words, "max_steps=6")
    parts = train(ddp.train, tmp_path / "parts", ranks, *words)
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
