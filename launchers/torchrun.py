"""Starts the ranks of one machine as torchrun does, from this process.

The same as `torchrun --standalone --nproc-per-node=N -m TARGET`, but the first failing rank's traceback is all that is
shown, the exit code is that rank's, and a signal goes on to the ranks, which save and leave instead of being killed.

With start=spawn torchrun's own engine starts an interpreter a rank. Its agents would meet in a store that listens on all
interfaces and unpickle what they find there; here there is one agent, whose store nobody but this machine can reach, and
nothing in it is unpickled. With start=fork, which CPU ranks have unless told
otherwise, the ranks are copies of this process, and torch is imported once, not once more in each of them.
Source: https://docs.pytorch.org/docs/stable/elastic/run.html
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

from lockstep.launchers.local import attempts, show, show_cursor
from lockstep.utils.temporary import own_folder

STARTS = ("spawn", "fork")  # what config.start may say


def launch(
    target: str, environment: Mapping[str, str], *, nproc: int, max_restarts: int = 0, start: str = "spawn"
) -> int:
    """Run `nproc` ranks of `target` to their end; return 0, the failing rank's exit code, or 128 + a signal.

    Args:
        target: a module name, started as `python -m target`, or the path of a script.
        environment: variables for every rank, besides torchrun's own.
        nproc: ranks to start, numbered from 0.
        max_restarts: times that all ranks are started again after one of them has failed.
        start: spawn, or fork.
    """
    os.environ.update(environment)
    if start == "fork":
        from lockstep.launchers.children import ranks

        # Kept through all attempts: ranks started by hand note their run directory in it.
        with own_folder() as folder:
            return attempts(lambda: copy(target, nproc, folder), max_restarts, ranks)
    # Each attempt is an agent of its own, with max_restarts=0 and a store of its own: the engine's restart would also
    # bring back ranks that were asked to leave, and new ranks would find dead ones' addresses in the store.
    return attempts(lambda: run(target, nproc), max_restarts)


def copy(target: str, nproc: int, folder: str) -> int:
    """One attempt with copies of this process; return as `launch` does."""
    from lockstep.launchers import children

    store = children.open_store()
    code = children.attempt(lambda *whom: children.start(be_a_copy, (nproc, *whom), nproc, "fork"), target, folder)
    del store
    return code


def be_a_copy(local_rank: int, nproc: int, *whom: Any) -> None:
    """In the copy: torchrun's variables on a single machine."""
    from lockstep.launchers import children

    number, count = str(local_rank), str(nproc)
    variables = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    children.be_a_rank(variables | {"GROUP_RANK": "0"}, *whom)


def run(target: str, nproc: int) -> int:
    """One attempt with torchrun's engine; return as `launch` does."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from lockstep.launchers.loopback import BACKEND, AloneOnLoopback

    rendezvous_handler_registry.register(BACKEND, AloneOnLoopback)
    command = [target] if target.endswith(".py") else ["-m", target]
    with own_folder() as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=os.path.basename(folder),
            rdzv_backend=BACKEND,
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            signals_to_handle="",  # ours are; the engine's would end the ranks without waiting for them
        )
        logging.disable(logging.ERROR)  # the agent would report each failure on its own as well
        try:
            elastic_launch(config, sys.executable)("-u", *command)
        except ChildFailedError as error:
            return show(error)
        finally:
            logging.disable(logging.NOTSET)
            show_cursor()
    return 0
