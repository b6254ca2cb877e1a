"""What every benchmark here has in common: commands that take turns, ratios of one round, and the table.

A benchmark is a module with `rows(arguments) -> list[Row]` that ends in `common.main(__doc__, rows)`. Its contestants
take turns, so that whatever else the machine does meets all of them alike, and each round gives one ratio. What is
reported is the median of the ratios with the smallest and the largest.

    python -m benchmarks          all of them, one table, and bench.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
CLOCK = Path(__file__).with_name("contestants") / "clock"


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
class Ran:
    """A command that has ended well.

    Attributes:
        seconds: from its start to its end.
        cpu_seconds: computed by it and all its children, on any core.
        began: when it was started, by time.time().
        told: what the clock told (contestants/clock), in the order in which it did.
    """

    seconds: float
    cpu_seconds: float
    began: float
    told: Sequence[dict[str, float]]

    def step(self, of: str) -> float:
        """Seconds of a step, the mean over ranks: `mean` or `median` of the wall clock."""
        return statistics.fmean(line[of] for line in self.told if of in line)

    @property
    def cpu_a_step(self) -> float:
        """CPU seconds of a step, of all ranks together."""
        return sum(line["cpu_a_step"] for line in self.told if "cpu_a_step" in line)

    @property
    def first_step(self) -> float:
        """Seconds from the command's start to the end of the first step, of the slowest rank."""
        return max(line["first_step"] for line in self.told if "first_step" in line) - self.began


def run(
    words: Sequence[str | Path],
    folder: Path | str = ROOT,
    environment: Mapping[str, str] | None = None,
    clock: tuple[int, int] | None = None,
) -> Ran:
    """Run a command to its end, with this Python where the first word is `-m` or a script.

    Args:
        environment: variables on top of this process's.
        clock: have every process that trains tell how long its steps take: (so many not counted, so many counted).

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    command = [str(word) for word in words]
    if command[0] == "-m" or command[0].endswith(".py"):
        command = [sys.executable, *command]
    paths = [str(CLOCK) if clock else "", str(ROOT), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **(environment or {})}
    with tempfile.NamedTemporaryFile("r") as told:
        if clock:
            variables |= {"BENCHMARK_STEPS": f"{clock[0]}:{clock[1]}", "BENCHMARK_FILE": told.name}
        before, began, started = _spent_by_children(), time.time(), time.perf_counter()
        done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
        seconds, cpu_seconds = time.perf_counter() - started, _spent_by_children() - before
        if done.returncode:
            said = (done.stdout + done.stderr).splitlines()
            # The program's own word, which torchrun's summary may have pushed far up.
            errors = [line for line in said if re.search(r"\b\w+Error: .", line)]
            text = "\n".join([*said[-15:], *errors[-1:]])
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{text}")
        return Ran(seconds, cpu_seconds, began, [json.loads(line) for line in told])


def _spent_by_children() -> float:
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def torchrun(script: Path | str, nproc: int, *words: Any) -> list[str]:
    """The words for `run` that start a script's ranks by torchrun."""
    name = ["-m", str(script)] if isinstance(script, str) else [str(script)]
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    return [*start, *name, *(str(word) for word in words)]


def in_turn(contestants: Mapping[str, Callable[[int], T]], rounds: int, warm: int = 0) -> dict[str, list[T]]:
    """{name: what the contestant returned, a round}, all of them once a round; each round begins with another one.

    Args:
        contestants: called with the number of the round.
        warm: rounds before, that fill the caches and are not counted.
    """
    found: dict[str, list[T]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(warm + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            result = contestants[name](number)
            print(
                f"{number + 1}/{warm + rounds} {name}: {time.perf_counter() - started:.0f} s",
                file=sys.stderr,
                flush=True,
            )
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
