"""Muon replicated, in shards and dealt out: the same training in fp64, with its Newton–Schulz in fp64 too."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from lockstep.verify.trace import difference
from recipes import single
from tests.helpers.harness import tensors_of, train

WORDS = ("task=language", "optim=muon", "optim.lr=0.003", "optim.warmup_steps=0", "precision=fp64", "max_steps=3")
WORDS += ("global_batch_size=12", "eval_every=0", "task.samples=0", "threads=1", "eval_batch_size=360")
CASES = {
    "replicated": ("ddp", 2, ()),
    "sharded": ("fsdp", 2, ()),
    "sharded unevenly": ("fsdp", 3, ()),
    "sharded in copies": ("fsdp", 4, ("replicate=2",)),
    "dealt out": ("zero1", 2, ()),
    "by stages": ("pipeline_parallel", 2, ()),
    "by layers that ranks share": ("tensor_parallel", 4, ()),
    "on a mesh": ("parallel_mesh", 4, ()),
}


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, torch.Tensor]:
    return train(single.train, tmp_path / "whole", 1, *WORDS, "checkpoint.every=3")


@pytest.mark.slow_except("sharded")
@pytest.mark.soak_for("by layers that ranks share", "sharded in copies")
@pytest.mark.parametrize("name", CASES)
def test_it_trains_what_one_process_trains(name: str, whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    module, ranks, words = CASES[name]
    mine = train(importlib.import_module(f"recipes.{module}").train, tmp_path / "mine", ranks, *WORDS, *words)
    assert difference(mine, whole) <= 1e-10


@pytest.mark.slow
def test_adamw_has_embeddings_and_norms(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """By what they keep: Muon one moment, AdamW two."""
    kept = tensors_of(tmp_path / "whole" / "checkpoints" / "step-00000003")
    names = [name.removeprefix("optim.") for name in kept if name.startswith("optim.")]
    muon = {name.removesuffix(".momentum_buffer") for name in names if name.endswith(".momentum_buffer")}
    adamw = {name.removesuffix(".exp_avg_sq") for name in names if name.endswith(".exp_avg_sq")}
    assert adamw == {name for name in whole if "norm" in name or name == "embedding.weight"}
    assert muon == whole.keys() - adamw
