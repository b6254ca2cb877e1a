"""Processes as a shell starts them, found and waited for: what tests that send signals share."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.helpers.harness import clean_environment


def as_a_shell(
    words: list[str], folder: Path, *, stderr: int = subprocess.STDOUT, **environment: str
) -> subprocess.Popen[str]:
    """A command in a session of its own, as a shell starts it: with Ctrl-C not ignored. What it prints is text."""
    return subprocess.Popen(
        words,
        cwd=folder,
        env=clean_environment() | environment,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def children(parent: int) -> list[int]:
    """The processes that a process has started, in the order of their numbers: a launcher's are its ranks."""
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
    return sorted(found)


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
