"""What every benchmark here has in common: commands that take turns, ratios of one round, and the table.

A benchmark is a module with `rows(arguments) -> list[Row]` that ends in `common.main(__doc__, rows)`. Its contestants
take turns, so that whatever else the machine does meets all of them alike, and each round gives one ratio. What is
reported is the median of the ratios with the smallest and the largest.

    python -m benchmarks          all of them, one table, and bench.json
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import resource
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
CLOCK = Path(__file__).with_name("contestants") / "clock"
TICK = struct.Struct("dd")


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name: what is divided by what, as `steps/s: recipes.ddp / bare loop`.
        ratios: one a round; none where one of the two does not run, and then `note` says why.
        target: what the median is to reach; None: it is there to be known.
        at_most: the median is to stay below the target instead.
        note: what else is to be said, as absolute figures.
        command: repeats it; `main` fills it in.
    """

    name: str
    ratios: Sequence[float]
    target: float | None = None
    at_most: bool = False
    note: str = ""
    command: str = ""

    @property
    def median(self) -> float | None:
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def met(self) -> bool | None:
        """Whether the target is met here; None: there is none."""
        if self.target is None or not self.ratios:
            return None
        median = statistics.median(self.ratios)
        return median <= self.target if self.at_most else median >= self.target


@dataclass(frozen=True)
class Command:
    """A command: with this Python where the first word is `-m` or a script.

    Attributes:
        folder: where it runs.
        environment: variables on top of this process's.
    """

    words: Sequence[Any]
    folder: Path | str = ROOT
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def line(self) -> list[str]:
        words = [str(word) for word in self.words]
        return [sys.executable, *words] if words[0] == "-m" or words[0].endswith(".py") else words

    def start(self, said: IO[str], ticks: Path | None = None) -> subprocess.Popen[str]:
        """Start it; its output goes into `said`, and its clocks (contestants/clock) write into the folder `ticks`."""
        paths = [str(CLOCK) if ticks else "", str(ROOT), os.environ.get("PYTHONPATH", "")]
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **self.environment}
        if ticks:
            variables["BENCHMARK_TICKS"] = str(ticks)
        return subprocess.Popen(self.line, cwd=self.folder, env=variables, stdout=said, stderr=said, text=True)

    def failed(self, code: int, said: IO[str]) -> RuntimeError:
        """The error that says how it ended, with the end of what it said."""
        said.seek(0)
        lines = said.read().splitlines()
        # The program's own word, which torchrun's summary may have pushed far up.
        errors = [line for line in lines if re.search(r"\b\w+Error: .", line)]
        text = "\n".join([*lines[-15:], *errors[-1:]])
        return RuntimeError(f"{' '.join(self.line)} ended with {code}:\n{text}")


class Tick(NamedTuple):
    """An update of a process: when, by time.perf_counter(), and its CPU seconds by then, on all its threads."""

    moment: float
    cpu: float


@dataclass(frozen=True)
class Ran:
    """A command that has ended well.

    Attributes:
        seconds: from its start to its end.
        cpu_seconds: computed by it and all its children, on any core.
        began: when it was started, by time.perf_counter().
        ranks: the updates of each process that trained.
        clock: (updates that are the warm-up, updates that count).
    """

    seconds: float
    cpu_seconds: float
    began: float
    ranks: Sequence[Sequence[Tick]]
    clock: tuple[int, int]

    def step(self, of: Callable[[list[float]], float] = statistics.fmean) -> float:
        """Seconds of a step, from update to update, the mean over ranks of their mean or of what else of them."""
        return statistics.fmean(
            of([after.moment - before.moment for before, after in itertools.pairwise(ticks)])
            for ticks in self._counted()
        )

    @property
    def cpu_a_step(self) -> float:
        """CPU seconds of a step, of all ranks together."""
        return sum(ticks[-1].cpu - ticks[0].cpu for ticks in self._counted()) / self.clock[1]

    @property
    def first_step(self) -> float:
        """Seconds from the command's start to the end of the first step, of the slowest rank."""
        return max(ticks[0].moment for ticks in self.ranks) - self.began

    def _counted(self) -> list[Sequence[Tick]]:
        warm, steps = self.clock
        return [ticks[warm - 1 : warm + steps] for ticks in self.ranks]


