"""Gradient accumulation: a batch in micro-batches whose gradients add up to the batch's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lockstep.data.batch import Batch, cut_tree, pieces
from lockstep.data.batches import items_of


class MicroBatch(NamedTuple):
    """A piece of a batch: inputs and targets of n samples, its weight, and whether it is the last of its batch.

    The weight is its share of the batch's N samples, n / N, or of what the task's `weigh` counts, such as tokens, times
    the batch's own weight.
    """

    inputs: Any
    targets: Any
    weight: float | Tensor
    last: bool = True


def micro_batches(batch: Batch, count: int, model: nn.Module) -> Iterator[MicroBatch]:
    """Cut a batch into `count` micro-batches, or a few less where rounding up, as in torch.chunk, makes fewer do.

    Give each one's mean loss its `weight` before backward, and the sum of their gradients is the gradient of the mean
    loss over the whole batch, ragged last piece included. A plain 1 / count is wrong as soon as pieces differ in size.

    While a piece that is not the last is being worked on, a DistributedDataParallel `model` does not all-reduce:
    gradients add up on each rank, and cross the network once a step. The forward must lie inside no_sync too, because
    it is the forward that arms DDP's hooks; so the context spans the whole body of the caller's loop.
    """
    if count == 1:
        yield MicroBatch(batch.inputs, batch.targets, batch.weight)
        return
    bounds = pieces(batch.count, count)
    for number, (start, stop) in enumerate(bounds):
        last = number == len(bounds) - 1
        quiet = getattr(model, "no_sync", contextlib.nullcontext)
        with contextlib.nullcontext() if last else quiet():
            yield micro_batch(batch, start, stop, last)


def micro_batch(batch: Batch, start: int, stop: int, last: bool = True) -> MicroBatch:
    """Samples start…stop − 1 of a batch, with their weight."""
    inputs, targets = (cut_tree(tree, start, stop, batch.count) for tree in (batch.inputs, batch.targets))
    weight: float | Tensor = (stop - start) / batch.count
    if batch.weigh is not None and batch.items is not None:
        weight = (items_of(batch.weigh, targets) / batch.items).to(torch.as_tensor(batch.weight).dtype)
    return MicroBatch(inputs, targets, weight * batch.weight, last)
