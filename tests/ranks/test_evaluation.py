"""Evaluation: every sample counts once, and every rank of any number gets the same bits."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lockstep.config.schema import Config
from lockstep.data.batch import Batch
from lockstep.data.datasets import InMemoryImages
from lockstep.data.loader import Samples, build_loader
from lockstep.data.sampler import EvalSampler
from lockstep.distributed.process_group import World
from lockstep.tasks.images import Images
from lockstep.training.evaluate import Evaluation, Tally, evaluate
from tests.helpers.harness import run_ranks


def linear(size: int) -> tuple[InMemoryImages, Tensor]:
    """A set with random labels, and the weights of a model for it."""
    generator = torch.Generator().manual_seed(7)
    pixels = torch.randint(0, 256, (size, 3, 8, 8), generator=generator).to(torch.uint8)
    images = InMemoryImages(pixels, torch.randint(0, 10, (size,), generator=generator), 10, 0, False)
    return images, torch.randn(3 * 8 * 8, 10, dtype=torch.float64, generator=generator)


def evaluate_on(world: World, size: int, batch_size: int, lost: int = 0) -> Evaluation:
    images, weights = linear(size)
    sampler = EvalSampler(size, batch_size, world.rank, world.world_size)

    def batches() -> Iterator[Batch]:
        for batch in build_loader(Samples(images, 0), sampler, 0, pin_memory=False):
            yield Batch(batch.inputs[lost:], batch.targets[lost:], batch.count - lost)

    tally = Tally(Images(Config()), sampler, None)
    return evaluate(lambda x: x.double().div(255).flatten(1) @ weights, batches(), tally, world.device)


@pytest.mark.parametrize(("size", "batch_size"), [(101, 7), (5, 7)])
def test_evaluation_gives_every_rank_of_any_number_the_same_bits(size: int, batch_size: int) -> None:
    """5 samples are a single batch: all ranks but one have nothing to evaluate."""
    found = [run_ranks(evaluate_on, world_size, size, batch_size) for world_size in (1, 2, 3, 4)]
    assert [len(ranks) for ranks in found] == [1, 2, 3, 4]
    assert all(result == found[0][0] for ranks in found for result in ranks)


def test_evaluation_is_the_mean_over_all_samples() -> None:
    images, weights = linear(101)
    (result,) = run_ranks(evaluate_on, 1, 101, 7)
    logits = images.images.double().div(255).flatten(1) @ weights
    own = [row[label].item() for row, label in zip(logits.log_softmax(1), images.labels, strict=True)]
    assert result.count == 101
    assert result.loss == pytest.approx(-math.fsum(own) / 101, rel=1e-12)
    assert result.metrics["accuracy"] == (logits.argmax(1) == images.labels).sum().item() / 101


def test_evaluation_that_lost_a_sample_fails() -> None:
    with pytest.raises(AssertionError, match="counted 86 samples of 101"):
        run_ranks(evaluate_on, 1, 101, 7, 1)  # one of each of the 15 batches
