"""What launchers that start ranks on this machine share: restarts, signals that go on to the ranks, the last word."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lockstep.utils.system import stat_fields

ASK_AGAIN = os.EX_TEMPFAIL  # the exit code of ranks that were asked to leave, and have saved
KILL_SECONDS = 29  # torch's engine kills after 30 those that do not heed its SIGTERM; timestamps are whole seconds
MISTAKE = 2  # of the user's: the same command would fail again
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)  # what asks a run to leave


def attempts(run: Callable[[], int], max_restarts: int, ranks: Callable[[], list[int]] | None = None) -> int:
    """Start all ranks, and again after one of them has failed; return 0, its exit code, or 128 + a signal.

    Args:
        run: starts the ranks, waits for their end, says what went wrong, and returns the exit code.
        max_restarts: times that they are started again.
        ranks: the processes that signals go on to; None: all that this one has started.
    """
    for attempt in range(max_restarts + 1):
        signals = Forwarded(ranks or children)
        code = 1
        with signals, contextlib.suppress(Ended):
            code = run()
        collect_heartbeats()
        if signals.first and code not in (0, ASK_AGAIN):
            print(f"stopped by {signal.Signals(signals.first).name}: all ranks have ended", file=sys.stderr)
            return 128 + signals.first
        if code in (0, MISTAKE, ASK_AGAIN) or attempt == max_restarts:
            return code
        print(f"restart {attempt + 1} of max_restarts={max_restarts}, from the newest checkpoint", file=sys.stderr)
    raise AssertionError("unreachable")


class Ended(BaseException):
    """A signal came before there were ranks, or after all that is known to have been."""


class Forwarded:
    """While it is entered, signals to this process go to the ranks.

    Those that ask to leave are passed on once, and the ranks take the time they need to save. A second Ctrl-C kills
    them. Before there are ranks, a signal ends this process as it always would.

    Attributes:
        first: number of the first signal, 0 before there is one.
        launched: whether this attempt has had ranks; said by whoever starts them, if it can. After their end a signal
            does not take their exit code's place.
    """

    launched = False

    def __init__(self, ranks: Callable[[], list[int]]) -> None:
        self.ranks = ranks

    def __enter__(self) -> None:
        Forwarded.launched = False
        self.first, self.at = 0, 0.0
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup stays nohup
        self.before = {number: signal.signal(number, self.forward) for number in heard}

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def forward(self, number: int, frame: Any) -> None:
        ranks = self.ranks()
        if not ranks and not self.launched:
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
                os.kill(rank, signal.SIGCONT)  # one that is stopped could not heed it


def children() -> list[int]:
    """The processes that this one has started: the ranks."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(stat_fields(process)[1]) == os.getpid():
                found.append(int(process.name))
    return found


def show(error: Exception) -> int:
    """Print the root failure of a ChildFailedError once; return its exit code."""
    failures = error.failures  # type: ignore[attr-defined]
    first = min(failure.timestamp for failure in failures.values())

    def order(rank: int) -> tuple[bool, bool, int]:
        """The first to fail, but none that was ended here, by SIGTERM or half a minute later by SIGKILL, nor one that
        only tells of others, if there is any else. Who was killed from outside may be seen later than who tells of it.
        """
        failure = failures[rank]
        ended = failure.exitcode == -signal.SIGKILL and failure.timestamp - first >= KILL_SECONDS
        # lockstep.launch.worker.tell puts the exception's class in front.
        tells = isinstance(failure.message, dict) and failure.message["message"].startswith("WatchdogTimeout: ")
        return ended or failure.exitcode in (-signal.SIGTERM, ASK_AGAIN), tells, failure.timestamp

    rank = min(failures, key=order)
    failure = failures[rank]
    log = f"ranks/{rank}.log"
    if any(each.exitcode == ASK_AGAIN for each in failures.values()) and order(rank)[0]:
        return ASK_AGAIN
    if failure.exitcode < 0:
        where, others = last_heard_of(rank, aborted=failure.exitcode == -signal.SIGABRT)
        text = f"rank {rank} was killed by {failure.signal_name()}{where}; its last words are in {log}"
        print("\n".join([text, *others]), file=sys.stderr)
        return 128 - failure.exitcode
    if isinstance(failure.message, dict):
        text = failure.message["extraInfo"]["py_callstack"].rstrip()
        where, _ = last_heard_of(rank)
        print(text if text.startswith("error: ") else f"rank {rank} failed{where}\n{text}", file=sys.stderr)
    else:
        where, _ = last_heard_of(rank)
        text = f"rank {rank} ended with exit code {failure.exitcode}{where} and said nothing; see {log}"
        print(text, file=sys.stderr)
    return failure.exitcode


def last_heard_of(rank: int, aborted: bool = False) -> tuple[str, list[str]]:
    """What the heartbeats say of a rank that broke; nothing where the run directory is not known here."""
    out = os.environ.get("LOCKSTEP_RUN_DIR")
    if out is None:
        return "", []
    from lockstep.diagnose.verdict import describe_failure

    return describe_failure(Path(out), rank, aborted)


def collect_heartbeats() -> None:
    """Bring what ended ranks have left in this host's memory into the run directory."""
    out = os.environ.get("LOCKSTEP_RUN_DIR")
    if out is not None:
        from lockstep.distributed.host_memory import collect

        collect(Path(out) / "ranks")


def show_cursor() -> None:
    """A killed rank 0 leaves it hidden by its progress display."""
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h")
        sys.stdout.flush()
