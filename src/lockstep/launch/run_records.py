"""What runs have left behind, side by side: the settings in which they differ, and how each of them ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lockstep.config.keys import typed, walk
from lockstep.config.run_directory import read_result
from lockstep.config.schema import Config
from lockstep.diagnose.evidence import collect_evidence
from lockstep.diagnose.postmortem import judge_errors
from lockstep.errors import UserError
from lockstep.utils.tables import folded_table, terminal_width
from lockstep.utils.text import short


@dataclass(frozen=True)
class RunRecord:
    """A run's directory, its result.json, and what went wrong where it has failed."""

    out: Path
    result: dict[str, Any]
    error: str = ""

    @property
    def ended(self) -> str:
        """How it ended, in words; of one that failed, why."""
        status = self.result.get("status", "not started")
        if status == "preempted":
            return f"stopped at step {self.result.get('steps')}"
        return f"{status}: {self.error}" if self.error else str(status)


def read_record(out: Path, error: str = "") -> RunRecord:
    """What a run directory says.

    Args:
        error: why it failed, where the run itself could not say so.
    """
    result = read_result(out)
    if result.get("status") == "failed" and not error:
        try:
            error = next((finding.figure for finding in judge_errors(collect_evidence(out))), "")
        except (UserError, OSError, ValueError):  # it left next to nothing
            error = "no rank left a word"
    return RunRecord(out, {"status": "failed"} | result if error else result, error)


def settings_of(config: Config) -> dict[str, Any]:
    """{dotted key: value} of all that can differ between two runs."""
    return {name: value for name, value, _ in walk(config) if name != "out"}


def apart(every: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is each one's own of several runs' settings, as it is typed: `optim.lr=0.1`; nothing of a run alone."""
    names = [
        name for name in dict.fromkeys(chain(*every)) if any(each.get(name) != every[0].get(name) for each in every)
    ]
    # What a group's name brings with it needs no word, unless points of one name differ in it.
    groups = [
        name.removesuffix("name") for name in names if name in ("task.name", "model.name", "data.name", "optim.name")
    ]
    follows = ("model.",) if "data." in groups else ()
    few = [name for name in names if name.endswith(".name") or not name.startswith((*groups, *follows))]
    short_labels, labels = (
        [" ".join(typed(name, each[name]) for name in chosen if name in each) for each in every]
        for chosen in (few, names)
    )
    return short_labels if len(set(short_labels)) == len(set(labels)) else labels


def score_columns(results: Sequence[Mapping[str, Any]], metric: str) -> dict[str, list[str]]:
    """The columns of loss and metric, a cell per run; a run without an evaluation has the loss of its training.

    Args:
        metric: what is best, as it is logged; where that is the loss, or no run has it, the first other one is shown.
    """
    found = dict.fromkeys(name for each in results for name in each if name.startswith("eval_") and name != "eval_loss")
    shown = metric if metric in found else next(iter(found), "")
    evaluated = any(each.get("eval_loss") is not None for each in results)
    columns = {"eval loss" if evaluated else "train loss": "eval_loss" if evaluated else "train_loss"}
    columns |= {shown.removeprefix("eval_").replace("_", " "): shown} if shown else {}
    return {heading: [score_cell(name, each.get(name)) for each in results] for heading, name in columns.items()}


def score_cell(name: str, value: float | None) -> str:
    """A loss or a metric as a table shows it."""
    if value is None:
        return ""
    return f"{value:.2%}" if "accuracy" in name else f"{value:.4g}"


def print_tables(*tables: Table) -> None:
    """On stdout, in the width of the terminal."""
    Console(width=terminal_width(), highlight=False).print(*tables, sep="\n")


def show_sweep(labels: Sequence[str], records: Sequence[RunRecord], metric: str) -> None:
    """Print a sweep's closing table: a row per point, with its settings, its result, and its folder in the sweep's.

    Args:
        labels: each point's own settings.
        metric: what is best, as it is logged.
    """
    columns = {"run": [record.out.name for record in records], "settings": list(labels)}
    columns |= score_columns([record.result for record in records], metric)
    if any(record.result.get("status") != "finished" for record in records):
        columns["end"] = [record.ended for record in records]
    title = f"{len(records)} runs in {short(records[0].out.parent)}"
    print_tables(folded_table(title, columns, text=("run", "settings", "end")))
