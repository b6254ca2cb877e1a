"""Ray for as long as a search lasts: its own one on this machine, of which nothing stays, or an existing cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from lockstep.distributed.rendezvous import is_listening
from lockstep.distributed.signals import SIGNALS
from lockstep.errors import UserError

OBJECT_STORE = 200 * 2**20  # bytes; Ray would take a third of the memory, for objects that there are none of here
RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "SPT_NOENV": "1",  # else some give themselves a title where their environment is, by which the reaper knows them
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a trial without GPUs of Ray's sees what this process sees
    "RAY_kill_child_processes_on_worker_exit": "false",  # the kernel asks them to save and leave: recipe_process.py
    "RAY_AIR_NEW_OUTPUT": "0",  # the other one speaks even when it is told not to
    "RAY_memory_monitor_refresh_ms": "0",  # it would kill workers, which hold no memory to speak of
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # signals have one owner, and it is not Tune
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # before its first evaluation a trial has none
    "TUNE_GLOBAL_CHECKPOINT_S": "2",
    "TUNE_MAX_PENDING_TRIALS_PG": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
# Ends with the process that started it, whatever that dies of, and then removes what Ray has left: its helpers would
# stay for another minute, and its folder for ever. All of them have the folder's name in their environment.
REAPER = """
import os, shutil, signal, sys, time
from pathlib import Path
def found():
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"LOCKSTEP_RAY={sys.argv[1]}\\0".encode() in entry.read_bytes():
                yield int(entry.parent.name)
        except OSError:
            pass
sys.stdin.read()
while left := list(found()):  # until there are none: one of them may have started another while it was looked for
    for process in left:
        try:
            os.kill(process, signal.SIGKILL)
        except OSError:
            pass
    time.sleep(0.1)
shutil.rmtree(sys.argv[1], ignore_errors=True)
"""


@contextlib.contextmanager
def ray_session(cpus: int, gpus: int, address: str | None) -> Iterator[None]:
    """Ray for as long as this lasts.

    Args:
        cpus, gpus: that it shall hand out on this machine.
        address: of a cluster that is there already, and hands out its own; None: Ray is started here.

    Raises:
        UserError: the cluster refuses this process.
    """
    reaper = None
    os.environ.update(RAY_SETTINGS)
    if not address and "RAY_AUTH_MODE" not in os.environ:
        # Nobody else on this machine may use this Ray; left to itself it would keep a token in the home directory.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    import ray

    logging.getLogger("ray").setLevel(logging.CRITICAL)
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    try:
        if address:
            try:
                ray.init(address=address, **common)
            except ConnectionError as error:
                raise UserError(
                    f"tune.address={address}: {str(error).splitlines()[0]}; start it with ray start --head, and if it "
                    "asks for a token, set RAY_AUTH_MODE=token, as for any program of Ray's"
                ) from None
        else:
            # Sockets lie in it, whose paths are at most 107 characters long; a run directory's may be longer.
            folder = tempfile.mkdtemp(prefix="ray-", dir=None if len(tempfile.gettempdir()) <= 30 else "/tmp")
            words = [sys.executable, "-I", "-S", "-c", REAPER, folder]
            reaper = subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True)
            os.environ["LOCKSTEP_RAY"] = folder
            ray.init(
                address="local",
                num_cpus=cpus,
                num_gpus=gpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE,
                _temp_dir=folder,
                **common,
            )
        for number in SIGNALS:  # Ray has taken SIGTERM for itself; the run's listener hears all of them
            signal.signal(number, lambda *_: None)
        yield
    finally:
        ray.shutdown()
        if reaper:
            reaper.communicate()


def check_ray_address(address: str | None) -> None:
    """Hold tune.address to what Ray can connect to."""
    if address in (None, "auto"):
        return
    host, _, port = str(address).rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise UserError(f"tune.address={address}: allowed are auto, and HOST:PORT of a cluster's head node")
    if not is_listening(host, int(port), 1):
        raise UserError(f"tune.address={address}: nothing answers there; start it with ray start --head --port={port}")
