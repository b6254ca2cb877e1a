"""Small collectives on Python objects and numbers, for what ranks tell each other beside the training."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist

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
