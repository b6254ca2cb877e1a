"""What a thousand ranks cost where they meet: this suite's own check-in, heartbeats and hang messages, without training.

    python -m benchmarks.scale [--ranks 64 256 1024] [--seconds 5]

A host is a forked process, its eight ranks are threads, and each has a real client of one real TCPStore. They check in,
take steps of half a second, then the last one stands still, another waits for it in vain, and all leave with the
verdict. Nothing of this is a copy: it is what `lockstep.launch.worker` calls, but for the process group and training.

Of the check-in: `join s` until all are there, `ops` of the store per rank (the mean, and rank 0's), and `kB` that the
store has sent by then. Of the steps: `files` in the run's ranks/, and writes per second to it by all ranks. Of the hang:
`hang s` until all have the verdict, operations per rank (the mean, and those of rank 1, which asks), lines and bytes of
the verdict. The last line says by what factor each has grown from the first row to the last.
"""

from __future__ import annotations

import argparse
import base64
import multiprocessing
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch is loaded
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")  # torch asks a name server who connects

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from lockstep.diagnose.watchdog import Watchdog, WatchdogTimeout
from lockstep.distributed.devices import agree_on_devices
from lockstep.distributed.environment import Place
from lockstep.distributed.heartbeat import TRAINING, WAITING, Heartbeat
from lockstep.distributed.rendezvous import check_in, open_store

LOCAL = "127.0.0.1"
RANKS_PER_HOST = 8
STEP_SECONDS = 0.5  # of a large model's step
TIMEOUT = 300.0  # seconds in which all must be there
MOST_ASKED = 4096  # emulated ranks on one machine


@dataclass
class Cost:
    """What a part of a rank's life has cost: calls of the store, and bytes that it sent."""

    operations: int = 0
    received: int = 0


COUNTED: list[dist.Store] = []


class Counted(dist.Store):
    """A store that counts what is asked of it."""

    def __init__(self, store: Any, cost: Cost) -> None:
        super().__init__()
        self._inner, self.cost = store, cost
        COUNTED.append(self)  # a PrefixStore keeps only its C++ half alive

    def clone(self) -> Counted:
        return Counted(self._inner.clone(), self.cost)

    def set_timeout(self, timeout: timedelta) -> None:
        self._inner.set_timeout(timeout)


def counted(name: str) -> Callable[..., Any]:
    """A method of Counted."""

    def ask(store: Counted, *words: Any) -> Any:
        found = getattr(store._inner, name)(*words)
        store.cost.operations += 1
        values = found if isinstance(found, list) else [found]
        store.cost.received += sum(len(value) if isinstance(value, bytes) else 8 for value in values)
        return found

    return ask


for operation in ("set", "get", "add", "compare_set", "check", "wait", "multi_get", "multi_set"):
    setattr(Counted, operation, counted(operation))


@dataclass
class Measured:
    """What one rank, or all of them, have seen."""

    rank: int
    checked_in: float = 0.0  # when, by time.monotonic()
    met: Cost = field(default_factory=Cost)
    stayed: Cost = field(default_factory=Cost)
    ended: Cost = field(default_factory=Cost)
    asked_for: float = 0.0  # seconds until it had the verdict, of the rank that asks
    left: float = 0.0
    verdict: str = ""
    hosts: int = 0


@dataclass
class Figures:
    """A line of the table; of `operations`, the ranks' mean, without rank 0."""

    ranks: int
    check_in: float
    operations: float
    operations_0: int
    bytes_sent: int
    files: int
    writes: float
    hang: float
    hang_operations: float
    hang_operations_1: int
    verdict: str


class Writes:
    """Counts this process's writes below a folder: by pwrite, or when a file is opened for it."""

    def __init__(self, folder: Path) -> None:
        self.count, prefix, write = 0, str(folder), os.pwrite

        def positioned(file: int, data: Any, offset: int) -> int:
            self.count += os.readlink(f"/proc/self/fd/{file}").startswith(prefix)
            return write(file, data, offset)

        def heard(event: str, words: tuple[Any, ...]) -> None:
            if event == "open" and isinstance(words[2], int) and words[2] & (os.O_WRONLY | os.O_RDWR):
                self.count += str(words[0]).startswith(prefix)

        os.pwrite = positioned
        sys.addaudithook(heard)


def tell(rank: int, size: int, what: str) -> None:
    """Rank 0 says how far all are."""
    if rank == 0:
        print(f"{size:,} ranks: {what}", file=sys.stderr, flush=True)


