"""DistributedDataParallel's buckets in a resumed run: the order in which they would be, had it not been cut off."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lockstep.training.random_state import generators, set_generators


def restore_bucket_order(model: nn.Module, images: Tensor) -> None:
    """Bring DistributedDataParallel's buckets into the order they had when the training was cut off.

    After a process's first backward DDP sorts its buckets anew, by the order in which gradients became ready. From
    three ranks on, a ring all-reduce adds the ranks' numbers in an order that depends on their place in the bucket, so
    a resumed run would take its first step with other last bits. One backward that is thrown away settles it; running
    statistics and random numbers are put back.
    """
    for wrapped in model.modules():  # Lightning's wrappers hold one
        if isinstance(wrapped, DistributedDataParallel):
            random, buffers = generators(images.device), [buffer.clone() for buffer in wrapped.buffers()]
            wrapped.train()
            wrapped(images).sum().backward()
            wrapped.zero_grad()
            set_generators(random, images.device)
            for buffer, before in zip(wrapped.buffers(), buffers, strict=True):
                buffer.copy_(before)
