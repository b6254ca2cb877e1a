"""Starts the ranks of one machine with torchrun's own engine, in this process.

The same as `torchrun --standalone --nproc-per-node=N -m TARGET`, but the first failing rank's traceback is all that is
shown, the exit code is that rank's, and a signal goes on to the ranks, which save and leave instead of being killed.
Source: https://docs.pytorch.org/docs/stable/elastic/run.html
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ASK_AGAIN = os.EX_TEMPFAIL  # the exit code of ranks that were asked to leave, and have saved
MISTAKE = 2  # of the user's: the same command would fail again


def launch(target: str, environment: Mapping[str, str], *, nproc: int, max_restarts: int = 0) -> int:
    """Run `nproc` ranks of `target` to their end; return 0, the failing rank's exit code, or 128 + a signal.

    Args:
        target: a module name, started as `python -m target`, or the path of a script.
        environment: variables for every rank, besides torchrun's own.
        nproc: ranks to start, numbered from 0.
        max_restarts: times that all ranks are started again after one of them has failed.
    """
    os.environ.update(environment)
    # torch 2.15's restarted gloo ranks otherwise find the dead ranks' addresses in the agent's store and hang on them.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # Each attempt is an agent of its own, with max_restarts=0: the engine's restart would also bring back ranks that
    # were asked to leave.
    for attempt in range(max_restarts + 1):
        signals = Forwarded()
        code = 1
        with signals, contextlib.suppress(Ended):
            code = run(target, nproc)
        if signals.first and code not in (0, ASK_AGAIN):
            print(f"stopped by {signal.Signals(signals.first).name}: all ranks have ended", file=sys.stderr)
            return 128 + signals.first
        if code in (0, MISTAKE, ASK_AGAIN) or attempt == max_restarts:
            return code
        print(f"restart {attempt + 1} of max_restarts={max_restarts}, from the newest checkpoint", file=sys.stderr)
    raise AssertionError("unreachable")


class Ended(BaseException):
    """A signal came before there were ranks, or after."""


class Forwarded:
    """While it is entered, signals to this process go to the ranks.

    Those that ask to leave are passed on once, and the ranks take the time they need to save. A second Ctrl-C kills
    them. Before there are ranks, a signal ends this process as it always would.

    Attributes:
        first: number of the first signal, 0 before there is one.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

    def __enter__(self) -> None:
        self.first, self.at = 0, 0.0
        heard = [number for number in self.SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup stays nohup
        self.before = {number: signal.signal(number, self.forward) for number in heard}

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def forward(self, number: int, frame: Any) -> None:
        ranks = children()
        if not ranks:
            self.first = self.first or number
            raise Ended
        if not self.first:
            self.first, self.at = number, time.monotonic()
            # A rank has no use for SIGHUP: the terminal has gone, the reason to save is the same.
            self.send(ranks, signal.SIGTERM if number == signal.SIGHUP else number)
        elif number == signal.SIGINT and time.monotonic() - self.at > 0.3:
            self.send(ranks, signal.SIGKILL)

    @staticmethod
    def send(ranks: list[int], number: int) -> None:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, number)


def children() -> list[int]:
    """The processes that this one has started: the ranks."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = stat.read_text().rpartition(")")[2].split()[1]
            if int(parent) == os.getpid():
                found.append(int(stat.parent.name))
    return found


def run(target: str, nproc: int) -> int:
    """One attempt; return as `launch` does."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
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
            signals_to_handle="",  # ours are; the engine's would end the ranks without waiting for them
        )
        logging.disable(logging.ERROR)  # the agent would report each failure on its own as well
        try:
            elastic_launch(config, sys.executable)("-u", *command)
        except ChildFailedError as error:
            return show(error)
        finally:
            logging.disable(logging.NOTSET)
            if sys.stdout.isatty():
                sys.stdout.write("\x1b[?25h")  # a killed rank 0 leaves the cursor hidden by its progress display
                sys.stdout.flush()
    return 0


def show(error: Exception) -> int:
    """Print the root failure of a ChildFailedError once; return its exit code."""
    failures = error.failures  # type: ignore[attr-defined]

    def order(rank: int) -> tuple[bool, int]:
        """The first to fail, but none that the agent itself ended: a rank that only lost another one waits before it
        says so, and a stopped one is killed only after the others have complained."""
        return failures[rank].exitcode in (-signal.SIGTERM, ASK_AGAIN), failures[rank].timestamp

    rank = min(failures, key=order)
    failure = failures[rank]
    log = f"ranks/{rank}.log"
    if any(each.exitcode == ASK_AGAIN for each in failures.values()) and order(rank)[0]:
        return ASK_AGAIN
    if failure.exitcode < 0:
        print(f"rank {rank} was killed by {failure.signal_name()}; its last words are in {log}", file=sys.stderr)
        return 128 - failure.exitcode
    if isinstance(failure.message, dict):
        text = failure.message["extraInfo"]["py_callstack"].rstrip()
        print(text if text.startswith("error: ") else f"rank {rank} failed\n{text}", file=sys.stderr)
    else:
        print(f"rank {rank} ended with exit code {failure.exitcode} and said nothing; see {log}", file=sys.stderr)
    return failure.exitcode