def be_rank(rank: int, size: int, port: int, folder: Path, seconds: float, all_here: Any, go: Any) -> Measured:
    """One emulated rank, from its first connection to its end."""
    mine, cost = Measured(rank), Cost()
    place = Place(rank, size, LOCAL, port, agent_store=False, attempt=0)
    go.wait()
    store: dist.Store = Counted(open_store(place, TIMEOUT), cost)
    store, hosts, *_ = check_in(store, rank, size, TIMEOUT, served_by_rank_0=True)
    agree_on_devices(store, rank, hosts, rank % RANKS_PER_HOST, "cpu", "gloo", TIMEOUT)
    mine.checked_in, mine.hosts, mine.met = time.monotonic(), len(set(hosts)), Cost(**vars(cost))
    heartbeat, told = Heartbeat(folder, rank), threading.Event()
    verdicts: list[WatchdogTimeout] = []

    def end(verdict: WatchdogTimeout) -> None:
        verdicts.append(verdict)
        told.set()

    watchdog = Watchdog(heartbeat, folder, store, size, TIMEOUT, end=end, say=print)
    all_here.wait()
    tell(rank, size, "all have met, and take steps")
    for step in range(round(seconds / STEP_SECONDS)):
        heartbeat.enter(WAITING, step)
        heartbeat.enter(TRAINING)
        time.sleep(STEP_SECONDS)
    mine.stayed = Cost(**vars(cost))
    if rank == size - 1:
        watchdog.close("")  # from here on nothing answers for it, as where a host is lost
        told.set()
    all_here.wait()
    tell(rank, size, "the last one stands still")
    if rank == 1:
        asked = time.monotonic()
        verdicts.append(watchdog.ask(RuntimeError("Timed out waiting 300000ms for recv operation to complete")))
        mine.asked_for = time.monotonic() - asked
    else:
        told.wait()
    mine.left, mine.ended = time.monotonic(), Cost(**vars(cost))
    mine.verdict = str(verdicts[0]) if verdicts else ""
    watchdog.close("")
    tell(rank, size, "the verdict is there")
    all_here.wait()  # rank 0 serves the store
    heartbeat.close()
    return mine


def be_host(host: int, size: int, port: int, folder: Path, seconds: float, all_here: Any, go: Any, found: Any) -> None:
    """A forked process: eight ranks, and the name of a host of its own."""
    socket.gethostname = lambda: f"node{host:04d}"
    writes, measured = Writes(folder), []
    ranks = range(host * RANKS_PER_HOST, min(size, (host + 1) * RANKS_PER_HOST))

    def live(rank: int) -> None:
        measured.append(be_rank(rank, size, port, folder, seconds, all_here, go))

    threads = [threading.Thread(target=live, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.put((writes.count, measured))
    found.close()
    found.join_thread()
    os._exit(0)


def measure(size: int, seconds: float) -> Figures:
    """Run `size` emulated ranks on this machine.

    Raises:
        RuntimeError: a host ended before its time; it has said why.
    """
    fork = multiprocessing.get_context("fork")
    hosts = -(-size // RANKS_PER_HOST)
    all_here, go, found = fork.Barrier(size), fork.Event(), fork.Queue()
    with socket.create_server((LOCAL, 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as out:
        folder = Path(out) / "ranks"
        folder.mkdir()
        arguments = (size, port, folder, seconds, all_here, go, found)
        processes = [fork.Process(target=be_host, args=(host, *arguments), daemon=True) for host in range(hosts)]
        for process in processes:
            process.start()
        began = time.monotonic()
        go.set()
        told = [found.get(timeout=4 * TIMEOUT) for _ in processes]
        files = sum(1 for _ in folder.iterdir())
    ranks = sorted((each for _, some in told for each in some), key=lambda each: each.rank)
    first, others, middle = ranks[0], ranks[1:], ranks[2:-1]
    return Figures(
        size,
        max(each.checked_in for each in ranks) - began,
        sum(each.met.operations for each in others) / len(others),
        first.met.operations,
        sum(each.met.received for each in others),
        files,
        sum(count for count, _ in told) / seconds,
        ranks[1].asked_for + max(each.left - ranks[1].left for each in ranks),
        sum(each.ended.operations - each.stayed.operations for each in middle) / len(middle),
        ranks[1].ended.operations - ranks[1].stayed.operations,
        ranks[1].verdict,
    )


COLUMNS: dict[str, Callable[[Figures], float]] = {
    "ranks": lambda f: f.ranks,
    "join s": lambda f: f.check_in,
    "ops": lambda f: f.operations,
    "of 0": lambda f: f.operations_0,
    "kB": lambda f: f.bytes_sent / 1e3,
    "files": lambda f: f.files,
    "writes/s": lambda f: f.writes,
    "hang s": lambda f: f.hang,
    "its ops": lambda f: f.hang_operations,
    "of 1": lambda f: f.hang_operations_1,
    "lines": lambda f: len(f.verdict.splitlines()),
    "bytes": lambda f: len(f.verdict),
}


def growth_table(found: Sequence[Any], columns: Mapping[str, Callable[[Any], float]]) -> Table:
    """A line per number of ranks, and what each column has grown by."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for each in found:
        table.add_row(*(f"{say(each):,.0f}" if say(each) >= 100 else f"{say(each):.3g}" for say in columns.values()))
    if len(found) > 1:
        ends = [(say(found[0]), say(found[-1])) for say in columns.values()]
        table.add_row(*(f"x{last / first:.3g}" if first else "" for first, last in ends), style="bold")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024], help="64 256 1024; at most 4096")
    parser.add_argument("--seconds", type=float, default=5, help="for which they take steps: 5")
    arguments = parser.parse_args()
    if wrong := [size for size in arguments.ranks if not 2 * RANKS_PER_HOST <= size <= MOST_ASKED]:
        parser.error(f"--ranks {wrong[0]}: allowed are {2 * RANKS_PER_HOST} to {MOST_ASKED}")
    torch.set_num_threads(1)
    base64.b85decode(b"")  # makes its table, which threads would find half made
    found = []
    for size in arguments.ranks:
        found.append(measure(size, arguments.seconds))
        print(found[-1].verdict, file=sys.stderr)
        seconds = f"all have met after {found[-1].check_in:.1f} s, the lost one is named after {found[-1].hang:.1f} s"
        tell(0, size, seconds)
    Console(width=80, highlight=False).print(growth_table(found, COLUMNS))


if __name__ == "__main__":
    main()
