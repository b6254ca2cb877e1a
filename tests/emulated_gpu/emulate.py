"""Every operation on CUDA tensors by the CPU's kernel on the same memory, with the checks that a GPU would make."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from . import batch_norm, host_waits, nccl, rms_norm
from .memory import current_gpu, host_view, on_gpu, to_gpu

# What torch does by itself with nothing but the runtime: memory, and what a tensor is.
OWN = set(
    "empty empty_strided empty_like new_empty new_empty_strided empty_memory_format detach alias lift set_ resize_ resize_as_ "
    "record_stream is_pinned _pin_memory is_same_size is_set_to _has_compatible_shallow_copy_type".split()
)
# These take tensors of several devices: lists of them, or an index from the host.
SEVERAL = set("cat index index_put index_put_ _index_put_impl_ _amp_update_scale_".split())
LISTS = ("_foreach", "_fused")
KERNELS = batch_norm.KERNELS | rms_norm.KERNELS  # which the CPU lacks
NUMBERS = ("_local_scalar_dense", "equal", "is_nonzero", "item")


class Emulation(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_fake(types):
            return func(*args, **kwargs)
        if any(is_wrapper(kind) for kind in types):
            return NotImplemented  # DTensor and its like come again with what is inside
        name = func._schema.name
        space, _, short = name.partition("::")
        leaves, _ = tree_flatten((args, kwargs))
        devices = {x.device for x in leaves if on_gpu(x)}
        asked = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if space == "c10d":
            return nccl.collective(func, name, args, kwargs, leaves)
        if not devices and (asked is None or asked.type != "cuda"):
            return func(*args, **kwargs)
        if func.is_view and func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with self:  # below autograd, in DTensor's dispatch, `to` and its like come whole, and they may copy
                return func.decompose(*args, **kwargs)
        if short in OWN or ((func.is_view or short in ("view", "reshape")) and short != "_unsafe_view"):
            return func(*args, **kwargs)
        if short == "copy_":
            return copy(args[0], args[1], bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False)))
        if short == "_to_copy":
            return to_copy(args[0], **kwargs)
        if short == "_foreach_copy_":
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            for target, source in zip(args[0], args[1], strict=True):
                copy(target, source, bool(non_blocking))
            return None
        if short == "wait_tensor":
            return args[0]
        check_devices(short, leaves, devices)
        if short in host_waits.WAITING:
            host_waits.host_waits(short)
        elif "index" in short and any(is_mask(index) for index in args[1] or () if isinstance(args[1], list | tuple)):
            host_waits.host_waits(f"{short} with a mask")
        return compute(func, short, args, kwargs, asked, next(iter(devices), asked))


def is_fake(types: Sequence[type]) -> bool:
    """Whether only shapes are asked for."""
    key = torch._C._TorchDispatchModeKey.FAKE
    return torch._C._get_dispatch_mode(key) is not None or any(kind.__name__ == "FakeTensor" for kind in types)


def is_wrapper(kind: Any) -> bool:
    own = getattr(kind, "__torch_dispatch__", None)
    return kind not in (Tensor, torch.nn.Parameter) and own is not Tensor.__torch_dispatch__


def is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def check_devices(short: str, leaves: list[Any], devices: set[torch.device]) -> None:
    """Refuse what a kernel could not reach: the host's tensors, but for numbers, and another GPU's."""
    if short.startswith(LISTS) or short in SEVERAL or not devices:
        return
    host = {x.device for x in leaves if isinstance(x, Tensor) and x.device.type == "cpu" and x.dim()}
    if len(found := devices | host) > 1:
        names = ", ".join(sorted(map(str, found)))
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {names}! ({short})"
        )


def compute(func: Any, short: str, args: Any, kwargs: Any, asked: Any, device: torch.device) -> Any:
    """The CPU's kernel; its results are CUDA tensors, or those that it was handed to write to."""
    if device.index is None:
        device = current_gpu()
    mine, named = tree_map(host_view, args), dict(tree_map(host_view, kwargs))
    if asked is not None:
        named["device"] = torch.device("cpu")
    named.pop("pin_memory", None)
    result = KERNELS.get(short, func)(*mine, **named)
    if func._schema.name.startswith("_c10d_functional::"):
        wait = torch.ops._c10d_functional.wait_tensor
        result = tree_map(lambda y: wait(y) if isinstance(y, Tensor) else y, result)
    if short in NUMBERS:
        return result
    if short.startswith("_foreach") and short.endswith("_"):
        return None
    views, originals = tree_flatten((mine, named))[0], tree_flatten((args, kwargs))[0]
    given = {id(view): x for view, x in zip(views, originals, strict=False) if on_gpu(x)}

    def handed_back(y: Any) -> Any:
        if id(y) in given:
            return given[id(y)]
        return to_gpu(y, device) if isinstance(y, Tensor) and y.device.type == "cpu" else y

    return tree_map(handed_back, result)


def copy(target: Tensor, source: Tensor, non_blocking: bool) -> Tensor:
    """Between devices at once; to pinned memory through the runtime, where it arrives when its stream is waited for."""
    if target.data_ptr() == source.data_ptr() and target.device != source.device:
        return target  # DDP is handed the all-reduced bucket as the host's view of it, and copies it back to itself
    if on_gpu(source) and not on_gpu(target):
        alike = target.dtype == source.dtype and target.shape == source.shape and target.stride() == source.stride()
        if non_blocking and alike and target.is_contiguous():
            return torch.ops.aten.copy_.default(target, source, True)
        if not (non_blocking and target.is_pinned()):
            host_waits.host_waits("a copy to the host")
    elif on_gpu(target) and not on_gpu(source) and source.dim() and source.numel():
        if not non_blocking:
            host_waits.host_waits("a copy to the device")
        elif not source.is_pinned():
            host_waits.host_waits("a copy to the device from memory that is not pinned")
    host_view(target).copy_(host_view(source))
    return target


def to_copy(
    x: Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    """What `x.to(...)` makes."""
    device = torch.device(device) if device is not None else x.device
    if device.type == "cuda" and device.index is None:
        device = current_gpu()
    kept = memory_format in (None, torch.preserve_format)
    if kept and not x.is_contiguous():
        like = torch.empty_like(host_view(x))
        made = torch.empty_strided(like.shape, like.stride(), dtype=dtype or x.dtype, device=device)
    else:
        layout_of = torch.contiguous_format if kept else memory_format
        made = torch.empty(x.shape, dtype=dtype or x.dtype, device=device, memory_format=layout_of)
    return copy(made, x, non_blocking)


def device_count() -> int:
    found = ctypes.c_int(0)
    ctypes.CDLL(None).cudaGetDeviceCount(ctypes.byref(found))
    return found.value


def install() -> None:
    """For this interpreter and its forks, in every thread."""
    torch.backends.cudnn.enabled = False  # it would be asked for its own kernels
    host_waits.install()
    nccl.install()
    # torch's own marks the processes that are copied later as unfit for CUDA; of these devices a copy has its own.
    torch._C._cuda_getDeviceCount = device_count
    run, show = threading.Thread.run, Tensor.__repr__

    def run_emulated(self: threading.Thread) -> None:
        with Emulation():
            run(self)

    def show_emulated(self: Tensor, **how: Any) -> str:  # torch leaves all modes to print
        plain = type(self) in (Tensor, torch.nn.Parameter) and self.is_cuda
        return f"<{self.device}> {show(host_view(self.detach()))}" if plain else show(self, **how)

    threading.Thread.run = run_emulated  # type: ignore[method-assign]
    Tensor.__repr__ = show_emulated  # type: ignore[method-assign,assignment]
    Emulation().__enter__()
