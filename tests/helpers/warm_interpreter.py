"""Commands as copies of a Python that has loaded torch and lockstep: most of a short command's time is that loading.

A copy gets the command's words, folder, environment and streams, and runs it as `python -m NAME` or `python FILE` does:
under the name __main__, in a process of its own, to its own exit code. What a copy cannot be asked about is the
interpreter's start itself, its own command line and hash seed among it; `command(..., fresh=True)` starts a fresh one.
"""

from __future__ import annotations

import atexit
import faulthandler
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
LOADED = (
    "lockstep.launch.cli",
    "lockstep.config.compose",
    "lockstep.launchers.torchrun",
    "hydra.main",
    "sklearn.datasets",
    "torch._dynamo",
    "torchmetrics",
    "torchvision.models",
)
# Read when libraries are loaded, or when Python starts: whoever sets one of them needs a fresh interpreter.
EARLY = ("PYTHON", "OMP_", "MKL_", "KMP_", "LD_", "MALLOC_", "TORCH_", "CUDA_", "TMPDIR")
# scikit-learn puts these into the environment of whoever imports it, such as a test's module: they say nothing.
OF_LIBRARIES = ("KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK")
START = dict(os.environ)
LARGEST = 2**17  # bytes of a request
SHOW = signal.SIGRTMIN + 5  # a copy that hangs is asked where it is by this


class Warm:
    """The process that is copied; it ends when the one that has made it does."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.warm_interpreter", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            cwd=ROOT,
            env=environment,
        )
        theirs.close()

    def run(
        self, words: list[str], folder: Path, environment: dict[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """What subprocess.run would return for `python WORDS`; what that leaves behind is not waited for.

        Raises:
            subprocess.TimeoutExpired: it took longer, and was killed; a note has what it said, and where its threads were.
        """
        with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
            request = json.dumps([words, str(folder), environment]).encode()
            try:
                code = self._copy(request, [stdout.fileno(), stderr.fileno()], timeout)
            except BaseException:  # an answer may still come, which must not be the next command's
                interpreter.cache_clear()
                self._process.kill()
                raise
            said = []
            for stream in (stdout, stderr):
                stream.seek(0)
                said.append(stream.read())
        if code is None:
            hung = subprocess.TimeoutExpired(words, timeout, *said)
            hung.add_note("".join(said))
            raise hung
        return subprocess.CompletedProcess(words, code, *said)

    def _copy(self, request: bytes, files: list[int], timeout: float) -> int | None:
        """Its exit code, or None: it was killed."""
        self._line.settimeout(None)
        socket.send_fds(self._line, [request], files)
        pid = int(self._line.recv(LARGEST))
        self._line.settimeout(timeout)
        try:
            return int(self._line.recv(LARGEST))
        except TimeoutError:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, SHOW)
                time.sleep(0.5)
                os.kill(pid, signal.SIGKILL)
        self._line.settimeout(None)
        self._line.recv(LARGEST)
        return None


@cache
def interpreter(emulated: tuple[tuple[str, str], ...] = ()) -> Warm:
    """This process's, or the one that has loaded the emulated GPUs: any number of them, of any size."""
    environment = START | dict(emulated)
    if emulated:
        environment.pop("CUDA_VISIBLE_DEVICES", None)
    return Warm(environment)


def interpreter_for(words: list[str], environment: dict[str, str]) -> Warm | None:
    """The one whose copy does what a fresh interpreter would; None where there is none."""
    if words[0] != "-m" and not words[0].endswith(".py"):
        return None
    if "EMULATED_GPUS" in environment:
        early = {name: environment[name] for name in ("LD_PRELOAD", "PYTHONPATH", "EMULATED_GPUS")}
        mine, asked = early_of(START | early), early_of(environment)
        for each in (mine, asked):
            each.pop("CUDA_VISIBLE_DEVICES", None)  # read when it is asked for
        return interpreter(tuple(sorted((early | {"EMULATED_GPUS": "1"}).items()))) if mine == asked else None
    return interpreter() if early_of(environment) == early_of(START) else None


def early_of(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(EARLY) and name not in OF_LIBRARIES}


def serve(line: socket.socket) -> None:
    """Make copies, one after the other, until nobody asks any more."""
    for name in LOADED:
        importlib.import_module(name)
    while True:
        request, files, _, _ = socket.recv_fds(line, LARGEST, 2)
        if not request:
            return
        pid = os.fork()
        if pid == 0:
            line.close()
            words, folder, environment = json.loads(request)
            become(words, folder, environment, files)
        for file in files:
            os.close(file)
        line.send(str(pid).encode())
        line.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())


def become(words: list[str], folder: str, environment: dict[str, str], files: list[int]) -> NoReturn:
    """Be `python WORDS`."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, file in enumerate([nothing, *files]):
        os.dup2(file, number)
        os.close(file)
    faulthandler.register(SHOW, all_threads=True)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    code = 1
    try:
        if words[0] == "-m":
            sys.argv, sys.path[0] = ["-m", *words[2:]], folder
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = words, str(Path(folder, words[0]).parent)
            runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # to take torch apart takes a second


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
