"""Batches of any form: a dataclass with a dict in it goes in, a dict comes out, and every recipe trains the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lockstep.recipe import Recipe
from recipes import (
    data_parallel,
    ddp,
    fsdp,
    grad_accumulation,
    lightning_fabric,
    lightning_trainer,
    model_parallel,
    pipeline_parallel,
    single,
)
from tests.helpers import tree_task
from tests.helpers.harness import result, train

WORDS = (
    f"task={tree_task.__file__}:TreeTask",
    "task.depth=6",
    "precision=fp64",
    "optim.lr=1e-3",
    "epochs=1",
    "global_batch_size=8",
)
RECIPES: dict[str, tuple[Recipe, int, tuple[str, ...]]] = {
    "pipeline_parallel": (pipeline_parallel.train, 2, ()),
    "zero bubble": (pipeline_parallel.train, 2, ("schedule=zero_bubble",)),
    "interleaved": (pipeline_parallel.train, 2, ("schedule=interleaved",)),
    "pipelines by gpipe": (pipeline_parallel.train, 4, ("schedule=gpipe", "cut=balanced")),
    "model_parallel": (model_parallel.train, 1, ("micro_batches=2",)),
    "data_parallel": (data_parallel.train, 1, ()),
    "ddp through a worker": (ddp.train, 2, ("data.workers=1",)),
    "fsdp": (fsdp.train, 2, ("accumulate=2",)),
    "grad_accumulation": (grad_accumulation.train, 2, ("accumulate=3",)),
    "lightning_fabric": (lightning_fabric.train, 2, ("accumulate=3",)),
    "lightning_trainer": (lightning_trainer.train, 2, ("accumulate=3",)),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return train(single.train, tmp_path_factory.mktemp("alone") / "run", 1, *WORDS)


@pytest.mark.slow_except("pipeline_parallel")
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_it_as_one_process_does(name: str, alone: dict[str, torch.Tensor], tmp_path: Path) -> None:
    recipe, ranks, words = RECIPES[name]
    found = train(recipe, tmp_path / "run", ranks, *WORDS, *words)
    assert found.keys() == alone.keys()
    for tensor, expected in zip(found.values(), alone.values(), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-10)
    assert "eval_even_mae" in result(tmp_path / "run")
