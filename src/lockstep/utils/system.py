"""What a run ran on: machine, packages and commit."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = "lockstep torch torchvision numpy hydra-core omegaconf torchmetrics lightning deepspeed ray".split()


def system_info(hosts: list[str], device: str, backend: str) -> dict[str, Any]:
    """A run directory's environment.json. Variables are picked by name, because a dump of all of them would publish tokens."""
    import torch

    keep = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "SLURM_JOB_ID", "SLURM_JOB_PARTITION", "SLURM_NTASKS")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": package_versions(),
        "cuda": torch.version.cuda,
        "git_commit": git_commit(),
        "hosts": hosts,
        "cores": len(os.sched_getaffinity(0)),
        "cpu": cpu_name(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": device,
        # On CPU not asked for: that would take memory of every GPU for a context that nothing uses.
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count() if device != "cpu" else 0)],
        "backend": backend,
        "environment": {name: os.environ[name] for name in keep if name in os.environ},
    }


def stat_fields(process: int | str | Path) -> list[str]:
    """What /proc/PID/stat says of a process after its name: state, parent, group, … (proc(5), from the third field on).

    The name stands before that in brackets and may hold anything.

    Args:
        process: its number, or its folder in another /proc.

    Raises:
        OSError: there is none, or it is not to be read.
    """
    return (
        (Path("/proc") / str(process) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    )


class OtherWork:
    """How many of this process's cores others have used since it was made; this process and its ended children aside.

    Source: /proc/stat, https://man7.org/linux/man-pages/man5/proc_stat.5.html
    """

    def __init__(self) -> None:
        self.began, self.all, self.own = time.perf_counter(), busy_seconds(), own_seconds()

    def cores(self) -> float:
        """Cores, on average; time that a hypervisor gave to other machines counts too."""
        others = busy_seconds() - self.all - (own_seconds() - self.own)
        return max(0.0, others / (time.perf_counter() - self.began))


def busy_seconds() -> float:
    """Seconds since boot in which the cores that this process may use were not idle."""
    ticks = 0
    for line in Path("/proc/stat").read_text(encoding="ascii").splitlines():
        name, *words = line.split()
        if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in os.sched_getaffinity(0):
            user, nice, system, _idle, _waiting, interrupts, soft, steal = map(int, words[:8])
            ticks += user + nice + system + interrupts + soft + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


def cpu_name() -> str:
    """The processor's model, as the kernel knows it."""
    names = re.findall(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return names[0] if names else platform.machine()


def package_versions() -> dict[str, str]:
    """Of the packages that a run may use, those that are installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def git_commit() -> str | None:
    """The working directory's commit, with `-dirty` where files differ from it; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
