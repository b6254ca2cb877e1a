"""A mixture of experts, all of them on each rank: every way to cut the batch trains what one process trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from lockstep.recipe import Recipe
from lockstep.verify.trace import difference
from recipes import ddp, fsdp, pipeline_parallel, single
from tests.helpers.harness import result, train

WORDS = ("task=language", "task.experts=4", "task.capacity=0.8", "task.balance=0.1", "gradients.clip_norm=0.3")
WORDS += ("precision=fp64", "global_batch_size=12", "log_every=1", "max_steps=2", "eval_every=0", "task.samples=0")
WAYS: dict[str, tuple[Recipe, int, tuple[str, ...]]] = {
    "ddp": (ddp.train, 3, ("accumulate=3",)),  # micro-batches of 2, 2
    "fsdp": (fsdp.train, 2, ("accumulate=2", "checkpoint_activations=full")),
    "pipeline": (pipeline_parallel.train, 2, ("stages=2", "micro_batches=3")),
}


@pytest.mark.slow
def test_they_train_what_one_process_trains(tmp_path: Path) -> None:
    """The balance too, which is of each sequence, and what an expert has no room for."""
    whole = train(single.train, tmp_path / "whole", 1, *WORDS)
    unbalanced = train(single.train, tmp_path / "unbalanced", 1, *WORDS, "task.balance=0")
    assert difference(unbalanced, whole) > 1e-6
    for name, (recipe, ranks, own) in WAYS.items():
        assert difference(train(recipe, tmp_path / name, ranks, *WORDS, *own), whole) <= 1e-10, name
        for figure in ("train_loss", "eval_loss", "eval_bits_per_token"):
            assert result(tmp_path / name)[figure] == pytest.approx(result(tmp_path / "whole")[figure], rel=1e-10)
