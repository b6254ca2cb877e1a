"""The loader: whole batches of a data set, in the order that a sampler gives, from worker processes or without."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from lockstep.data.batch import Batch, describe
from lockstep.data.sampler import sample_seeds, sample_uniform
from lockstep.data.worker_errors import LostBatch, ReportingContext, heard
from lockstep.distributed.signals import be_a_helper
from lockstep.errors import UserError

PREFETCHED = 2  # batches that a worker has ready
EVALUATION = 2**32 - 1  # the epoch by which the evaluation set's random numbers are drawn: the same each time


class Samples(Dataset[Batch]):
    """What a DataLoader reads: a sampler's (epoch, sample numbers) in, a whole Batch out.

    Each `dataset[index]` runs under Python's, NumPy's and torch's generators seeded by (seed, epoch, index), and they
    are put back afterwards: anyone's random transforms give the same sample in any worker, on any rank and in any
    resumed run, and disturb nobody else's random numbers. A data set with a `fetch(samples, draws)` of its own is asked
    for whole batches instead, with `dataset.draws` numbers in [0, 1) per sample.

    Args:
        dataset: map-style.
        collate: samples → (inputs, targets); None: `collate` below.
        fixed: draw the same random numbers in every epoch, for evaluation.
    """

    def __init__(
        self, dataset: Any, seed: int, collate: Callable[[list[Any]], Any] | None = None, fixed: bool = False
    ) -> None:
        self.dataset, self.seed, self.collate, self.fixed = dataset, seed, collate or default_pair, fixed

    def __getitem__(self, key: tuple[int, Tensor] | LostBatch) -> Any:
        if isinstance(key, LostBatch):  # the sample numbers did not reach this worker
            return key
        epoch, samples = key
        epoch = EVALUATION if self.fixed else epoch
        if hasattr(self.dataset, "fetch"):
            count = self.dataset.draws
            draws = sample_uniform(self.seed, epoch, samples, count) if count else None
            inputs, targets = self.dataset.fetch(samples, draws)
            return Batch(inputs, targets, len(samples))
        with generators_restored():
            found = []
            for number, seed in zip(samples.tolist(), sample_seeds(self.seed, epoch, samples), strict=True):
                seed_all(seed)
                found.append(self.dataset[number])
            seed_all(sample_seeds(self.seed, epoch, samples[:1])[0])  # a collate may draw numbers too
            inputs, targets = pair(self.collate(found), "collate")
            return Batch(inputs, targets, len(samples))


@contextmanager
def generators_restored() -> Iterator[None]:
    """Put Python's, NumPy's and torch's CPU generators back at the end."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def seed_all(seed: int) -> None:
    """Seed the three generators that transforms draw from; a GPU's is left alone, which would wait for it."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


def pair(found: Any, who: str) -> tuple[Any, Any]:
    """(inputs, targets) of what a data set or a collate has given.

    Raises:
        UserError: it is something else.
    """
    if isinstance(found, tuple | list) and len(found) == 2:
        return found[0], found[1]
    raise UserError(f"{who} gave {describe(found)}: a task's samples and batches are pairs, (inputs, targets)")


def default_pair(samples: list[Any]) -> tuple[Any, Any]:
    """torch's default_collate on the inputs and on the targets of the samples, dataclasses included.

    Raises:
        UserError: they cannot be stacked, being of unequal shape, say.
    """
    inputs, targets = zip(*(pair(sample, "the data set") for sample in samples), strict=True)
    try:
        return collate(list(inputs)), collate(list(targets))
    except (RuntimeError, TypeError, ValueError) as error:
        shapes = ", ".join(describe(sample) for sample in samples[:2])
        reason = str(error).splitlines()[0][:120]
        raise UserError(
            f"these samples cannot be stacked into a batch: {shapes}, … ({reason}); give the task a "
            "collate(samples) -> (inputs, targets)"
        ) from None


def collate(values: list[Any]) -> Any:
    """torch's default_collate, which knows no dataclasses."""
    first = values[0]
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [entry.name for entry in dataclasses.fields(first) if entry.init]
        return dataclasses.replace(first, **{name: collate([getattr(v, name) for v in values]) for name in names})
    return default_collate(values)


def build_loader(
    samples: Samples,
    sampler: Sampler[tuple[int, Tensor]],
    workers: int,
    pin_memory: bool,
    timeout_seconds: float = 0,
) -> Iterable[Batch]:
    """A DataLoader that asks the dataset for whole batches (`batch_size=None`: nothing to collate).

    `workers` processes fetch ahead, PREFETCHED batches each; 0 fetches in the training process, which is faster for data in
    memory. Pinned memory lets the copy to a GPU run beside the computation. Where there is neither to see to, a
    DataLoader would only take time.

    Args:
        timeout_seconds: the longest wait for a worker's batch; 0: without end.
    """
    if not workers and not pin_memory:
        return map(samples.__getitem__, sampler)
    return read_ahead(samples, workers, pin_memory, timeout_seconds, sampler=sampler)


def read_ahead(
    dataset: Dataset[Any],
    workers: int,
    pin_memory: bool,
    timeout_seconds: float,
    begin: Callable[[int], None] = be_a_helper,
    sampler: Sampler[Any] | None = None,
) -> Iterable[Any]:
    """A DataLoader, as `build_loader` has it, of what a data set gives for a sampler's entries, or an iterable one gives.

    Args:
        begin: what a worker does first, with its number.
    """
    loader: DataLoader[Any] = DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=PREFETCHED if workers else None,
        timeout=timeout_seconds if workers else 0,
        multiprocessing_context=ReportingContext() if workers else None,  # fork: be_a_helper expects it
        worker_init_fn=begin,
        generator=torch.Generator(),  # or it would draw its base seed from training's random numbers
    )
    return heard(loader, workers, timeout_seconds) if workers else loader
