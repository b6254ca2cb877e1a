"""What runs on the same work tell of each other: rows of figures, sentences in words, tables for a terminal.

A row is a recipe on a number of ranks, over all its rounds: each figure is the median of the rounds. Ratios are taken
round by round, between runs that met the same machine at about the same time, and then their median.

**Scaling is strong scaling**: the global batch, and so the work of a step, is the same for every number of ranks. A row
is set against one row: `single` where it is there, else the same recipe on its fewest ranks. `speedup` is images/s over
that row's. `efficiency` is the speedup over how many times as many devices it has: GPUs; on a machine without, the
cores that its ranks may use. 1 is ideal.

**A step is taken apart** into seconds, as means over the ranks: waiting for data; parts that wait for other parts
(`idle`, of recipes that cut the model); communication that is exposed, during which the rank computes nothing; and the
rest, which is compute. Where a recipe reports idle parts, their waits for each other are idle and not communication.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from lockstep.utils.text import count, mebibytes

Result = dict[str, Any]  # a run's result.json, and `start_seconds`
NOTABLE = 0.05  # share of a step
SHOWN = 4  # ranks whose figures are listed; of more, the least and the most


@dataclass(frozen=True)
class Case:
    """A recipe on a number of ranks.

    Attributes:
        number: of `unit`: ranks, or what one process has instead of them: replicas.
        devices: GPUs, or CPU cores, that it may use.
        words: what its command is told beside its folder.
        profile: steps that torch.profiler records, in all rounds but the first of several: it takes memory.
    """

    recipe: str
    number: int
    devices: int
    words: tuple[str, ...] = ()
    unit: str = "rank"
    profile: int = 0

    @property
    def name(self) -> str:
        """Its folders' names begin so."""
        return f"{self.recipe}-{self.number}"

    @property
    def label(self) -> str:
        """`ddp on 2 ranks`, and `single`, which there is but one of."""
        if self.recipe == "single":
            return self.recipe
        return f"{self.recipe} {'with' if self.unit == 'replica' else 'on'} {count(self.number, self.unit)}"


@dataclass
class Row:
    """A case's figures; None, or nothing, where none of its runs has them. Lists are in rank order."""

    recipe: str
    label: str
    ranks: int
    devices: int
    rounds: int
    images_per_second: float
    slowest: float
    fastest: float
    step_seconds: float
    step_seconds_p95: float
    against: str | None = None
    speedup: float | None = None
    speedup_from: float | None = None
    speedup_to: float | None = None
    efficiency: float | None = None
    communication_seconds: float | None = None  # a step, mean over ranks
    exposed_seconds: float | None = None
    exposed_share: float | None = None
    data_wait_share: float | None = None
    idle_shares: list[float] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)  # seconds of a step, by what they went to
    memory_bytes: list[float] = field(default_factory=list)
    memory_imbalance: float | None = None
    state_bytes: list[float] = field(default_factory=list)
    cores_busy: float | None = None  # over all ranks
    main_threads_busy: float | None = None
    threads_busy: float | None = None
    accuracy: float | None = None
    start_seconds: float | None = None
    folders: list[str] = field(default_factory=list)


def comparison_rows(found: dict[Case, list[Result]], folders: dict[Case, list[str]]) -> list[Row]:
    """A row for each case that has a run; `found` has the results by round."""
    return [comparison_row(case, found, folders.get(case, [])) for case, results in found.items() if results]


