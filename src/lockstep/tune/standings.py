"""How the trials of a search stand: read from what they have left, shown while they run, written down at the end."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import shlex
import signal
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from lockstep.config.keys import typed
from lockstep.config.own_files import open_own
from lockstep.config.schema import Config
from lockstep.config.tasks import IMAGES, is_larger_better, metric_of, short_name
from lockstep.registry import is_file
from lockstep.run import Run
from lockstep.tune.config import TuneConfig
from lockstep.tune.search_space import flat_keys
from lockstep.tune.trial_record import evaluation_lines, read_metrics
from lockstep.utils.files import write_json
from lockstep.utils.places import as_installed
from lockstep.utils.tables import terminal_tables
from lockstep.utils.text import count, interpreter


def metric_mode(config: Config) -> str:
    """Whether the metric is the better the smaller, in Tune's words."""
    return "max" if is_larger_better(config) else "min"


def read_trials(run: Run[TuneConfig]) -> list[dict[str, Any]]:
    """A row a trial, the best first: those that were trained to the end, then those that were not, then the rest."""
    metric, rows = metric_of(run.config), []
    for file in (run.out / "trials").glob("[0-9]*.json"):
        row = json.loads(file.read_text(encoding="utf-8"))
        lines = evaluation_lines(read_metrics(file.with_suffix("")), metric)
        latest = lines[-1] if lines else {}
        row["steps"], row["evaluations"] = latest.get("step", 0), len(lines)
        row |= {name: value for name, value in latest.items() if name.startswith("eval_")}
        rows.append(row)

    def order(row: dict[str, Any]) -> tuple[Any, ...]:
        value = row.get(metric, math.nan)
        there = not math.isnan(value) and row["state"] != "failed"
        value = value if metric_mode(run.config) == "min" else -value
        return (not there, row["state"] != "finished", value if there else 0, row["number"])

    return sorted(rows, key=order)


def standings_tables(run: Run[TuneConfig], rows: list[dict[str, Any]]) -> list[Table]:
    """A line per trial: what was drawn, how far it came, its figures with the metric first, its state."""
    metrics = sorted({name for row in rows for name in row if name.startswith("eval_")})
    metrics = sorted(metrics, key=lambda name: name != metric_of(run.config))
    styles = {"finished": "green", "failed": "red", "running": "cyan"}
    columns = {"trial": [str(row["number"]) for row in rows]}
    columns["state"] = [f"[{styles.get(row['state'], 'yellow')}]{row['state']}[/]" for row in rows]
    for key, _ in flat_keys(run.config.tune.space):
        columns[key] = [escape(str(row["values"][key])) for row in rows]
    columns["steps"] = [str(row["steps"]) for row in rows]
    for name in metrics:
        columns[name] = [f"{row[name]:.4f}" if name in row else "" for row in rows]
    title = f"{tuned_name(run.config)}, {count(run.config.tune.trials, 'trial')} by {metric_of(run.config)}"
    return terminal_tables(title, columns, text=("state",), repeated=2)


def tuned_name(config: TuneConfig) -> str:
    """The recipe that is tuned in words, and its task where that is not images."""
    name = config.tune.recipe
    said = Path(name).name if is_file(name) else f"recipes.{name}"
    return said if config.task.name == IMAGES else f"{said} of {short_name(config.task.name)}"


class Standings(threading.Thread):
    """Shows the trials while Tune has this process's attention, and tells Tune of a signal."""

    def __init__(self, run: Run[TuneConfig]) -> None:
        super().__init__(daemon=True)
        self.run_, self.over = run, threading.Event()
        self.seen: dict[int, tuple[int, str]] = {}

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()

    def run(self) -> None:
        console, told = self.run_.report.console, False
        live = Live(console=console, transient=True) if console.is_terminal else None
        with live or contextlib.nullcontext():
            while not self.over.wait(1):
                if self.run_.listener and self.run_.listener.received and not told:
                    told = True
                    self.run_.listener.announce(self.run_.listener.received)
                    os.kill(os.getpid(), signal.SIGUSR1)  # what Tune ends by, with its state saved
                rows = read_trials(self.run_)
                if live:
                    live.update(Group(*standings_tables(self.run_, rows)))
                else:
                    self.say(rows)
        if not live:
            self.say(read_trials(self.run_))

    def say(self, rows: list[dict[str, Any]]) -> None:
        """A line for each evaluation, and for each end of a trial."""
        metric = metric_of(self.run_.config)
        for row in sorted(rows, key=lambda row: int(row["number"])):
            now, before = (row["evaluations"], row["state"]), self.seen.get(row["number"], (0, ""))
            if now == before:
                continue
            self.seen[row["number"]] = now
            values = " ".join(typed(*pair) for pair in row["values"].items())
            figure = f", step {row['steps']}: {metric} {row[metric]:.4f}" if metric in row else ""
            problem = f": {row['problem']}" if row["problem"] else ""
            self.run_.report.line(f"trial {row['number']} {row['state']}{problem}{figure}  {values}")


def retrain_command(run: Run[TuneConfig], row: dict[str, Any]) -> str:
    """The command that trains a trial's model again, to the last bit."""
    stop = [f"max_steps={row['steps']}"] if row["state"] != "finished" else []
    kept = [word for word in row["words"] if not (stop and word.startswith("max_steps="))]
    name = run.config.tune.recipe
    program = shlex.quote(name) if is_file(name) else f"-m recipes.{name}"
    return as_installed(f"{interpreter()} {program} {shlex.join([*kept, *stop])}")


def write_search_results(run: Run[TuneConfig], rows: list[dict[str, Any]], status: str) -> dict[str, Any]:
    """result.json and trials.csv; returns what is in the former."""
    metric = metric_of(run.config)
    good = [row for row in rows if metric in row and row["state"] != "failed"]
    result: dict[str, Any] = {"recipe": "tune", "status": status, "tuned": run.config.tune.recipe, "metric": metric}
    result |= {
        "best": good[0] if good else None,
        "command": retrain_command(run, good[0]) if good else None,
        "trials": rows,
    }
    write_json(run.out / "result.json", result | {"wall_seconds": time.perf_counter() - run.started})
    flat = [
        {name: value for name, value in row.items() if name not in ("words", "values")} | row["values"] for row in rows
    ]
    with open_own(run.out / "trials.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(name for row in flat for name in row)))
        writer.writeheader()
        writer.writerows(flat)
    return result
