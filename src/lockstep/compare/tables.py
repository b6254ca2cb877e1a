"""A comparison's figures as columns of text, and as tables that fit a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from lockstep.compare.figures import ComparisonRow, RunPlan
from lockstep.utils.tables import terminal_tables
from lockstep.utils.text import mebibytes

VERIFY_NUMBERS = ("loss", "gradients", "weights", "buffers", "evaluation")  # recipes.verify's relative differences
LISTED_RANKS = 4  # whose figures are listed; of more, the least and the most


def percent(share: float | None, digits: int = 0) -> str:
    return "" if share is None else f"{round(100 * share, digits) + 0:.{digits}f} %"  # without -0


def shares(values: list[float]) -> str:
    return per_rank(values, lambda share: f"{100 * share:.0f}") + " %" * bool(values)


def per_rank(values: list[float], worded: Callable[[float], str]) -> str:
    """One figure per rank; of many ranks, the least and the most."""
    return (
        " to ".join(map(worded, (min(values), max(values))))
        if len(values) > LISTED_RANKS
        else ", ".join(map(worded, values))
    )


def score(row: ComparisonRow, digits: int) -> str:
    """What a row's recipe has reached, in the task's metric."""
    return percent(row.reached, digits) if "accuracy" in row.metric else figure(row.reached, ".4g")


def figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:,.{0 if seconds >= 0.01 else 1}f}"


@dataclass(frozen=True)
class Column:
    """A column's cells, of a row each, and what they mean."""

    cell: Callable[[ComparisonRow], str]
    meaning: str = ""


NAMES = {
    "recipe": Column(lambda row: row.recipe),
    "ranks": Column(lambda row: str(row.ranks), "processes, or of data_parallel the replicas in its one process"),
}
SPEED = {
    "devices": Column(lambda row: str(row.devices), "GPUs; where there is none, the CPU cores that it may use"),
    "samples/s": Column(
        lambda row: f"{row.samples_per_second:,.0f}",
        "global batch over the median step, warm-up left out; the median of the rounds",
    ),
    "tokens/s": Column(lambda row: figure(row.tokens_per_second, ",.0f"), "samples/s times the tokens of a sample"),
    "GFLOP/s": Column(
        lambda row: figure(row.model_flops_per_second and row.model_flops_per_second / 1e9, ",.4g"),
        "operations of the model's forward and backward, without what is computed again",
    ),
    "MFU": Column(lambda row: percent(row.mfu, 1), "the same over what the devices' data sheets promise"),
    "from, to": Column(
        lambda row: f"{row.slowest:,.0f}, {row.fastest:,.0f}" if row.rounds > 1 else "",
        "the slowest and the fastest round",
    ),
    "ratio": Column(
        lambda row: figure(row.speedup, ".2f"),
        "samples/s over those of the row that is the baseline, round by round, the median",
    ),
    "efficiency": Column(
        lambda row: percent(row.efficiency),
        "the ratio over how many times the baseline's devices it has; the global batch is the same (strong scaling), so "
        "100 % is ideal",
    ),
    "step ms": Column(lambda row: milliseconds(row.step_seconds), "the median step"),
    "p95 ms": Column(lambda row: milliseconds(row.step_seconds_p95), "95 % of the steps are within it"),
    "start s": Column(lambda row: figure(row.start_seconds, ".1f"), "from the command to its first step"),
    "reached": Column(lambda row: score(row, 1), "on the evaluation set, at the end of the run"),
}
STEP_TIME = {
    "compute ms": Column(
        lambda row: milliseconds(row.parts.get("compute")),
        "what is left of a step without waiting for data, idle parts and exposed communication",
    ),
    "sent MB": Column(
        lambda row: figure(row.sent_bytes and row.sent_bytes / 1e6, ",.3g"),
        "what the rank that sends most hands to its collectives per step, each message once, in millions of bytes",
    ),
    "comm. ms": Column(
        lambda row: milliseconds(row.communication_seconds),
        "a step's communication, hidden or not, from a profile of a few steps; the mean over ranks",
    ),
    "exposed": Column(
        lambda row: percent(row.exposed_share),
        "the share of a step in which a rank communicates and computes nothing; between parts of a cut model that is "
        "mostly waiting for each other",
    ),
    "idle": Column(
        lambda row: shares(row.idle_shares),
        "the share of a step in which each part of a cut model waits for the others",
    ),
    "data wait": Column(
        lambda row: percent(row.data_wait_share, 1),
        "the share of the steps' time that went into waiting for the next batch",
    ),
    "cores busy": Column(lambda row: figure(row.cores_busy, ".2f"), "CPU seconds of all its processes per second"),
    "main thread": Column(
        lambda row: figure(row.main_threads_busy, ".2f"),
        "CPU seconds of the main thread per second, the mean over ranks; threads that compute in one process share one "
        "interpreter",
    ),
    "threads busy": Column(
        lambda row: figure(row.threads_busy, ".2f"),
        "threads of data_parallel that compute at a time in the forward",
    ),
}
MEMORY = {
    "peak MiB": Column(
        lambda row: per_rank(row.memory_bytes, lambda size: mebibytes(size, 0)),
        "by rank or GPU: memory that torch allocated, or on CPUs the process's resident set; of rounds without a "
        "profile, where there are several",
    ),
    "imbalance": Column(
        lambda row: figure(row.memory_imbalance, ".2f"), "the fullest rank's or GPU's peak over the mean"
    ),
    "state MiB": Column(
        lambda row: per_rank(row.state_bytes, lambda size: mebibytes(size, 0)),
        "by rank: weights, gradients and optimizer",
    ),
}