def comparison_row(case: Case, found: dict[Case, list[Result]], folders: list[str]) -> Row:
    """One case's figures, and what they are against its baseline's."""
    results = found[case]
    speeds = [result["images_per_second"] for result in results]
    step = statistics.median(result["step_seconds_p50"] for result in results)
    plain = [result for result in results if not result.get("profiled_steps")] or results
    memory = across(plain, "peak_by_device") or across(plain, "peak_memory_bytes_by_rank")
    idle = across(results, "idle_shares")
    waits = mean(across(results, "data_wait_share_by_rank"))
    exposed = mean(across(results, "exposed_communication_seconds_by_rank"))
    busy = across(results, "cores_busy_by_rank")
    threads = [result["thread_seconds"] / result["forward_seconds"] for result in results if "thread_seconds" in result]
    accuracies = [result["eval_accuracy"] for result in results if result.get("eval_accuracy") is not None]
    starts = [result["start_seconds"] for result in results if result.get("start_seconds") is not None]
    made = Row(
        recipe=case.recipe,
        label=case.label,
        ranks=case.number,
        devices=case.devices,
        rounds=len(results),
        images_per_second=statistics.median(speeds),
        slowest=min(speeds),
        fastest=max(speeds),
        step_seconds=step,
        step_seconds_p95=statistics.median(result["step_seconds_p95"] for result in results),
        communication_seconds=mean(across(results, "communication_seconds_by_rank")),
        exposed_seconds=exposed,
        exposed_share=None if exposed is None else exposed / step,
        data_wait_share=waits,
        idle_shares=idle,
        parts=taken_apart(step, waits, mean(idle), exposed),
        memory_bytes=memory,
        memory_imbalance=max(memory) / statistics.mean(memory) if memory else None,
        state_bytes=across(results, "state_bytes_by_rank"),
        cores_busy=sum(busy) if busy else None,
        main_threads_busy=mean(across(results, "main_thread_busy_by_rank")),
        threads_busy=statistics.median(threads) if threads else None,
        accuracy=statistics.median(accuracies) if accuracies else None,
        start_seconds=statistics.median(starts) if starts else None,
        folders=folders,
    )
    base = baseline(case, found)
    if base is not None:
        # Round by round: both may have been slow in one of them.
        theirs = [result["images_per_second"] for result in found[base]]
        ratios = [mine / other for mine, other in zip(speeds, theirs, strict=False)]
        made.against = base.label
        made.speedup, made.speedup_from, made.speedup_to = statistics.median(ratios), min(ratios), max(ratios)
        made.efficiency = made.speedup / (case.devices / base.devices)
    return made


def baseline(case: Case, found: dict[Case, list[Result]]) -> Case | None:
    """What a case is set against: `single`, else the same recipe on its fewest ranks; None where that is itself."""
    ended = [each for each, results in found.items() if results]
    for some in (
        [each for each in ended if each.recipe == "single"],
        [each for each in ended if each.recipe == case.recipe],
    ):
        if some:
            least = min(some, key=lambda each: each.number)
            return least if least != case else None
    return None


def across(results: list[Result], name: str) -> list[float]:
    """A list by rank that some results have: element by element the median of the rounds."""
    lists = [result[name] for result in results if result.get(name)]
    return [statistics.median(each) for each in zip(*lists, strict=False)]


def mean(values: list[float]) -> float | None:
    return statistics.mean(values) if values else None


def taken_apart(step: float, waits: float | None, idle: float | None, exposed: float | None) -> dict[str, float]:
    """A step's seconds by what they went to; nothing where nothing but its length is known."""
    if waits is None and idle is None and exposed is None:
        return {}
    parts = {"waiting for data": (waits or 0) * step, "idle": (idle or 0) * step}
    parts["exposed communication"] = 0.0 if idle is not None else exposed or 0.0
    rest = max(0.0, step - sum(parts.values()))
    return {"compute": rest} | {name: seconds for name, seconds in parts.items() if seconds}


# In words -----------------------------------------------------------------------------------------------------------


def verdicts(rows: list[Row]) -> list[str]:
    """The figures as sentences, the most important first."""
    if not rows:
        return ["No run came to its end."]
    best = max(rows, key=lambda row: row.images_per_second)
    said = [f"{best.label} is the fastest: {best.images_per_second:,.0f} images/s{spread(best)}."] if rows[1:] else []
    largest = {row.recipe: max(other.ranks for other in rows if other.recipe == row.recipe) for row in rows}
    # One rank of what several can do is in the table.
    said += [sentence(row) for row in rows if row.ranks > 1 or largest[row.recipe] == 1]
    return [
        each
        for each in [
            *said,
            data_sentence(rows),
            memory_sentence(rows),
            accuracy_sentence(rows),
        ]
        if each
    ]


def spread(row: Row) -> str:
    return f" ({row.slowest:,.0f} to {row.fastest:,.0f} over {count(row.rounds, 'round')})" if row.rounds > 1 else ""


