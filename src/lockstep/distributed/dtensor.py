"""Tensors that may be DTensors: a rank's shard, the full tensor, and state dicts of full tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which a rank holds a shard. (To import the class takes half a second.)"""
    return hasattr(tensor, "full_tensor")


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor."""
    return cast(Any, tensor).to_local() if is_sharded(tensor) else tensor


def full_tensor(tensor: Tensor, device: torch.device) -> Tensor:
    """The complete tensor. Where it is sharded, all ranks call this together; `device` is where they communicate."""
    return cast(Any, tensor.to(device)).full_tensor() if is_sharded(tensor) else tensor


def full_state_dict(module: nn.Module, device: torch.device, keep: bool) -> dict[str, Tensor]:
    """The complete state_dict on the CPU where `keep`, else nothing. All ranks call it; one tensor after the other is
    put together on `device`, so that a model that fits no device whole can be exported."""
    found = {}
    for name, tensor in module.state_dict().items():
        complete = full_tensor(tensor.detach(), device)
        if keep:
            found[name] = complete.cpu()
    return found


def load_full_state_dict(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy complete weights, which this rank has, into a module; of a sharded tensor it takes its shard."""
    for name, mine in module.state_dict().items():
        tensor = weights[name]
        if is_sharded(mine):
            from torch.distributed.tensor import distribute_tensor

            mesh, placements = cast(Any, mine).device_mesh, cast(Any, mine).placements
            tensor = distribute_tensor(tensor.to(mine.dtype), mesh, placements, src_data_rank=None)
        mine.copy_(tensor)