def planned_cell(cell: Callable[[RunPlan], str]) -> Callable[[ComparisonRow], str]:
    return lambda row: cell(row.planned) if row.planned else ""


def planned_ratio(name: str) -> Callable[[ComparisonRow], str]:
    return lambda row: figure(row.planned_ratios.get(name), ".2f")


PLAN = {
    "plan ms": Column(planned_cell(lambda plan: milliseconds(plan.seconds)), "a step as recipes.plan predicts it"),
    "of step": Column(
        planned_ratio("seconds"), "planned over the median step that was measured, with loading and bookkeeping"
    ),
    "plan MB": Column(
        planned_cell(lambda plan: f"{plan.sent / 1e6:,.3g}" if plan.sent else ""),
        "what a rank is planned to hand to its collectives per step, in millions of bytes",
    ),
    "of sent": Column(planned_ratio("sent"), "planned over counted"),
    "plan state": Column(
        planned_cell(lambda plan: mebibytes(plan.state, 0) if plan.state else ""),
        "weights, gradients and optimizer of the rank that holds most, planned, in MiB",
    ),
    "of state": Column(planned_ratio("state"), "planned over counted"),
    "plan peak": Column(
        planned_cell(lambda plan: mebibytes(plan.peak, 0)),
        "all of torch's tensors at the peak of a step, planned, in MiB; a process holds its interpreter and libraries "
        "besides",
    ),
    "of peak": Column(planned_ratio("peak"), "planned over measured, on GPUs, where both are of torch's tensors"),
}
COLUMN_GROUPS = {"Speed": SPEED, "Where a step goes": STEP_TIME, "Memory": MEMORY, "Plan": PLAN}
MEANINGS = {
    name: each.meaning for group in (NAMES, *COLUMN_GROUPS.values()) for name, each in group.items() if each.meaning
}


def text_columns(columns: dict[str, Column], rows: list[ComparisonRow]) -> dict[str, list[str]]:
    """The columns that say something, each with a cell a row, behind the rows' names; nothing where none does."""
    texts = {heading(name, rows): [column.cell(row) for row in rows] for name, column in (NAMES | columns).items()}
    some = {name: cells for name, cells in texts.items() if any(cells)}
    return some if some.keys() - NAMES.keys() else {}


def heading(name: str, rows: list[ComparisonRow]) -> str:
    """A column's name in the words of the task that is trained."""
    task = {"samples/s": f"{rows[0].unit}/s", "reached": rows[0].metric.replace("_", " ")} if rows else {}
    return task.get(name, name)


def comparison_tables(title: str, rows: list[ComparisonRow]) -> list[Table]:
    """The tables, for people at a terminal."""
    return [
        table
        for group, columns in COLUMN_GROUPS.items()
        for table in terminal_tables(f"{group} · {title}", text_columns(columns, rows), text=("recipe",), repeated=2)
    ]


def verify_columns(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """recipes.verify's table, as columns."""
    columns = {
        "recipe": [f"{row['recipe']} {row.get('variant', '')}".strip() for row in rows],
        "precision": [row["precision"] for row in rows],
        "ranks": [str(row["ranks"]) for row in rows],
        "steps": [str(row["steps"]) for row in rows],
    }
    columns |= {name: [figure(row[name], ".0e") for row in rows] for name in VERIFY_NUMBERS}
    columns["allowed"] = ["" if row["verdict"].startswith("differs") else f"{row['tolerance']:.0e}" for row in rows]
    return columns | {"verdict": [row["verdict"] for row in rows]}
