"""Context parallelism: sequences that several ranks share train what one process trains, and send what the recipe says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lockstep.verify.trace import difference
from recipes import context_parallel, single
from tests.helpers import padded_sequences
from tests.helpers.harness import result, train
from tests.helpers.traffic import count_traffic
from tests.ranks.test_resume import assert_meshes_share, assert_same_in_two_parts

LAYERS, WIDTH, LENGTH, BATCH = 4, 64, 16, 12  # of GPT nano, whose keys' heads are half of its heads
WORDS = ("task=language", "task.data=text", f"global_batch_size={BATCH}", "precision=fp64", "log_every=1", "threads=1")
MESHES = ((2, 2, "ring"), (1, 1, "ring"), (4, 4, "ring"), (4, 2, "ulysses"))  # ranks, those that share a sequence, how
MORE = ("epochs=3", "optim.warmup_steps=2", "eval_every=0", "task.samples=0", f"task.sequence_length={LENGTH}")


@pytest.fixture
def words(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog, and over it again. " * 16)
    return (*WORDS, *MORE, f"task.text={tmp_path}/text.txt")


def test_it_trains_what_one_process_trains_with_everything_on(words: tuple[str, ...], tmp_path: Path) -> None:
    """Dropout drops the same; a sample of text grows by a token at a time, which does not divide."""
    words += ("task.dropout=0.2", "task.samples=1", "task.sample_tokens=5", "max_steps=3")
    words += ("accumulate=5", "gradients.clip_norm=0.3", "checkpoint.best=true")  # micro-batches of 3, 3, 3, 3
    words += ("gradients.log=true", "gradients.stop_on_nan=true", "logger.histograms=1", "memory=report")
    whole = train(single.train, tmp_path / "whole", 1, *words)
    for by, kept in (("ring", "selective"), ("ulysses", "full")):
        mine = train(context_parallel.train, tmp_path / by, 2, *words, f"by={by}", f"checkpoint_activations={kept}")
        assert difference(mine, whole) <= 1e-10
        best = [torch.load(tmp_path / run / "best.pt", weights_only=True) for run in (by, "whole")]
        assert difference(*best) <= 1e-10
        found, expected = result(tmp_path / by), result(tmp_path / "whole")
        for name in ("train_loss", "eval_loss", "eval_bits_per_token", "parameters"):
            assert found[name] == pytest.approx(expected[name], rel=1e-10), name
        assert (tmp_path / by / "shown.txt").read_text() == (tmp_path / "whole" / "shown.txt").read_text()


@pytest.mark.slow
def test_a_model_of_one_s_own_and_slices_that_are_all_padding(tmp_path: Path) -> None:
    """Positions that are learned; attention that sees all; a loss that is nan where a rank has no token."""
    words = [
        f"task={padded_sequences.__file__}:PaddedSequences",
        "precision=fp64",
        "global_batch_size=12",
        "log_every=1",
    ]
    words += ["max_steps=3", "threads=1", "gradients.stop_on_nan=true", "optim.warmup_steps=0"]
    whole = train(single.train, tmp_path / "whole", 1, *words)
    for ranks, by in ((4, "ring"), (2, "ulysses")):
        mine = train(context_parallel.train, tmp_path / by, ranks, *words, f"context={ranks}", f"by={by}")
        assert difference(mine, whole) <= 1e-10
        for name in ("train_loss", "eval_loss"):
            assert result(tmp_path / by)[name] == pytest.approx(result(tmp_path / "whole")[name], rel=1e-10)


@pytest.mark.slow
def test_each_rank_sends_what_the_recipe_says(words: tuple[str, ...], tmp_path: Path) -> None:
    """Two ranks that share, four that do, and two copies of two; bytes handed to collectives in a step."""
    for ranks, context, by in ((4, 4, "ring"), (4, 2, "ulysses")):
        out, own = tmp_path / by, (*words, "max_steps=2", f"context={context}", f"by={by}")
        count = count_traffic(context_parallel.train, out, ranks, *own)
        queries = 8 * (BATCH // (ranks // context)) * (LENGTH // context) * WIDTH  # A
        keys = queries // 2  # K
        weights = 8 * int(result(out)["parameters"])
        expected = {"allreduce_": weights + (8 if ranks > context else 0)}  # copies tell each other their tokens
        if by == "ring":
            passed = LAYERS * (context - 1) * 6 * keys
            expected |= {"send": passed, "recv_": passed}
        else:
            expected |= {"alltoall_base_": LAYERS * (4 * queries + 4 * keys)}
        for *_, last in count:
            assert last == expected


@pytest.mark.slow
def test_a_run_in_two_parts_is_the_run_in_one(words: tuple[str, ...], tmp_path: Path) -> None:
    assert_same_in_two_parts(context_parallel.train, tmp_path, 2, *words)


@pytest.mark.soak
def test_two_one_four_ranks_share_what_one_process_trains_and_ddp_ends_it(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    """A checkpoint has whole tensors by their names, whoever shares sequences, and however."""
    starts = [(ranks, (f"context={size}", f"by={by}")) for ranks, size, by in MESHES]
    assert_meshes_share(context_parallel.train, tmp_path, starts, *words)