def sentence(row: Row) -> str:
    """One row: how fast against its baseline, and where its time goes."""
    if row.speedup is None or row.efficiency is None:
        clauses = [f"{row.label} trains {row.images_per_second:,.0f} images/s{spread(row)}"]
    else:
        clauses = [f"{row.label} is {row.speedup:.2f} × {row.against}"]
        if row.rounds > 1:
            low, high = row.speedup_from or 0, row.speedup_to or 0
            clauses[0] += f" ({low:.2f} to {high:.2f} over {count(row.rounds, 'round')})"
            if low < 1 < high:
                clauses[0] += ", a difference within the spread of the rounds"
        if row.devices > 1:
            clauses[0] += f", an efficiency of {percent(row.efficiency)}"
    where = []
    if row.exposed_share and not row.idle_shares:
        where.append(f"{percent(row.exposed_share)} of a step is exposed communication")
    if row.idle_shares:
        where.append(f"its parts sit idle {shares(row.idle_shares)} of the time")
    if row.data_wait_share is not None and row.data_wait_share >= NOTABLE:
        where.append(f"{percent(row.data_wait_share)} of a step is waiting for data")
    if row.threads_busy is not None and row.ranks > 1:
        where.append(f"of its {row.ranks} threads, {row.threads_busy:.2f} compute at a time in the forward")
    if row.threads_busy is not None and row.cores_busy is not None and row.devices > 1:
        where.append(f"its one process keeps {row.cores_busy:.2f} of {count(row.devices, 'core')} busy")
    return "; ".join([*clauses, *where]) + "."


def data_sentence(rows: list[Row]) -> str:
    """Whether input keeps up everywhere."""
    waits = [row.data_wait_share for row in rows if row.data_wait_share is not None]
    if not waits or max(waits) >= NOTABLE:
        return ""
    return f"None of them waits for data for more than {percent(max(waits), 1)} of a step."


def memory_sentence(rows: list[Row]) -> str:
    """Who holds the least on its fullest rank, and who the most."""
    held = [row for row in rows if row.memory_bytes]
    if len(held) < 2:
        return ""
    by_peak = sorted(held, key=lambda row: max(row.memory_bytes))
    low, high = by_peak[0], by_peak[-1]
    least, most = max(low.memory_bytes), max(high.memory_bytes)
    words = f"At its peak the fullest rank of {low.label} holds the least, {mebibytes(least, 0)} MiB, and that of "
    words += f"{high.label} the most, {mebibytes(most, 0)} MiB"
    if most < 1.01 * least:
        words = f"At its peak the fullest rank of each holds about {mebibytes(most, 0)} MiB"
    uneven = [row for row in held if row.memory_imbalance and row.memory_imbalance > 1.1]
    if uneven:
        listed = ", ".join(f"{row.label} ({row.memory_imbalance:.2f} × the mean)" for row in uneven)
        words += f"; ranks are uneven in {listed}"
    return f"{words}."


def accuracy_sentence(rows: list[Row]) -> str:
    """How far apart what they learnt is."""
    known = [row for row in rows if row.accuracy is not None]
    if len(known) < 2:
        return ""
    by_accuracy = sorted(known, key=lambda row: row.accuracy or 0.0)
    low, high = by_accuracy[0], by_accuracy[-1]
    if low.accuracy == high.accuracy:
        return f"All of them reach an accuracy of {percent(low.accuracy or 0, 2)}."
    return (
        f"Accuracies go from {percent(low.accuracy or 0, 2)} ({low.label}) to {percent(high.accuracy or 0, 2)} "
        f"({high.label})."
    )


# As tables ----------------------------------------------------------------------------------------------------------


def percent(share: float | None, digits: int = 0) -> str:
    return "" if share is None else f"{100 * share:.{digits}f} %"


def shares(values: list[float]) -> str:
    return listed(values, lambda share: f"{100 * share:.0f}") + " %" * bool(values)


def listed(values: list[float], worded: Callable[[float], str]) -> str:
    """One figure a rank; of many ranks, the least and the most."""
    return (
        " to ".join(map(worded, (min(values), max(values)))) if len(values) > SHOWN else ", ".join(map(worded, values))
    )


def figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:,.{0 if seconds >= 0.01 else 1}f}"


