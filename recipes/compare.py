"""Compare: what each technique costs on this machine, the recipes run one after the other on the same work.

Each recipe is started as a person would start it, with the same config, in turn and as many rounds as asked, so that a
machine that gets slower meets them all alike. The table gives images/s with its spread, the seconds from the command
to its first step, memory by rank or device and its imbalance (the largest over the mean), what of it is weights,
gradients and optimizer on the rank that holds most, how long parts sat idle, and of DataParallel's threads how many
computed at a time: where that is far below their number, they waited for each other in one interpreter. DataParallel's
other two faults, the first device that holds more and does more, are the imbalance and the speed.

    python -m recipes.compare recipes=[data_parallel,ddp] max_steps=30
    python -m recipes.compare rounds=3 model=resnet50 data=synthetic data.image_size=64 max_steps=10

Expect: a table after a minute for each recipe and round, and compare.json beside it.
Source: https://arxiv.org/abs/2006.15704 (DataParallel against DistributedDataParallel)
"""

import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.table import Table

from lockstep import Run, UserError, recipe
from lockstep.checks import check_package
from lockstep.errors import CheckFailed
from lockstep.files import write_json
from lockstep.schema import Config
from lockstep.trial import environment
from recipes import choose

OURS = {"recipes", "rounds", "out", "nproc"}  # keys that mean this tool, not the runs it starts


def measure(run: Run, name: str, number: int) -> dict[str, Any]:
    """Run a recipe to its end in processes of its own; its result.json and, as `start_seconds`, its way to step 1."""
    from lockstep.compose import overrides  # Hydra, which only a process that starts others needs

    out = run.out / f"{name}-{number}"
    command = [sys.executable, "-m", f"recipes.{name}", f"out={out}", *overrides(train, run.asked, OURS)]
    began = time.perf_counter()
    done = subprocess.run(command, env=environment(os.environ), capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise CheckFailed(f"recipes.{name} failed: {done.stderr.strip().splitlines()[-1]}")
    result = json.loads((out / "result.json").read_text())
    return result | {"start_seconds": seconds - result["wall_seconds"] + result["setup_seconds"]}


def summary(name: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """One recipe's row over all rounds."""
    speeds = [result["images_per_second"] for result in results]
    last = results[-1]
    memory = last.get("peak_by_device", last["peak_memory_bytes_by_rank"])
    threads = last["thread_seconds"] / last["forward_seconds"] if "thread_seconds" in last else None
    return {
        "recipe": name,
        "ranks": last["world_size"],
        "images_per_second": statistics.median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "start_seconds": statistics.median(result["start_seconds"] for result in results),
        "memory_bytes": memory,
        "state_bytes": max(last["state_bytes_by_rank"]),
        "memory_imbalance": max(memory) / statistics.mean(memory),
        "idle_shares": last.get("idle_shares"),
        "threads_busy": threads,
        "eval_accuracy": last["eval_accuracy"],
    }


def show(run: Run, rows: list[dict[str, Any]]) -> None:
    """The table, for people."""
    table = Table(title=f"{run.config.model.name} on {run.config.data.name}, {run.device.type}", title_justify="left")
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "recipe": lambda row: row["recipe"],
        "ranks": lambda row: str(row["ranks"]),
        "images/s": lambda row: f"{row['images_per_second']:,.0f}",
        "from, to": lambda row: f"{row['slowest']:,.0f}, {row['fastest']:,.0f}",
        "start s": lambda row: f"{row['start_seconds']:.1f}",
        "peak MiB": lambda row: ", ".join(f"{size / 2**20:,.0f}" for size in row["memory_bytes"]),
        "imbalance": lambda row: f"{row['memory_imbalance']:.2f}",
        "state MiB": lambda row: f"{row['state_bytes'] / 2**20:,.0f}",
        "idle": lambda row: ", ".join(f"{share:.0%}" for share in row["idle_shares"] or []),
        "threads busy": lambda row: "" if row["threads_busy"] is None else f"{row['threads_busy']:.2f}",
        "accuracy": lambda row: f"{row['eval_accuracy']:.1%}",
    }
    columns = {name: cell for name, cell in columns.items() if any(map(cell, rows))}
    for name in columns:
        table.add_column(name)
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    run.report.console.print(table)


def check(config: Config, share: int) -> None:
    """Only recipes that exist can be compared."""
    choose(config.recipes)


@recipe(ranks=1, check=check)
def train(run: Run) -> None:
    results: dict[str, list[dict[str, Any]]] = {}
    for name in choose(run.config.recipes):
        try:
            each = importlib.import_module(f"recipes.{name}").train
            check_package(each)
            if each.backbone:
                raise UserError(f"recipes.{name} trains a part of a trained model, which is not the same work")
            results[name] = []
        except UserError as error:
            run.report.line(f"left out: {error}")
    for number in range(run.config.rounds):
        for name, found in results.items():
            run.report.line(f"round {number + 1} of {run.config.rounds}: recipes.{name}")
            found.append(measure(run, name, number))
    rows = [summary(name, found) for name, found in results.items()]
    write_json(run.out / "compare.json", rows)
    show(run, rows)


if __name__ == "__main__":
    train.main()
