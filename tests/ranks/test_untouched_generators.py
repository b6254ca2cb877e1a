"""Nothing of ours, nor a library as it is loaded, draws from the generators that a task's own code draws from.

A draw at a moment that depends on time, or on what an earlier start has loaded, would end a resumed run with other bits.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from lockstep.training.random_state import generators
from tests.helpers.harness import command, tensors_of

SIZE = ("nproc=2", "start=spawn", "data.size=192", "global_batch_size=96")
SAVED = ("checkpoint.every=1", "checkpoint.keep=9")
WATCHED = ("logger=[csv,tensorboard]", "profile=1", "memory=report", "data.workers=1")
ENGINES = ("lightning_fabric", "lightning_trainer", "deepspeed_zero", "fsdp", "pipeline_parallel", "local_sgd", "zero1")


@pytest.mark.soak
@pytest.mark.parametrize("recipe", ["ddp", *ENGINES])
def test_pythons_and_numpys_generators_are_as_they_were_seeded(tmp_path: Path, recipe: str) -> None:
    """In every checkpoint of a run that is watched by all there is, and of its resumption, in fresh interpreters."""
    out = tmp_path / "out"
    for steps in (3, 5):
        words = (*SIZE, *SAVED, *WATCHED, f"max_steps={steps}", f"out={out}")
        ended = command("-m", f"recipes.{recipe}", *words, fresh=True, timeout=240)
        assert ended.returncode == 0, ended.stderr
    saved = {path.name: tensors_of(path) for path in (out / "checkpoints").glob("step-*")}
    assert len(saved) == 5
    for name, state in saved.items():
        for rank in range(2):
            seeds = {seed: seeded(seed) for seed in {0, rank}}  # stages and shards of one sample share a stream
            assert any(
                all(torch.equal(bits(state[f"rng.{rank}.{kind}"]), bits(wanted[kind])) for kind in wanted)
                for wanted in seeds.values()
            ), f"{name}: something has drawn on rank {rank}"


def seeded(seed: int) -> dict[str, torch.Tensor]:
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    found = generators(torch.device("cpu"))
    random.setstate(before[0])
    np.random.set_state(before[1])
    return {kind: found[kind] for kind in ("python", "numpy")}


def bits(state: torch.Tensor) -> torch.Tensor:
    return state.nan_to_num(nan=-1.0)