Column = Callable[[Row], str]
NAMES: dict[str, Column] = {"recipe": lambda row: row.recipe, "ranks": lambda row: str(row.ranks)}
# Three tables, so that each has room at a terminal.
SPEED: dict[str, Column] = {
    "devices": lambda row: str(row.devices),
    "images/s": lambda row: f"{row.images_per_second:,.0f}",
    "from, to": lambda row: f"{row.slowest:,.0f}, {row.fastest:,.0f}" if row.rounds > 1 else "",
    "speedup": lambda row: figure(row.speedup, ".2f"),
    "efficiency": lambda row: percent(row.efficiency),
    "step ms": lambda row: milliseconds(row.step_seconds),
    "95 % ms": lambda row: milliseconds(row.step_seconds_p95),
    "start s": lambda row: figure(row.start_seconds, ".1f"),
    "accuracy": lambda row: percent(row.accuracy, 1),
}
TIME: dict[str, Column] = {
    "compute ms": lambda row: milliseconds(row.parts.get("compute")),
    "comm. ms": lambda row: milliseconds(row.communication_seconds),
    "exposed": lambda row: percent(row.exposed_share),
    "idle": lambda row: shares(row.idle_shares),
    "data wait": lambda row: percent(row.data_wait_share, 1),
    "cores busy": lambda row: figure(row.cores_busy, ".2f"),
    "main thread": lambda row: figure(row.main_threads_busy, ".2f"),
    "threads busy": lambda row: figure(row.threads_busy, ".2f"),
}
MEMORY: dict[str, Column] = {
    "peak MiB": lambda row: listed(row.memory_bytes, lambda size: mebibytes(size, 0)),
    "imbalance": lambda row: figure(row.memory_imbalance, ".2f"),
    "state MiB": lambda row: listed(row.state_bytes, lambda size: mebibytes(size, 0)),
}
TABLES = {"Speed": SPEED, "Where a step goes": TIME, "Memory": MEMORY}
MEANING = {
    "ranks": "processes, or of data_parallel the replicas in its one process",
    "devices": "GPUs; where there is none, the CPU cores that it may use",
    "images/s": "global batch over the median step, warm-up left out; the median of the rounds",
    "from, to": "the slowest and the fastest round",
    "speedup": "images/s over those of the row that is the baseline, round by round, the median",
    "efficiency": "speedup over how many times the baseline's devices it has; the global batch is the same (strong "
    "scaling), so 100 % is ideal",
    "step ms": "the median step",
    "95 % ms": "95 % of the steps are within it",
    "start s": "from the command to its first step",
    "accuracy": "on the evaluation set, at the end of the run",
    "compute ms": "what is left of a step without waiting for data, idle parts and exposed communication",
    "comm. ms": "a step's communication, hidden or not, from a profile of a few steps; the mean over ranks",
    "exposed": "the share of a step in which a rank communicates and computes nothing; between parts of a cut model "
    "that is mostly waiting for each other",
    "idle": "the share of a step in which each part of a cut model waits for the others",
    "data wait": "the share of the steps' time that went into waiting for the next batch",
    "cores busy": "CPU seconds of all its processes a second",
    "main thread": "CPU seconds of the main thread a second, the mean over ranks; threads that compute in one process "
    "share one interpreter",
    "threads busy": "threads of data_parallel that compute at a time in the forward",
    "peak MiB": "by rank or GPU: memory that torch allocated, or on CPUs the process's resident set; of rounds "
    "without a profile, where there are several",
    "imbalance": "the fullest rank's or GPU's peak over the mean",
    "state MiB": "by rank: weights, gradients and optimizer",
}
VERIFIED = ("loss", "gradients", "weights", "buffers", "evaluation")  # verify's relative differences


def filled(columns: dict[str, Column], rows: list[Row]) -> dict[str, list[str]]:
    """The columns that say something, each with a cell a row, behind the rows' names; nothing where none does."""
    cells = {name: [column(row) for row in rows] for name, column in columns.items()}
    said = {name: column for name, column in cells.items() if any(column)}
    return {name: [column(row) for row in rows] for name, column in NAMES.items()} | said if said else {}


def tables(title: str, rows: list[Row]) -> list[Table]:
    """The tables, for people at a terminal."""
    made = []
    for heading, columns in TABLES.items():
        found = filled(columns, rows)
        if not found:
            continue
        table = Table(title=f"{heading} · {title}", title_justify="left")
        for name in found:
            table.add_column(name, justify="left" if name == "recipe" else "right")
        for cells in zip(*found.values(), strict=True):
            table.add_row(*cells)
        made.append(table)
    return made


def verified(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """recipes.verify's table, as columns."""
    columns: dict[str, list[str]] = {
        "recipe": [f"{row['recipe']} {row.get('variant', '')}".strip() for row in rows],
        "precision": [row["precision"] for row in rows],
        "ranks": [str(row["ranks"]) for row in rows],
        "steps": [str(row["steps"]) for row in rows],
    }
    columns |= {name: [figure(row[name], ".0e") for row in rows] for name in VERIFIED}
    columns["allowed"] = ["" if row["verdict"].startswith("differs") else f"{row['tolerance']:.0e}" for row in rows]
    return columns | {"verdict": [row["verdict"] for row in rows]}
