"""What a machine has left of its memory, and how busy and how full a rank's device is."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from lockstep.distributed.cores import control_groups
from lockstep.distributed.devices import gpus_in_use


def process_bytes(entry: str) -> int:
    """An entry of /proc/self/status: VmRSS, the resident memory; VmHWM, its peak; VmSize and VmData, what is mapped."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{entry}:"):
            return int(line.split()[1]) * 1024
    return 0


def free_bytes(device: torch.device) -> tuple[int, str]:
    """(bytes that this process could still take, who says so).

    On a GPU what the driver has free and torch keeps unused; on the CPU the least of what the host has, what the
    process's control group may take, and its own limits (`ulimit -v`, `ulimit -d`).
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused, "the driver"
    limits = [(host_bytes(), "the host"), *group_bytes()]
    for name, entry, words in (
        (resource.RLIMIT_AS, "VmSize", "ulimit -v"),
        (resource.RLIMIT_DATA, "VmData", "ulimit -d"),
    ):
        most = resource.getrlimit(name)[0]
        if most != resource.RLIM_INFINITY:
            limits.append((max(0, most - process_bytes(entry)), words))
    return min(limits)


def host_bytes() -> int:
    """Memory of this host that is free, or could be made so without swapping."""
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def group_bytes(machine: Path = Path("/")) -> Iterator[tuple[int, str]]:
    """What the control groups of this process may still take: a container's limit, or a Slurm job's."""
    files = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }
    for group, version in control_groups("memory", machine):
        limit, usage, inactive = files[version]
        try:
            most, used = ((group / name).read_text(encoding="utf-8").strip() for name in (limit, usage))
            rows = (row.split() for row in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
            cached = [row[1] for row in rows if row[0] == inactive]
        except OSError:
            continue
        if most != "max" and int(most) < 2**60:
            yield max(0, int(most) - int(used) + int(cached[0] if cached else 0)), "the control group"


def peak_from_now(device: torch.device) -> Callable[[], int]:
    """What tells by how many bytes memory has risen at most since this was called: what torch's allocator gave out on a
    GPU, this process's resident memory on the CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return lambda: torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # Linux: VmHWM starts again from VmRSS
    before = process_bytes("VmRSS")
    return lambda: process_bytes("VmHWM") - before


def peak_memory_bytes(device: torch.device) -> int:
    """This rank's peak: memory torch allocated on the fullest of its GPUs, or the process's resident set on CPU."""
    if device.type == "cuda":
        return max(torch.cuda.max_memory_allocated(gpu) for gpu in gpus_in_use(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
