"""What is chosen for the hardware by itself, and why: all of it in `choose`.

Each choice is a key that is `auto` by default, so that typing another value is the switch, and each is named with its
reason in the start-up summary. What each of them gives was measured on ResNets; docs/benchmarks.md has the figures.
"""

from __future__ import annotations

import ctypes
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lockstep.config.keys import AUTO
from lockstep.config.schema import Config, ConfigT
from lockstep.distributed.collectives import gather_numbers
from lockstep.distributed.process_group import World
from lockstep.training.precision import AUTOCAST
from lockstep.utils.files import write_json

CHOSEN = "chosen.json"  # in the run directory: the precision that it began with
ARITHMETIC = ("fp32", "fp16", "bf16")  # what a device computes fast; each implies those before it for our purpose
BF16_UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512", "bf16": "Arm"}  # flags of /proc/cpuinfo
LARGEST_KEPT = 2**30  # bytes; larger blocks still come from the kernel and go back to it


@dataclass(frozen=True)
class Choice:
    """A key, the value that was chosen for it, and the reason in a few words."""

    key: str
    value: Any
    because: str

    def __str__(self) -> str:
        value = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return f"{self.key}={value} ({self.because})"


def make_choices(config: Config, recipe: str, device: str, fast: str, units: str, keeps_memory: bool) -> list[Choice]:
    """Decide every key that is `auto`.

    Args:
        device: "cpu" or "cuda".
        fast: the narrowest arithmetic that every rank's device has units for, one of ARITHMETIC.
        units: their name, to be shown.
        keeps_memory: whether this process's allocator can be told to.
    """
    found = []
    precision = config.precision
    if precision == AUTO:
        precision = fast
        because = f"{units} has no fast 16-bit arithmetic" if fast == "fp32" else f"{units} computes it fast"
        found.append(Choice("precision", precision, because))
    if config.channels_last == AUTO:
        if config.flat_weights:
            found.append(Choice("channels_last", False, "its weights are one long vector"))
        elif precision in AUTOCAST:
            found.append(Choice("channels_last", True, "16-bit convolutions read NHWC; NCHW is reordered every time"))
        else:
            found.append(Choice("channels_last", False, f"in {precision} it gains on some devices and loses on others"))
    if config.allocator == AUTO:
        if device == "cuda":
            found.append(Choice("allocator", "system", "torch keeps a GPU's memory itself"))
        elif keeps_memory:
            found.append(Choice("allocator", "keep", "freed memory is used again without page faults"))
        else:
            found.append(Choice("allocator", "system", "the C library has no mallopt"))
    if config.cudnn_benchmark == AUTO:
        found.append(Choice("cudnn_benchmark", device == "cuda", "every batch has the same shape"))
    return found


def choose_for_hardware(config: ConfigT, recipe: str, world: World, out: Path) -> tuple[ConfigT, list[Choice]]:
    """Choose, on all ranks alike, and set up this process accordingly: (the config without `auto`, the choices).

    A run keeps the precision that it began with, also where it goes on on other hardware.
    """
    fast, units = arithmetic(world.device)
    if config.precision == AUTO:
        kept = _kept(out)
        codes = gather_numbers(ARITHMETIC.index(fast), world.device)  # the others have read the file, too
        slowest = ARITHMETIC[int(min(codes))]
        if slowest != fast:
            fast, units = slowest, "another rank's device"
        if kept:
            fast, units = kept, "the run began with it: this device"
    choices = make_choices(config, recipe, world.device.type, fast, units, keeps_memory=hasattr(_libc(), "mallopt"))
    if config.precision == AUTO and world.rank == 0 and not kept:
        write_json(out / CHOSEN, {"precision": fast})
    settled = replace(config, **{choice.key: choice.value for choice in choices})
    if settled.allocator == "keep":
        keep_memory()
    if world.device.type == "cuda":
        torch.backends.cudnn.benchmark = settled.cudnn_benchmark
    return settled, [choice for choice in choices if choice.key != "cudnn_benchmark" or world.device.type == "cuda"]


def _kept(out: Path) -> str | None:
    """The precision that the run in `out` began with, where it was chosen."""
    try:
        return str(json.loads((out / CHOSEN).read_text(encoding="utf-8"))["precision"])
    except FileNotFoundError:
        return None


def arithmetic(device: torch.device, cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, str]:
    """(the narrowest arithmetic a device has units for, one of ARITHMETIC; the units' name).

    Where there are none, bf16 is emulated: it works, and is slower than fp32. fp16 counts for GPUs alone; the CPUs that
    have units for it are few, and it needs loss scaling.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", name
        return ("fp16" if torch.cuda.get_device_capability(device) >= (7, 0) else "fp32"), name
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return "fp32", "this CPU"
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split(":")[1].split()}
    for flag, name in BF16_UNITS.items():
        if flag in flags:
            return "bf16", f"{name} of this CPU"
    return "fp32", "this CPU"


def keep_memory() -> None:
    """Have the C library keep what is freed, instead of handing large blocks back to the kernel.

    A step frees its activations, each of them large enough for glibc to give it back at once, and the next step gets
    the same pages anew from the kernel, which clears them first: a page fault for every 4 KiB of the step's memory.
    This process's resident memory then stays at its peak between two steps, which training has anyway.
    Source: https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
    libc = _libc()
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
    libc.mallopt(M_TRIM_THRESHOLD, ctypes.c_int(2**31 - 1))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
