"""What launchers.lightning needs of Lightning itself, which takes seconds to import."""

from __future__ import annotations

import logging
import multiprocessing.resource_tracker
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch.multiprocessing
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, SLURMEnvironment
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ErrorHandler, ProcessFailure

from launchers.local import SIGNALS, show, show_cursor

NOTICE_SECONDS = 0.3  # in which ranks find out by themselves that another one is gone
SAVE_SECONDS = 30.0  # for those that were asked to leave, and for what the kernel does at their end


class Numbered(DDPStrategy):
    """Numbers the ranks and leaves the rest to them: the process group and the device."""

    def setup_environment(self) -> None:
        self._set_world_ranks()

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        if isinstance(self._launcher, _MultiProcessingLauncher):
            self._launcher = Launcher(self, start_method=self._start_method)  # type: ignore[arg-type]


class Launcher(_MultiProcessingLauncher):
    """Lightning's, with signals held back until the ranks can hear them, and with patience.

    A rank ends by its exit code and returns nothing, for which Lightning's would wait for ever; and it ends the others
    at once, before they have noticed that one is gone.
    """

    def launch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[int, tuple[int, int]]:
        """Call `function` in every rank, wait; return {local rank: (pid, exit code)} of who failed first."""
        if self._start_method == "spawn":  # its helper, once started, lets some signals through again
            multiprocessing.resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the ranks inherit it; their Listener lifts it
        try:
            started = torch.multiprocessing.start_processes(
                self._wrapping_function,
                args=(function, args, kwargs, None),
                nprocs=self._strategy.num_processes,  # type: ignore[attr-defined]
                join=False,
                start_method=self._start_method,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return end_of(started.processes)


def end_of(processes: list[Any]) -> dict[int, tuple[int, int]]:
    """Wait until all have ended, or one has failed and the others were ended; return as Launcher.launch does."""
    while running := [process.sentinel for process in processes if process.is_alive()]:
        wait(running)
        if any(process.exitcode for process in processes):
            break
    failed = {rank: (process.pid, process.exitcode) for rank, process in enumerate(processes) if process.exitcode}
    for seconds, end in ((NOTICE_SECONDS, "terminate"), (SAVE_SECONDS, "kill"), (SAVE_SECONDS, "")):
        deadline = time.monotonic() + seconds
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if end and process.is_alive():
                getattr(process, end)()
    return failed


def strategy(environment: ClusterEnvironment, nproc: int, nodes: int, method: Any) -> Numbered:
    """Assembled by Fabric, for `nproc` ranks on each of `nodes`; which devices they take is their own affair."""
    chosen = Numbered(cluster_environment=environment, start_method=method)
    Fabric(accelerator="cpu", strategy=chosen, devices=nproc, num_nodes=nodes)
    return chosen


def contract(numbered: Numbered) -> dict[str, str]:
    """torchrun's variables for this process, from Lightning's answers."""
    environment = numbered.cluster_environment
    assert environment is not None
    return {
        "RANK": str(numbered.global_rank),
        "WORLD_SIZE": str(numbered.world_size),
        "LOCAL_RANK": str(numbered.local_rank),
        "LOCAL_WORLD_SIZE": str(numbered.num_processes),
        "GROUP_RANK": str(numbered.node_rank),
        "MASTER_ADDR": environment.main_address,
        "MASTER_PORT": str(environment.main_port),
    }


def ranks() -> list[int]:
    """The ranks that this process has started and that have not ended."""
    return [child.pid for child in multiprocessing.active_children() if child.pid]


def start(target: str, nproc: int, nodes: int, method: str, folder: str) -> int:
    """One attempt; return as `launchers.lightning.launch` does."""
    attempt = Path(folder, str(len(os.listdir(folder))))
    attempt.mkdir()
    store = None
    if nodes == 1:  # this process holds the store where they meet, so that runs side by side never race for a port
        store = TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False)
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "NODE_RANK": "0"}
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    os.environ["TORCHELASTIC_RUN_ID"] = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    os.environ.pop("LOCAL_RANK", None)
    logging.disable(logging.ERROR)  # torch and Lightning would report a failure on their own as well
    try:
        numbered = strategy(LightningEnvironment(), nproc, nodes, method)
        threads = os.environ.get("OMP_NUM_THREADS")
        assert numbered.launcher is not None
        failed = numbered.launcher.launch(be_a_rank, numbered, target, str(attempt), os.getpid(), threads)
    finally:
        logging.disable(logging.NOTSET)
        show_cursor()
        del store
    first = numbered.node_rank * nproc  # the number of this machine's first rank
    failures = {
        first + local: ProcessFailure(local, pid, code, error_file(attempt, local))
        for local, (pid, code) in failed.items()
    }
    return show(ChildFailedError("ranks", failures)) if failures else 0


def error_file(attempt: Path, local_rank: int) -> str:
    """Where a rank leaves its traceback; an agent's folder holds a folder an attempt, and that one a folder a rank."""
    return str(attempt / str(local_rank) / "error.json")


def be_a_rank(numbered: Numbered, target: str, attempt: str, launcher: int, threads: str | None) -> None:
    """In the new process: tell the target who it is, and run it."""
    if os.getppid() != launcher:
        os._exit(1)  # it was killed meanwhile
    logging.disable(logging.NOTSET)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a copy has the launcher's handler
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    numbered.setup_environment()
    os.environ |= contract(numbered)
    file = Path(error_file(Path(attempt), numbered.local_rank))
    file.parent.mkdir()
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(file)
    if threads is None:  # Lightning has set it; ranks count their threads themselves
        os.environ.pop("OMP_NUM_THREADS", None)
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


def under_slurm(tasks_per_node: int) -> dict[str, str]:
    """torchrun's variables for this task of srun's."""
    environment = SLURMEnvironment(auto_requeue=False)
    numbered = strategy(environment, tasks_per_node, int(os.environ["SLURM_NNODES"]), "popen")
    threads = os.environ.get("OMP_NUM_THREADS")
    assert numbered.launcher is not None
    numbered.launcher.launch(numbered.setup_environment)  # srun has started all: it checks their numbers, starts none
    if threads is None:
        os.environ.pop("OMP_NUM_THREADS", None)
    return contract(numbered)
