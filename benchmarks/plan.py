"""How far recipes.plan is off: here, and of trainings that others have published.

    python -m benchmarks.plan [--rounds N]

A ratio of 1 is a plan that is right. Here: strategies on two ranks of this machine, planned over measured, for the bytes
of a step, peak memory, the step by the clock and by the processor. Published: speed that is planned over the speed that was
measured, for each training in benchmarks/published.py; a plan is an upper bound, so more than 1 is expected. --rounds
is not heeded: the steps' median counts.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import common, published
from lockstep.plan.workers import planned_beside

CHECKED = (
    *("-m", "recipes.plan", "check=true", "nproc=2", "threads=1"),
    *("task=language", "task.size=tiny", "global_batch_size=24"),
)


def rows(arguments: argparse.Namespace) -> list[common.Row]:
    with tempfile.TemporaryDirectory() as folder:
        common.run([*CHECKED, f"out={folder}/run"])
        checked = json.loads(Path(folder, "run", "check.json").read_text(encoding="utf-8"))
    found = list(here_rows(checked))
    predicted = planned_beside(
        lambda number: published.predict(published.ROWS[number]), list(range(len(published.ROWS)))
    )
    for number, made in sorted(predicted):
        row = published.ROWS[number]
        assert made, f"{row.name}: its process was ended; is there enough memory on this machine?"
        name = f"plan / published: {row.name}, {row.gpus} GPUs"
        note = f"{row.tokens:,.0f} {row.unit}/s/GPU published"
        found.append(common.Row(name, [made["predicted_tokens"] / row.tokens], note=note))
    return found


def here_rows(checked: list[dict[str, Any]]) -> list[common.Row]:
    """A row per thing that is planned, with a ratio per strategy."""
    equal = [float(row["bytes_predicted"] == row["bytes_measured"]) for row in checked]
    figures = {
        "bytes equal": (equal, 1.0),
        "peak memory": ([1 + row["memory_error"] for row in checked], None),
        "step, clock": ([1 + row["time_error"] for row in checked], None),
        "step, CPU": ([1 + row["work_error"] for row in checked if row["work_error"] is not None], None),
    }
    return [
        common.Row(f"plan / measured here: {name}", ratios, target, note=f"{len(ratios)} strategies on 2 ranks")
        for name, (ratios, target) in figures.items()
    ]


if __name__ == "__main__":
    common.main(__doc__, rows)