def run(
    words: Sequence[Any],
    folder: Path | str = ROOT,
    environment: Mapping[str, str] | None = None,
    clock: tuple[int, int] | None = None,
    expected: int = 0,
) -> Ran:
    """Run a command to its end.

    Args:
        words, folder, environment: as Command has them.
        clock: have every process that trains tell how long its steps take: (so many not counted, so many counted).
        expected: the exit code that is no failure.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    command = Command(words, folder, environment or {})
    with tempfile.TemporaryDirectory() as ticks, tempfile.TemporaryFile("w+") as said:
        before, began = _spent_by_children(), time.perf_counter()
        code = command.start(said, Path(ticks) if clock else None).wait()
        seconds, cpu_seconds = time.perf_counter() - began, _spent_by_children() - before
        if code != expected:
            raise command.failed(code, said)
        return Ran(seconds, cpu_seconds, began, read_ticks(Path(ticks)), clock or (0, 0))


def read_ticks(folder: Path) -> list[list[Tick]]:
    """The updates so far of each process whose clock writes into a folder."""
    written = [path.read_bytes() for path in sorted(folder.iterdir())]
    whole = [data[: len(data) // TICK.size * TICK.size] for data in written]
    return [[Tick(*tick) for tick in TICK.iter_unpack(data)] for data in whole]


def _spent_by_children() -> float:
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


@dataclass(frozen=True)
class Share:
    """What a command did in the time that it was let run: steps a second, and CPU seconds per step of all its ranks."""

    speed: float
    cpu_a_step: float


def in_slices(
    commands: Mapping[str, Command], *, ranks: int, warm: int, slices: int = 20, seconds: float = 0.3
) -> dict[str, Share]:
    """{name: what it did in its turns}: all commands live at once, and all but one of them stand still.

    A machine whose cores are shared with others can change its speed by half from one second to the next. Whoever take
    turns of a fraction of a second meet the same machine, however it changes. In the end the commands are killed: give
    them steps enough.

    Args:
        ranks: processes of each command that train.
        warm: updates before a command's first slice.
        slices: of each command.
        seconds: of a slice; many steps long.

    Raises:
        RuntimeError: one ended early, or failed.
    """
    live: dict[str, Live] = {}
    with contextlib.ExitStack() as stack:
        for name, command in commands.items():
            live[name] = stack.enter_context(Live(command))
            live[name].begin(ranks, warm)
        turns = {name: partial(each.run, seconds) for name, each in live.items()}
        windows = in_turn(turns, slices, quiet=True)
        return {name: each.share(each.stretches(windows[name])) for name, each in live.items()}


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


class Live:
    """A command that is alive, and runs only when it is told to."""

    def __init__(self, command: Command) -> None:
        self._command = command

    def __enter__(self) -> Live:
        self._stack = contextlib.ExitStack()
        self._ticks = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._said = self._stack.enter_context(tempfile.TemporaryFile("w+"))
        self._process = self._command.start(self._said, self._ticks)
        return self

    def __exit__(self, *_: object) -> None:
        self._whole = self._tree()
        self._all(signal.SIGSTOP)  # or a launcher could begin to clean up
        self._all(signal.SIGKILL)
        self._process.wait()
        while any(map(_runs, self._whole)):
            time.sleep(0.01)  # its ranks are nobody's children any more
        self._stack.close()

    def begin(self, ranks: int, warm: int) -> None:
        """Wait until so many ranks have made so many updates, and stop them."""
        while len(updates := read_ticks(self._ticks)) < ranks or min(map(len, updates)) < warm:
            time.sleep(0.1)
            self._check()
        self._whole = self._tree()
        self._all(signal.SIGSTOP)

    def run(self, seconds: float, number: int) -> tuple[float, float]:
        """Let it run for a while; (the beginning, the end)."""
        self._check()
        began = time.perf_counter()
        self._all(signal.SIGCONT)
        time.sleep(seconds)
        self._all(signal.SIGSTOP)
        return began, time.perf_counter()

    def stretches(self, windows: Sequence[tuple[float, float]]) -> list[list[list[Tick]]]:
        """Each rank's updates in each window."""
        self._check()
        ran = read_ticks(self._ticks)
        return [[[tick for tick in rank if began <= tick.moment <= ended] for rank in ran] for began, ended in windows]

    @staticmethod
    def share(stretches: Sequence[Sequence[Sequence[Tick]]]) -> Share:
        """Of some stretches, from the first update of each to its last."""
        ranks = [[rank for rank in each if len(rank) > 1] for each in zip(*stretches, strict=True)]
        steps = [sum(len(part) - 1 for part in parts) for parts in ranks]
        passed = [sum(part[-1].moment - part[0].moment for part in parts) for parts in ranks]
        spent = [sum(part[-1].cpu - part[0].cpu for part in parts) for parts in ranks]
        cpu = sum(seconds / count for seconds, count in zip(spent, steps, strict=True))
        return Share(sum(steps) / sum(passed), cpu)

    def _check(self) -> None:
        code = self._process.poll()
        if code:
            raise self._command.failed(code, self._said)
        if code == 0:
            raise RuntimeError(f"{' '.join(self._command.line)} ended before its last turn: give it more steps")

    def _tree(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return [first := psutil.Process(self._process.pid), *first.children(recursive=True)]
        return []

    def _all(self, number: int) -> None:
        for one in self._whole:
            with contextlib.suppress(ProcessLookupError):  # it has ended; _check says so
                os.kill(one.pid, number)


def torchrun(script: Path | str, nproc: int, *words: Any) -> list[str]:
    """The words for `run` that start a script's ranks by torchrun."""
    name = ["-m", str(script)] if isinstance(script, str) else [str(script)]
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    return [*start, *name, *(str(word) for word in words)]


def in_turn(
    contestants: Mapping[str, Callable[[int], T]], rounds: int, warm: int = 0, quiet: bool = False
) -> dict[str, list[T]]:
    """{name: what the contestant returned, a round}, all of them once a round; each round begins with another one.

    Args:
        contestants: called with the number of the round.
        warm: rounds before, that fill the caches and are not counted.
        quiet: do not say on stderr who had its turn.
    """
    found: dict[str, list[T]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(warm + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            result = contestants[name](number)
            if not quiet:
                seconds = time.perf_counter() - started
                print(f"{number + 1}/{warm + rounds} {name}: {seconds:.0f} s", file=sys.stderr, flush=True)
            if number >= warm:
                found[name].append(result)
    return found


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Of each round, the first by the second."""
    return [a / b for a, b in zip(above, below, strict=True)]


def main(doc: str | None, rows: Callable[[argparse.Namespace], list[Row]], rounds: int = 5, **options: Any) -> None:
    """Be a benchmark's command: measure, show the table, write it where --json says.

    Args:
        doc: the module's docstring.
        rounds: what --rounds is unless told.
        options: further options, by name: {"default": …, "help": …}, as argparse's add_argument takes them.
    """
    parser = argparse.ArgumentParser(description=(doc or "").strip().splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds, help=f"how often all take their turn ({rounds})")
    parser.add_argument("--json", type=Path, help="write the rows into this file as well")
    for name, option in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **option)
    arguments = parser.parse_args()
    spec = sys.modules["__main__"].__spec__
    words = [word for word in sys.argv[1:] if word != "--json" and word != str(arguments.json)]
    command = " ".join(["python -m", spec.name if spec else "?", *words])
    found = [replace(row, command=row.command or command) for row in rows(arguments)]
    show(found)
    if arguments.json:
        write(found, arguments.json)


def show(rows: Sequence[Row]) -> None:
    """The table."""
    table = Table("", "ratio", "range", "target", "", "", box=None, padding=(0, 1))
    for row in rows:
        sign = "≤" if row.at_most else "≥"
        target = f"{sign} {row.target:g}" if row.target is not None else ""
        verdict = {True: "[green]met[/]", False: "[red]not met[/]", None: ""}[row.met]
        median = "" if row.median is None else f"{row.median:.2f}"
        span = f"{min(row.ratios):.2f} to {max(row.ratios):.2f}" if row.ratios else ""
        table.add_row(Text(row.name), median, span, target, verdict, Text(row.note))  # no markup in what programs say
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(table)
    for command in dict.fromkeys(row.command for row in rows):
        console.print(f"repeat: {command}", markup=False, soft_wrap=True)


def write(rows: Sequence[Row], path: Path) -> None:
    """The rows as JSON: a list of objects with Row's attributes, `median` and `met`."""
    found = [asdict(row) | {"ratios": list(row.ratios), "median": row.median, "met": row.met} for row in rows]
    path.write_text(json.dumps(found, indent=1) + "\n")


def read(path: Path) -> list[Row]:
    """What `write` has written."""
    found = json.loads(path.read_text())
    return [Row(**{name: value for name, value in row.items() if name not in ("median", "met")}) for row in found]
