"""Processes as a shell starts them, found and waited for: what tests that send signals share."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lockstep.distributed.heartbeat import process_state
from tests.helpers.harness import clean_environment

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def as_a_shell(
    words: list[str], folder: Path, *, stderr: int = subprocess.STDOUT, **environment: str
) -> subprocess.Popen[str]:
    """A command in a session of its own, as a shell starts it: Ctrl-C and the end of its terminal are not ignored, as
    they are in what `&` and nohup start. What it prints is text."""
    return subprocess.Popen(
        words,
        cwd=folder,
        env=clean_environment() | environment,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
        preexec_fn=heed_signals,
    )


def heed_signals() -> None:
    """Undo what the tests themselves may have been started with."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def children(parent: int) -> list[int]:
    """The processes that a process has started, the oldest first: a launcher's are its ranks. (Their numbers begin anew
    after the largest one, so they are no order.)"""
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
    return sorted(found, key=lambda pid: process_state(pid)[1] or 0)


def processes_in(folder: Path) -> list[int]:
    """The processes that work in a folder: a command that was started there, its ranks, their DataLoader workers."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cwd"):
        with suppress(OSError):  # it has ended
            if entry.readlink() == folder:
                found.append(int(entry.parent.name))
    return found


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def wait_until(holds: Callable[[], object], seconds: float = 60) -> None:
    """Raises AssertionError where it does not happen in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def free_port() -> int:
    """Where nobody listens, and below the ports that the kernel hands out to whoever connects meanwhile."""
    while True:
        port = random.SystemRandom().randrange(10000, 32000)  # a test may have seeded the usual one, on each worker
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def start_all(commands: list[list[str]], cwd: Path, variables: list[dict[str, str]] | None = None) -> None:
    """Start commands side by side and wait for all; each must exit 0."""
    extras = variables or [{} for _ in commands]
    processes = [
        subprocess.Popen(
            words, cwd=cwd, env=clean_environment() | extra, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for words, extra in zip(commands, extras, strict=True)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
