"""Gradient accumulation: a batch in micro-batches whose gradients add up to the batch's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from lockstep.data.datasets import Batch


class MicroBatch(NamedTuple):
    """A piece of a batch: images [n, 3, H, W], labels [n], its share n / N of the batch's N images, and its place."""

    images: Tensor
    labels: Tensor
    weight: float
    last: bool = True


def micro_batches(batch: Batch, count: int, model: nn.Module) -> Iterator[MicroBatch]:
    """Cut a batch into `count` micro-batches, or a few less where chunk's rounding up makes fewer do.

    Give each one's mean loss its `weight` before backward, and the sum of their gradients is the gradient of the mean
    loss over the whole batch, ragged last piece included. A plain 1 / count is wrong as soon as pieces differ in size.

    While a piece that is not the last is being worked on, a DistributedDataParallel `model` does not all-reduce:
    gradients add up on each rank, and cross the network once a step. The forward must lie inside no_sync too, because
    it is the forward that arms DDP's hooks; so the context spans the whole body of the caller's loop.
    """
    if count == 1:
        yield MicroBatch(*batch, weight=1.0)
        return
    pieces = list(zip(batch.images.chunk(count), batch.labels.chunk(count), strict=True))
    for number, (images, labels) in enumerate(pieces):
        last = number == len(pieces) - 1
        quiet = getattr(model, "no_sync", contextlib.nullcontext)
        with contextlib.nullcontext() if last else quiet():
            yield MicroBatch(images, labels, len(labels) / len(batch.labels), last)
