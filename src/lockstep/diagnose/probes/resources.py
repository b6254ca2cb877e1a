"""What DataLoader workers and ranks take from a host, and whether its limits have it: shared memory, names of sockets,
open files, processes.

A worker hands a batch over in shared memory, whose descriptor it sends over a socket in TMPDIR. Where one of them cannot be
had, a run ends in its first steps or, later, when the first evaluation asks for as much again.
Source: https://docs.pytorch.org/docs/stable/multiprocessing.html
"""

from __future__ import annotations

import contextlib
import os
import resource
import tempfile
from pathlib import Path

from lockstep.data.batches import BatchSource
from lockstep.data.loader import PREFETCHED
from lockstep.diagnose.findings import Facts, Findings
from lockstep.diagnose.probes.ranks import ranks_by_host
from lockstep.distributed.cores import control_groups
from lockstep.utils.temporary import PREFIX
from lockstep.utils.text import count, mebibytes

SHARED = Path("/dev/shm")
SOCKET_NAME = 107  # bytes of an AF_UNIX path, sockaddr_un's 108 less the closing zero
OWN_NAME = len(f"/{PREFIX}12345678/listener-12345678")  # what a rank's folder for sockets puts behind TMPDIR
TENSORS = 8  # of a batch: each has a descriptor of its own while it is under way
WORKER_FILES = 16  # descriptors that a rank holds for a worker: queues, events, its sentinel
WORKER_THREADS = 4  # of a worker, itself included: the kernel counts threads where it says processes
SPARE_FILES = 128  # for connections, logs and checkpoints
LOADERS = 2  # at a time: the one for training stays while an evaluation has its own


def probe_resources(data: BatchSource, global_batch_size: int, eval_batch_size: int, shards: int) -> Facts:
    """What this rank's host has left for it, and the bytes of a batch."""
    workers, shared = data.workers, os.statvfs(SHARED) if SHARED.is_dir() else None
    sample = data.sample_bytes() if workers else 0
    return {
        "workers": workers,
        "batch_bytes": [sample * global_batch_size // shards, sample * eval_batch_size],
        "shared_bytes": shared.f_bavail * shared.f_frsize if shared else 0,
        "temporary": tempfile.gettempdir(),
        "files": [resource.getrlimit(resource.RLIMIT_NOFILE)[0], len(os.listdir("/proc/self/fd"))],
        "processes": free_processes(),
    }


def free_processes(machine: Path = Path("/")) -> list[int | str] | None:
    """[how many processes may still be started, who says so]; None: no limit.

    The least of what the control groups allow and, but for root whom it does not bind, `ulimit -u`.
    """
    limits: list[tuple[int, str]] = []
    for folder, _ in control_groups("pids", machine):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            most, now = (int((folder / name).read_text(encoding="utf-8")) for name in ("pids.max", "pids.current"))
            limits.append((max(0, most - now), "the control group's pids.max"))
    most = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if os.geteuid() and most != resource.RLIM_INFINITY:
        limits.append((max(0, most - threads_of(os.getuid())), "ulimit -u"))
    return list(min(limits)) if limits else None


def threads_of(user: int) -> int:
    """All that a user runs on this host, each thread counted, as the kernel does."""
    found = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == user:
                found += len(os.listdir(folder / "task"))
    return found


def judge_resources(ranks: list[Facts]) -> Findings:
    """Whether each host's limits have what its ranks' workers take; per host, the ranks together."""
    found = Findings("resources")
    for host, some in ranks_by_host(ranks).items():
        each = [rank["resources"] for rank in some]
        workers = sum(one["workers"] for one in each)
        who = f"{count(workers, 'DataLoader worker')} of {host}"
        need = sum(one["workers"] * PREFETCHED * sum(one["batch_bytes"]) for one in each)
        there = min(one["shared_bytes"] for one in each)
        if need > there:
            figure = (
                f"{who} fill {mebibytes(need, 0)} MiB of {SHARED} with batches, which has {mebibytes(there, 0)} free"
            )
            found.fails(
                figure, "docker run --shm-size=8g, or mount -o remount,size=8g /dev/shm; or set data.workers lower"
            )
        longest = max((one["temporary"] for one in each), key=len)
        if workers and len(os.fsencode(longest)) + OWN_NAME > SOCKET_NAME:
            figure = (
                f"TMPDIR on {host} is {len(os.fsencode(longest))} bytes long: a worker's socket in it would need more "
            )
            figure += f"than a socket's {SOCKET_NAME}"
            found.fails(figure, f"set TMPDIR to a path of at most {SOCKET_NAME - OWN_NAME} bytes, or data.workers=0")
        for rank, one in zip(some, each, strict=True):
            limit, used = one["files"]
            files = used + SPARE_FILES + LOADERS * one["workers"] * (WORKER_FILES + PREFETCHED * TENSORS)
            if limit != resource.RLIM_INFINITY and files > limit:
                figure = f"rank {rank['rank']} ({host}) may open {limit} files and has {used} open: with "
                figure += f"{count(one['workers'], 'DataLoader worker')} it comes to some {files}"
                found.fails(figure, "ulimit -n 65536, or set data.workers lower")
                break
        limits = [one["processes"] for one in each if one["processes"]]
        if limits:
            left, says = min(limits)
            if left < (more := LOADERS * workers * WORKER_THREADS):
                figure = f"{who} come to {more} processes and threads, and {says} leaves {left}"
                found.fails(figure, "raise it (ulimit -u, docker run --pids-limit), or set data.workers lower")
    if not found:
        one = ranks[0]["resources"]
        shared = f", {mebibytes(one['shared_bytes'], 0)} MiB of shared memory" if one["workers"] else ""
        found.ok(f"{count(one['files'][0], 'open file')} per rank{shared}: enough for its workers ({one['workers']})")
    return found
