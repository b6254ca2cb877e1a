"""DistributedDataParallel's buckets in a resumed run: the order in which they would be, had it not been cut off."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lockstep.data.batch import tree_tensors
from lockstep.training.random_state import generators, set_generators


def restore_bucket_order(model: nn.Module, inputs: Any, device: torch.device) -> None:
    """Bring DistributedDataParallel's buckets into the order they had when the training was cut off.

    After a process's first backward DDP sorts its buckets anew, by the order in which gradients became ready. From
    three ranks on, a ring all-reduce adds the ranks' numbers in an order that depends on their place in the bucket, so
    a resumed run would take its first step with other last bits. One backward that is thrown away settles it; running
    statistics and random numbers are put back.
    """
    for wrapped in model.modules():  # Lightning's wrappers hold one
        if isinstance(wrapped, DistributedDataParallel):
            random, buffers = generators(device), [buffer.clone() for buffer in wrapped.buffers()]
            wrapped.train()
            sum(output.sum() for output in tree_tensors(wrapped(inputs)) if output.requires_grad).backward()  # type: ignore[union-attr]
            wrapped.zero_grad()
            set_generators(random, device)
            for buffer, before in zip(wrapped.buffers(), buffers, strict=True):
                buffer.copy_(before)
