"""Files of a run directory, written so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from lockstep.errors import UserError

PACKAGES = "lockstep torch torchvision numpy hydra-core omegaconf torchmetrics lightning deepspeed ray".split()


def write_atomically(path: Path, content: str | bytes | memoryview) -> None:
    """Write beside `path`, flush to disk, then rename: after a crash there is the old file or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(path: Path) -> None:
    """Flush a folder's list of names to disk: without it a crash can forget a rename."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def make_run_directory(out: str | None, recipe: str) -> Path:
    """Create the run directory, `out` or outputs/<recipe>/<time>, with `ranks/` in it.

    Raises:
        UserError: `out` holds something already, or cannot be made.
    """
    wanted = Path(out).expanduser() if out else Path("outputs", recipe, time.strftime("%Y-%m-%d_%H-%M-%S"))
    wanted = wanted.absolute()
    if out and wanted.exists() and (not wanted.is_dir() or any(wanted.iterdir())):
        raise UserError(f"out={out}: not empty; name a new folder, or empty it")
    path, again = wanted, 1
    while True:
        try:
            # A second run in the same second gets a name of its own.
            path.mkdir(parents=True, exist_ok=out is not None)
            break
        except FileExistsError:
            again += 1
            path = wanted.with_name(f"{wanted.name}-{again}")
        except OSError as error:
            raise UserError(f"out={path}: cannot be made ({error.strerror}); name a folder you can write to") from None
    (path / "ranks").mkdir()
    return path


def environment(hosts: list[str], device: str, backend: str) -> dict[str, Any]:
    """What a run ran on. Variables are picked by name, because a dump of all of them would publish tokens."""
    import torch

    keep = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "SLURM_JOB_ID", "SLURM_JOB_PARTITION", "SLURM_NTASKS")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
        "cuda": torch.version.cuda,
        "git_commit": git_commit(),
        "hosts": hosts,
        "cores": len(os.sched_getaffinity(0)),
        "cpu": cpu_name(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": device,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "backend": backend,
        "environment": {name: os.environ[name] for name in keep if name in os.environ},
    }


def cpu_name() -> str:
    """The processor's model, as the kernel knows it."""
    names = re.findall(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return names[0] if names else platform.machine()


def versions() -> dict[str, str]:
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
