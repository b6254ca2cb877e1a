"""Ranks as children of this process, started by torch.multiprocessing: copies of it, or fresh interpreters.

A copy (fork) has loaded everything that this process has, so it is there at once where an interpreter needs
seconds to import torch; but CUDA cannot be used in it. What a child then does is what any other way of starting leads
to: torchrun's variables in its environment, and the target run as if it had been typed.
"""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.resource_tracker
import os
import runpy
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch.multiprocessing
from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ErrorHandler, ProcessFailure

from lockstep.launchers.local import SIGNALS, Forwarded, show, show_cursor

POLL_SECONDS = 0.1  # between two looks at who has ended
NOTICE_SECONDS = 0.3  # in which ranks find out by themselves that another one is gone
SAVE_SECONDS = 30.0  # for those that were asked to leave, and for what the kernel does at their end
Failed = dict[int, tuple[int, int]]  # {local rank: (pid, exit code)}


def attempt(begin: Callable[[str, str, int], Failed], target: str, folder: str, *, first: int = 0) -> int:
    """Start the ranks once and wait for their end; return 0, or the failing rank's exit code when its words are shown.

    Args:
        begin: called with the arguments that `be_a_rank` takes besides a rank's variables.
        target: a module name, or the path of a script.
        folder: where the attempts keep the ranks' last words, a folder an attempt, as an agent of torchrun's would.
        first: the number of this machine's first rank.
    """
    errors = Path(folder, str(len(os.listdir(folder))))
    errors.mkdir()
    logging.disable(logging.ERROR)  # torch and Lightning would report a failure on their own as well
    try:
        failed = begin(target, str(errors), os.getpid())
    finally:
        logging.disable(logging.NOTSET)
        show_cursor()
    failures = {
        first + local: ProcessFailure(local, pid, code, error_file(str(errors), local))
        for local, (pid, code) in failed.items()
    }
    return show(ChildFailedError("ranks", failures)) if failures else 0


def open_store() -> TCPStore:
    """Where the ranks of one machine meet: held by this process, so that runs side by side never race for a port."""
    store = loopback_store()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": f"127.0.0.1:{store.port}"}
    return store


def loopback_store() -> TCPStore:
    """A store on a free port that no other machine can reach; torch's own would listen on all interfaces."""
    listening = socket.create_server(("127.0.0.1", 0))
    port, minute = listening.getsockname()[1], timedelta(seconds=60)
    options: dict[str, Any] = {"is_master": True, "wait_for_workers": False, "master_listen_fd": listening.detach()}
    return TCPStore("127.0.0.1", port, timeout=minute, **options)


def start(function: Callable[..., Any], args: tuple[Any, ...], nproc: int, method: str) -> Failed:
    """Call `function(local rank, *args)` in `nproc` new processes, wait; return who failed.

    Signals are held back until the ranks can hear them. A rank ends by its exit code and returns nothing.
    """
    if method == "spawn":  # its helper, once started, lets some signals through again
        multiprocessing.resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the ranks inherit it; their Listener lifts it
    try:
        with warnings.catch_warnings():
            # Python warns of any thread; the one there is here serves the store, and holds no lock of Python's.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            started = torch.multiprocessing.start_processes(
                function, args=args, nprocs=nproc, join=False, start_method=method
            )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return end_of(started.processes)


def end_of(processes: list[Any]) -> Failed:
    """Wait until all have ended, or one has failed and the others were ended; return who failed.

    With patience: torch's own would end the others before they have noticed that one is gone.
    """
    Forwarded.launched = True
    while None in (codes := [process.exitcode for process in processes]) and not any(codes):
        # Not without end: what tells of a death is a pipe, which the dead rank's DataLoader workers may keep open.
        wait([process.sentinel for process, code in zip(processes, codes, strict=True) if code is None], POLL_SECONDS)
    failed = {rank: (process.pid, process.exitcode) for rank, process in enumerate(processes) if process.exitcode}
    for seconds, end in ((NOTICE_SECONDS, "terminate"), (SAVE_SECONDS, "kill"), (SAVE_SECONDS, "")):
        deadline = time.monotonic() + seconds
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if end and process.is_alive():
                getattr(process, end)()
    return failed


def ranks() -> list[int]:
    """The ranks that this process has started and that have not ended."""
    return [child.pid for child in multiprocessing.active_children() if child.pid]


def error_file(errors: str, local_rank: int) -> str:
    """Where a rank leaves its traceback; an agent's folder holds a folder an attempt, and that one a folder a rank."""
    return str(Path(errors, str(local_rank), "error.json"))


def be_a_rank(variables: dict[str, str], target: str, errors: str, launcher: int) -> None:
    """In the new process: tell the target who it is, and run it.

    Args:
        variables: torchrun's, for this rank.
    """
    if os.getppid() != launcher:
        os._exit(1)  # it was killed meanwhile
    logging.disable(logging.NOTSET)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a copy has the launcher's handler
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ |= variables
    file = Path(error_file(errors, int(variables["LOCAL_RANK"])))
    file.parent.mkdir()
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(file)
    try:
        run(target)
    except Exception as error:  # the program could not even be imported: a rank's own errors it tells itself
        ErrorHandler().record_exception(error)
        os._exit(1)


def run(target: str) -> None:
    """As `python -m target`, or `python target`, in this process."""
    if target.endswith(".py"):
        sys.path.insert(0, os.path.dirname(target))
        runpy.run_path(target, run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
