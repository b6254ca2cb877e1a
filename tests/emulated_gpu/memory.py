"""A CUDA tensor's memory as the host's, which it is."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor


def on_gpu(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_cuda


def host_view(x: Any) -> Any:
    """A CPU tensor on the memory of a CUDA one; anything else as it is."""
    if not on_gpu(x):
        return x
    storage = x.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    view = torch.empty(0, dtype=x.dtype).set_(flat.untyped_storage(), x.storage_offset(), x.shape, x.stride())
    if x.is_conj():
        view = view.conj()
    return torch._neg_view(view) if x.is_neg() else view


def to_gpu(x: Tensor, device: torch.device) -> Tensor:
    """A new CUDA tensor with a CPU one's content and layout."""
    made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    if x.numel():
        host_view(made).copy_(x)
    return made


def current_gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
