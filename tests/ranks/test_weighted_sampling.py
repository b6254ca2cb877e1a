"""Samples drawn by weight: a function of (seed, epoch), whatever the ranks and workers, and after a kill."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lockstep.config.run_directory import freeze
from lockstep.config.schema import Config
from lockstep.distributed.process_group import World
from lockstep.launch.validate import validate
from lockstep.run import Run
from recipes import ddp, single
from tests.helpers.examples import kill_a_rank
from tests.helpers.harness import compose_config, execute, lines, result, run_ranks, train

TASK = f"{__file__}:Drawn"
SIZE, STEPS = 60, 15  # five steps per epoch
WORDS = (f"task={TASK}", "global_batch_size=12", "epochs=3", "log_every=1", "optim.lr=0.01", "checkpoint.every=4")


class Numbered:
    """Index → (the index and numbers from three generators, a number)."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        drawn = [random.random(), float(np.random.random()), torch.rand(()).item()]
        return torch.tensor([index / SIZE, *drawn]), torch.tensor([index % 7 / 7])


@dataclass
class Drawn:
    """A third of the samples is never drawn, a third twice as often as the rest."""

    def __post_init__(self) -> None:
        self.train_set = self.eval_set = Numbered()
        self.sample_weights = torch.arange(SIZE) % 3 * 0.5

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return mse_loss(outputs, targets)


def batches_of(world: World, config: Config, out: str, start: int) -> list[Tensor]:
    """This rank's inputs from step `start` on."""
    run = Run("ddp", config, world, Path(out))
    return [batch.inputs for batch in run.batches(start, STEPS)]


def read(ranks: int, workers: int, start: int, out: Path) -> list[Tensor]:
    """The global batches from step `start` on, put together from the ranks' shares."""
    config = compose_config(ddp.train, *WORDS, f"data.workers={workers}", f"out={out}")
    validate(config, ddp.train, ranks)
    assert freeze(config, "ddp")
    shares = run_ranks(batches_of, ranks, config, str(out), start)
    return [torch.cat(parts) for parts in zip(*shares, strict=True)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Tensor]:
    return read(1, 0, 0, tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.slow
def test_each_is_drawn_as_often_as_its_weight_says(whole: list[Tensor]) -> None:
    numbers = [int(row[0] * SIZE + 0.5) for batch in whole for row in batch]
    assert len(numbers) == STEPS * 12
    of_third = Counter(number % 3 for number in numbers)
    assert of_third[0] == 0
    assert 1.3 < of_third[2] / of_third[1] < 3.0
    epochs = [numbers[first : first + SIZE] for first in range(0, len(numbers), SIZE)]
    assert len({tuple(epoch) for epoch in epochs}) == 3, "each epoch draws anew"
    assert all(len(set(epoch)) < SIZE * 2 // 3 for epoch in epochs), "with replacement"


@pytest.mark.slow_except("2-3")
@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_workers_and_resumes_change_no_draw(
    ranks: int, workers: int, whole: list[Tensor], tmp_path: Path
) -> None:
    """Neither which samples, nor the random numbers in them."""
    for start in (0, 7):
        found = read(ranks, workers, start, tmp_path / f"from {start}")
        assert len(found) == STEPS - start
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, whole[start:], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "workers"), [(2, 0), (3, 3)])
def test_killed_and_started_again_it_draws_what_it_would_have_drawn(ranks: int, workers: int, tmp_path: Path) -> None:
    words = (*WORDS, "precision=fp64", f"data.workers={workers}")
    alone = train(single.train, tmp_path / "alone", 1, *words)
    undisturbed = train(ddp.train, tmp_path / "undisturbed", ranks, *words)
    kill_a_rank(ddp.train, TASK, tmp_path / "parts", ranks, 7, 4, *words)
    execute(ddp.train, tmp_path / "parts", ranks, *words)
    assert result(tmp_path / "parts")["resumed_from"] == "checkpoints/step-00000004"
    parts = torch.load(tmp_path / "parts" / "model.pt", weights_only=True)
    assert all(torch.equal(parts[name], tensor) for name, tensor in undisturbed.items())
    assert lines(tmp_path / "parts") == lines(tmp_path / "undisturbed")
    assert all(torch.allclose(parts[name], tensor, rtol=0, atol=1e-12) for name, tensor in alone.items())
