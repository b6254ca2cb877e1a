"""A recipe run as a command from within another process: started, followed by its metrics, asked to save and end.

Standard library only: the workers of a Ray cluster import it, and need not import torch to hold a pipe.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

STOP_SECONDS = 120  # for a run that was asked to save and end; a checkpoint may be large
SAVING_SECONDS = 60  # for a run that a killed start has left behind, and that is saving
# What makes a rank of a process, and what Ray sets for its own workers: neither is the command's that is started here.
NOT_INHERITED = (
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_ MASTER_ LOCKSTEP_ TORCHELASTIC_ "
    "RAY_ OMPI_ PMI_ PMIX_ MV2_ MPI_LOCAL JSM_ PALS_ FLUX_ PYTHONBREAKPOINT SPT_NOENV"
)
# The kernel tells the command when whoever started it has died, even of kill -9: it then saves and leaves, as it does
# when it is asked to. Set by a process that then becomes the command, because code between fork and exec may find any
# lock taken by a thread that the fork did not copy.
BECOME_COMMAND = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG, linux/prctl.h
if os.getppid() != int(sys.argv[1]):
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, [])
os.execv(sys.argv[2], sys.argv[2:])
"""


def command_environment(current: Mapping[str, str]) -> dict[str, str]:
    """Variables for a command that is typed, so to speak, by a process that is a rank or a worker of Ray's itself."""
    prefixes = tuple(NOT_INHERITED.split())
    return {name: value for name, value in current.items() if not name.startswith(prefixes)}


class RecipeFailed(Exception):
    """The command ended with an exit code other than 0; its text is what it said last."""


class CommandProcess:
    """A command as a process, in a session of its own; it is asked to end when this process has died.

    Args:
        command: its words; the first is a path.
        log: the file that what it says is added to.
        folder: the working directory.
        variables: instead of this process's own where they differ; None: not set.
    """

    def __init__(self, command: list[str], log: Path, folder: str, variables: Mapping[str, str | None]) -> None:
        self.log = log
        merged = {**command_environment(os.environ), **variables}
        # As lockstep.utils.files.no_link.
        with open(
            log, "a", encoding="utf-8", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW, 0o666)
        ) as file:
            self._log_began = file.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", BECOME_COMMAND, str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                cwd=folder,
                env={name: value for name, value in merged.items() if value is not None},
                start_new_session=True,
            )

    def stop(self, seconds: float) -> bool:
        """Ask it to end, and wait until it has, so long before it is killed; False where it had ended already."""
        if self.process.poll() is not None:
            return False
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # its ranks end with it
            self.process.wait()
        return True

    def said(self) -> list[str]:
        """The lines of its log, without empty ones."""
        with self.log.open(errors="replace", encoding="utf-8") as log:
            log.seek(self._log_began)
            return [line.rstrip() for line in log if line.strip()]


class RecipeProcess(CommandProcess):
    """`python -m recipes.NAME WORDS out=OUT` as a process, in a session of its own.

    Args:
        recipe: its module, or the path of its file.
        words: the overrides.
        out: its run directory; what the command says goes into a file beside it.
        folder, variables: as CommandProcess's.
    """

    def __init__(
        self, recipe: str, words: list[str], out: Path, folder: str, variables: Mapping[str, str | None]
    ) -> None:
        self.out = out
        command = [sys.executable, *([] if recipe.endswith(".py") else ["-m"]), recipe, f"out={out}", *words]
        super().__init__(command, out.parent / f"{out.name}.log", folder, variables)

    def ended(self, seconds: float) -> bool:
        """Whether it has come to its end, waiting for it a while.

        Raises:
            RecipeFailed: it has failed.
        """
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        if code:
            raise RecipeFailed(self._last_words() or f"ended with exit code {code} and said nothing")
        return True

    def stop(self, seconds: float = STOP_SECONDS) -> bool:
        """Ask it to save and end, and wait until it has; False where it had ended already."""
        return super().stop(seconds)

    def _last_words(self) -> str:
        said = [line.strip() for line in self.said() if not line.startswith("to resume: ")]
        errors = [line for line in said if line.startswith("error: ")]
        return (errors or said or [""])[-1]
