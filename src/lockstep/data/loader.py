"""The loader: whole batches of a data set, in the order that a sampler gives, from worker processes or without."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lockstep.data.datasets import DRAWS, Batch, ImageDataset
from lockstep.data.sampler import sample_uniform
from lockstep.distributed.signals import be_a_helper


class Samples(Dataset[Batch]):
    """What a DataLoader reads: a sampler's (epoch, sample numbers) in, a whole Batch out."""

    def __init__(self, images: ImageDataset, seed: int, augment: bool) -> None:
        self.images, self.seed, self.augment = images, seed, augment

    def __getitem__(self, key: tuple[int, Tensor]) -> Batch:
        epoch, samples = key
        draws = sample_uniform(self.seed, epoch, samples, DRAWS) if self.augment else None
        return self.images.fetch(samples, draws)


def build_loader(
    samples: Samples, sampler: Sampler[tuple[int, Tensor]], workers: int, pin_memory: bool
) -> Iterable[Batch]:
    """A DataLoader that asks the dataset for whole batches (`batch_size=None`: nothing to collate).

    `workers` processes fetch ahead, two batches each; 0 fetches in the training process, which is faster for images in
    memory. Pinned memory lets the copy to a GPU run beside the computation. Where there is neither to see to, a
    DataLoader would only take time.
    """
    if not workers and not pin_memory:
        return map(samples.__getitem__, sampler)
    return DataLoader(
        samples,
        sampler=sampler,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=2 if workers else None,
        multiprocessing_context="fork" if workers else None,  # which is what be_a_helper expects
        worker_init_fn=be_a_helper,
        generator=torch.Generator(),  # or it would draw its base seed from training's random numbers
    )
