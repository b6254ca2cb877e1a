"""The doctor knows what DataLoader workers take from a host, and what its limits leave: with real limits."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import subprocess
import tempfile
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lockstep.diagnose.findings import Facts
from lockstep.diagnose.probes.resources import free_processes, judge_resources, probe_resources
from lockstep.utils.temporary import keep_sockets

NAMESPACE, USER = 0x20000, 0x10000000  # CLONE_NEWNS, CLONE_NEWUSER of linux/sched.h


def facts(workers: int, sample: int = 1000) -> Facts:
    data: Any = SimpleNamespace(workers=workers, sample_bytes=lambda: sample)
    return {"rank": 0, "host": "box", "resources": probe_resources(data, 64, 128, 2)}


def told_under(limit: Callable[[], object], workers: int = 2, sample: int = 1000) -> list[str]:
    """What is found in a process that has first put itself under a limit: `verdict: figure | remedy`."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def look() -> None:
        limit()
        found = judge_resources([facts(workers, sample)])
        there.send([f"{each.verdict}: {each.figure} | {each.remedy}" for each in found])
        there.close()
        os._exit(0)

    process = context.Process(target=look)
    process.start()
    there.close()
    found: list[str] = here.recv()
    process.join()
    return found


def small_shared_memory() -> None:
    """A /dev/shm of 64 MiB, Docker's default, for this process alone."""
    assert ctypes.CDLL(None).unshare(NAMESPACE | (USER if os.geteuid() else 0)) == 0
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", "/dev/shm"], check=True)


def long_temporary(length: int) -> Callable[[], None]:
    def set_it() -> None:
        folder = Path(tempfile.mkdtemp(), "t" * 200)
        folder = Path(str(folder)[:length])
        folder.mkdir()
        os.environ["TMPDIR"], tempfile.tempdir = str(folder), None

    return set_it


def test_shared_memory_is_measured_against_the_batches_that_lie_there() -> None:
    """2 workers, 2 batches each of 64 / 2 + 128 samples: 160 × 4 × 150,000 bytes."""
    (said,) = told_under(small_shared_memory, sample=150_000)
    assert said.startswith(
        "fails: 2 DataLoader workers of box fill 92 MiB of /dev/shm with batches, which has 64 free | "
    )
    assert "--shm-size" in said
    assert "data.workers" in said
    assert told_under(small_shared_memory, sample=100_000)[0].startswith("ok: ")
    assert told_under(small_shared_memory, workers=0, sample=150_000)[0].startswith("ok: ")


def test_tmpdir_is_measured_as_a_rank_will_use_it() -> None:
    address: Any = connection.arbitrary_address  # type: ignore[attr-defined]

    def name_fits() -> None:
        long_temporary(71)()
        keep_sockets()
        connection.Listener(address("AF_UNIX"), "AF_UNIX").close()

    def name_does_not() -> None:
        long_temporary(72)()
        keep_sockets()
        with pytest.raises(OSError, match="too long"):
            connection.Listener(address("AF_UNIX"), "AF_UNIX")

    assert told_under(name_fits)[0].startswith("ok: ")
    (said,) = told_under(name_does_not)
    assert said.startswith("fails: TMPDIR on box is 72 bytes long")
    assert said.endswith("| set TMPDIR to a path of at most 71 bytes, or data.workers=0")
    assert told_under(name_does_not, workers=0)[0].startswith("ok: ")


def test_few_descriptors_are_named() -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))

    (said,) = told_under(limit, workers=4)
    assert said.startswith("fails: rank 0 (box) may open 256 files and has ")
    assert said.endswith("| ulimit -n 65536, or set data.workers lower")


def test_few_processes_are_named(tmp_path: Path) -> None:
    """By the user's limit, which does not bind root, and by a control group's."""

    def limit() -> None:
        if os.geteuid() == 0:
            os.setresuid(65534, 65534, 65534)
        resource.setrlimit(resource.RLIMIT_NPROC, (5, 5))

    (said,) = told_under(limit)
    assert said.startswith("fails: 2 DataLoader workers of box come to 16 processes and threads, and ulimit -u leaves ")
    assert "data.workers" in said
    for path, text in {
        "proc/self/cgroup": "3:pids:/job\n0::/box\n",
        "sys/fs/cgroup/pids/job/pids.max": "40\n",
        "sys/fs/cgroup/pids/job/pids.current": "33\n",
        "sys/fs/cgroup/box/pids.max": "max\n",
        "sys/fs/cgroup/box/pids.current": "33\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert free_processes(tmp_path) == [7, "the control group's pids.max"]
