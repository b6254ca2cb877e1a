"""A recipe run as a command from within another process: started, followed by its metrics, asked to leave.

Standard library only: the workers of a Ray cluster import it, and need not import torch to hold a pipe.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LEAVE_SECONDS = 120  # for a run that was asked to leave; a checkpoint may be large
# What makes a rank of a process, and what Ray sets for its own workers: neither is the command's that is started here.
NOT_INHERITED = (
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_ MASTER_ LOCKSTEP_ TORCHELASTIC_ "
    "RAY_ PYTHONBREAKPOINT SPT_NOENV"
)
# The kernel tells the command when whoever started it has died, even of kill -9: it then saves and leaves, as it does
# when it is asked to. Set by a process that then becomes the command, because code between fork and exec may find any
# lock taken by a thread that the fork did not copy.
BECOME = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG, linux/prctl.h
if os.getppid() != int(sys.argv[1]):
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, [])
os.execv(sys.argv[2], sys.argv[2:])
"""


def environment(current: Mapping[str, str]) -> dict[str, str]:
    """Variables for a command that is typed, so to speak, by a process that is a rank or a worker of Ray's itself."""
    prefixes = tuple(NOT_INHERITED.split())
    return {name: value for name, value in current.items() if not name.startswith(prefixes)}


class Failed(Exception):
    """The command ended with an exit code other than 0; its text is what it said last."""


class Command:
    """`python -m recipes.NAME WORDS out=OUT`, in a session of its own.

    Args:
        recipe: its module.
        words: the overrides.
        out: its run directory; what the command says goes into a file beside it.
        folder: the working directory.
        variables: instead of this process's own where they differ; None: not set.
    """

    def __init__(
        self, recipe: str, words: list[str], out: Path, folder: str, variables: Mapping[str, str | None]
    ) -> None:
        self.out = out
        self.log = out.parent / f"{out.name}.log"
        merged = {**environment(os.environ), **variables}
        command = [sys.executable, "-m", recipe, f"out={out}", *words]
        with self.log.open("a") as log:
            self._log_began = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", BECOME, str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=folder,
                env={name: value for name, value in merged.items() if value is not None},
                start_new_session=True,
            )

    def ended(self, seconds: float) -> bool:
        """Whether it has come to its end, waiting for it a while.

        Raises:
            Failed: it has failed.
        """
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        if code:
            raise Failed(self._last_words() or f"ended with exit code {code} and said nothing")
        return True

    def leaves(self) -> bool:
        """Have it save and end, and wait for that; False where it had ended already."""
        if self.process.poll() is not None:
            return False
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # its ranks end with it
            self.process.wait()
        return True

    def _last_words(self) -> str:
        with self.log.open(errors="replace") as log:
            log.seek(self._log_began)
            said = [line.strip() for line in log if line.strip() and not line.startswith("to go on: ")]
        errors = [line for line in said if line.startswith("error: ")]
        return (errors or said or [""])[-1]


class Record:
    """`trials/N.json`: what a trial runs with, and what has become of it: running, finished, stopped or failed.

    Args:
        folder: where it is.
        number: the trial's.
        words: the overrides of its command.
        values: those of them that were drawn.
    """

    def __init__(self, folder: Path, number: int, words: list[str], values: dict[str, Any]) -> None:
        self.path, self.out = folder / f"{number}.json", folder / str(number)
        self.content = {"number": number, "words": words, "values": values, "state": "running", "problem": ""}
        self.before = json.loads(self.path.read_text()) if self.path.exists() else {}

    def has_ended(self) -> bool:
        """Whether this very trial has come to its end before."""
        if self.before.get("words") != self.content["words"] or self.before["state"] not in ("finished", "failed"):
            return False
        self.content = self.before
        return True

    def start(self) -> Path:
        """Begin it, or go on with it; return its run directory.

        The search may have been killed before it had noted this trial. If it then draws another one for the same
        number, what the first has left is set aside.
        """
        if self.before and self.before["words"] != self.content["words"] and self.out.exists():
            self.out.rename(self.out.with_name(f"{self.out.name}.{os.getpid()}.aside"))
        self.change(state="running")
        return self.out

    def change(self, **values: str) -> None:
        """Note something, in one piece."""
        self.content |= values
        self.path.parent.mkdir(exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(self.content, indent=2) + "\n")
        temporary.replace(self.path)


def metrics(out: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics.jsonl; none where it has not begun."""
    with contextlib.suppress(OSError, ValueError):
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines(True) if line[-1] == "\n"]
    return []


def evaluations(lines: list[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Those lines that say how good the model is, numbered from 1 as `evaluations`."""
    return [line | {"evaluations": number} for number, line in enumerate((x for x in lines if metric in x), start=1)]
