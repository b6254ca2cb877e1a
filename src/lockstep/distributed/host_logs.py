"""Where a rank's log is: in the run directory, or on its host until it is known whether anybody will want it.

    ranks/<rank>.log                     rank 0's, each host's first rank's, and those of ranks that did not end well
    TMPDIR/lockstep-UID-…/<rank>.log     of other ranks, where a run has many: a thousand files that almost always have
                                         nothing to say would be too many for a shared file system

A log that is on its host is brought to the run directory when its rank fails: by the rank itself, or, where it was killed,
by whoever sums up the heartbeats of its host (lockstep.distributed.host_memory). No torch in here.
"""

from __future__ import annotations

import contextlib
import os
from functools import partial
from pathlib import Path

from lockstep.distributed.host_memory import bring_log, enter, folders, is_own, remove_if_left
from lockstep.utils import temporary
from lockstep.utils.files import append

MOST_LOGS = 64  # ranks up to which logs=auto keeps all logs in the run directory
_on_host: dict[int, Path] = {}  # {process: its log, where that is on the host}


def kept_on_hosts(logs: str, hosts: list[str]) -> set[int]:
    """The ranks whose logs are kept on their hosts.

    Args:
        logs: the run's `logs`: all, first, or auto.
        hosts: the host of each rank.
    """
    if logs == "all" or (logs == "auto" and len(hosts) <= MOST_LOGS):
        return set()
    first = {host: rank for rank, host in reversed(list(enumerate(hosts)))}
    return set(range(len(hosts))) - set(first.values())


def begin_log(ranks: Path, rank: int, logs: str, hosts: list[str]) -> Path:
    """This rank's log from here on.

    Args:
        ranks: the run's ranks/.
    """
    if rank in kept_on_hosts(logs, hosts):
        for folder in folders(ranks)[-1:]:  # TMPDIR: what somebody prints without end must not fill the host's memory
            with contextlib.suppress(OSError):  # no room here: the run directory has some
                lock = enter(folder, ranks)
                bring_log(folder / f"{rank}.log", ranks)  # of an attempt that was killed
                temporary.do_at_the_end(partial(remove_if_left, folder, lock, ranks))
                _on_host[os.getpid()] = folder / f"{rank}.log"
    return own_log(ranks, rank)


def own_log(ranks: Path, rank: int) -> Path:
    """The log of the rank that this process is."""
    return _on_host.get(os.getpid(), ranks / f"{rank}.log")


def end_log(ranks: Path, rank: int, text: str) -> None:
    """Add the last words of a rank that failed, and bring its log to the run directory."""
    append(own_log(ranks, rank), text)
    if log := _on_host.pop(os.getpid(), None):
        bring_log(log, ranks)


def find_log(ranks: Path, rank: int) -> Path:
    """A rank's log as far as this host can see it: the one that is still on the host, else the run directory's."""
    here = (folder / f"{rank}.log" for folder in folders(ranks) if is_own(folder))
    return next((log for log in here if log.exists()), ranks / f"{rank}.log")
