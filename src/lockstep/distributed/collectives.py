"""collectives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    pass


import torch


def agree(mine: list[Any], group: dist.ProcessGroup | None) -> list[Any]:
    """Rank 0's list, on all ranks."""
    box = [mine]
    dist.broadcast_object_list(box, group=group, group_src=0)
    return box[0]


def gather_objects(mine: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """One object from every rank of a group, or of all, in rank order, on every rank."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def gather_numbers(value: float, device: torch.device) -> list[float]:
    """One number from every rank, in rank order, on every rank."""
    mine = torch.tensor([value], dtype=torch.float64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return [tensor.item() for tensor in everyone]
