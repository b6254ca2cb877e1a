"""Copies of a part of a model, which average their gradients after backward."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from lockstep.distributed.dtensor import local_shard


def average_gradients(module: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """All-reduce every gradient among the ranks that hold the same part of a model, each its shard of it.

    DDP would overlap this with backward, but it expects one backward a step, where each micro-batch of a pipeline has
    its own, and plain tensors.

    Args:
        group: these ranks; None: all.
    """
    size = dist.get_world_size(group)
    if size > 1:
        gradients = [local_shard(parameter.grad) for parameter in module.parameters() if parameter.grad is not None]
        for work in [dist.all_reduce(gradient, group=group, async_op=True) for gradient in gradients]:
            work.wait()
        for gradient in gradients:
            gradient.div_(size)
