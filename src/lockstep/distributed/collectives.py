"""Small collectives on Python objects and numbers, for what ranks tell each other beside the training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

AnyObject = TypeVar("AnyObject")


def broadcast_object(mine: AnyObject, group: dist.ProcessGroup | None = None) -> AnyObject:
    """Rank 0's object, on every rank."""
    box = [mine]
    dist.broadcast_object_list(box, group=group, group_src=0)
    return box[0]


def gather_objects(mine: AnyObject, group: dist.ProcessGroup | None = None) -> list[AnyObject]:
    """One object from every rank of a group, or of all, in rank order, on every rank."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def gather_numbers(value: float, device: torch.device) -> list[float]:
    """One number from every rank, in rank order, on every rank."""
    mine = torch.tensor([value], dtype=torch.float64, device=device)
    everyone = mine.new_empty(dist.get_world_size())
    dist.all_gather_into_tensor(everyone, mine)
    return everyone.tolist()


def on_any_rank(flag: bool, device: torch.device) -> bool:
    """Whether a flag is set on any rank, the same on every rank."""
    anyone = torch.tensor(float(flag), device=device)
    dist.all_reduce(anyone, dist.ReduceOp.MAX)
    return bool(anyone.item())


def read_later(tensor: Tensor, work: Any) -> Callable[[], Tensor]:
    """Begin to bring a collective's result to the host; what is returned gives it, there.

    Of a GPU over NCCL it is copied into pinned memory, on a stream of its own, as soon as the collective is done. Who
    reads it after the next step has been queued waits for the collective, and the GPU for nobody; `.cpu()` would wait
    until that next step is done as well.

    Args:
        work: what `async_op=True` has returned.
    """
    if not (tensor.is_cuda and dist.get_backend() == "nccl"):

        def wait() -> Tensor:
            work.wait()
            return tensor

        return wait
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    stream = torch.cuda.Stream(tensor.device)
    with torch.cuda.stream(stream):
        work.wait()  # has the stream wait
        host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)
        arrived = stream.record_event()

    def read() -> Tensor:
        if not arrived.query():
            arrived.synchronize()
        return host

    return read
