"""Starts the ranks of one machine with torchrun's own engine, in this process.

The same as `torchrun --standalone --nproc-per-node=N -m TARGET`, but the first failing rank's traceback is all that is
shown, and the exit code is that rank's. Source: https://docs.pytorch.org/docs/stable/elastic/run.html
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from typing import Any


def launch(target: str, environment: Mapping[str, str], *, nproc: int) -> int:
    """Run `nproc` ranks of `target` to their end; return 0, the failing rank's exit code, or 128 + a signal.

    Args:
        target: a module name, started as `python -m target`, or the path of a script.
        environment: variables for every rank, besides torchrun's own.
        nproc: ranks to start, numbered from 0.
    """
    os.environ.update(environment)
    # torch 2.15's restarted gloo ranks otherwise find the dead ranks' addresses in the agent's store and hang on them.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "5")  # seconds from passing a signal on to killing ranks
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    command = [target] if target.endswith(".py") else ["-m", target]
    with tempfile.TemporaryDirectory(prefix="lockstep-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=os.path.basename(folder),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # port 0: any free one, so runs side by side never meet
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            **signals_of(LaunchConfig),
        )
        logging.disable(logging.ERROR)  # the agent would report each failure on its own as well
        try:
            elastic_launch(config, sys.executable)("-u", *command)
        except ChildFailedError as error:
            return show(error)
        except SignalException as stopped:
            name = signal.Signals(stopped.sigval).name
            print(f"stopped by {name}: all ranks have ended", file=sys.stderr)
            return 128 + int(stopped.sigval)
        finally:
            logging.disable(logging.NOTSET)
            if sys.stdout.isatty():
                sys.stdout.write("\x1b[?25h")  # a killed rank 0 leaves the cursor hidden by its progress display
                sys.stdout.flush()
    return 0


def signals_of(config: type) -> dict[str, Any]:
    """LaunchConfig's choice of signals, where torch has it, without those that are ignored here: nohup stays nohup."""
    if not any(field.name == "signals_to_handle" for field in fields(config)):
        return {}
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
    heard = [name for name in names if signal.getsignal(getattr(signal, name)) != signal.SIG_IGN]
    return {"signals_to_handle": ",".join(heard)}


def show(error: Exception) -> int:
    """Print the root failure of a ChildFailedError once; return its exit code."""
    failures = error.failures  # type: ignore[attr-defined]

    def order(rank: int) -> tuple[bool, int]:
        """The first to fail, but none that the agent itself ended: a rank that only lost another one waits before it
        says so, and a stopped one is killed only after the others have complained."""
        return failures[rank].exitcode == -signal.SIGTERM, failures[rank].timestamp

    rank = min(failures, key=order)
    failure = failures[rank]
    log = f"ranks/{rank}.log"
    if failure.exitcode < 0:
        print(f"rank {rank} was killed by {failure.signal_name()}; its last words are in {log}", file=sys.stderr)
        return 128 - failure.exitcode
    if isinstance(failure.message, dict):
        text = failure.message["extraInfo"]["py_callstack"].rstrip()
        print(text if text.startswith("error: ") else f"rank {rank} failed\n{text}", file=sys.stderr)
    else:
        print(f"rank {rank} ended with exit code {failure.exitcode} and said nothing; see {log}", file=sys.stderr)
    return failure.exitcode
