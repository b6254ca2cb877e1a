"""docs/fuzz.md: every series that was recorded, and their sums.

    python -m tests.helpers.fuzz.record > docs/fuzz.md     the page once more, from the series

A series is a line of series.jsonl beside this file, which the fuzzer appends; the page is made from all of them.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.helpers.fuzz.series import Tally
from tests.helpers.harness import ROOT

SERIES, PAGE = Path(__file__).with_name("series.jsonl"), ROOT / "docs" / "fuzz.md"
COUNTED = {  # columns of the page
    "runs": "runs",
    "kills": "kills",
    "kills in a save": "of them in a save",
    "resumes": "resumed",
    "preemptions": "asked to leave, and left",
    "damages": "damages",
    "world-size changes": "world-size changes",
    "lost": "lost",
    "differing bits": "differing bits",
}
WORDS = """# The record of kills

`make fuzz` draws runs by seed: a recipe, a task, what is saved and how often, 1 to 4 ranks. It kills ranks at random moments
and at chosen file-system calls of a save, sends signals, damages the newest checkpoint, changes the number of ranks, and
starts the same command again until the run ends. Then weights, optimizer, generators, log and files are compared with those
of an undisturbed run: bit by bit where the number of ranks is the same, else to 1e-8 in fp64. `lost`: a start did not
resume from the newest intact checkpoint, left a file changed, hung, or ended with another exit code than it should.

This page is written by `make fuzz N=100 SEED=0`, which adds a line per series; nothing else is counted. A
kill is a SIGKILL that hit a run that was going on, of one rank or of all at once (which counts once). A start that was over
before its fault was due is no kill. A seed's variants train the same, with other faults.

## Series

{series}

**In all: {runs:,} runs, {kills:,} kills, {lost:,} lost, {differing:,} with differing bits.** The goal is 10,000 kills.
{failed}
## Where kills hit

{places}

## What was being trained

{trained}
"""


def series_of(tally: Tally, way: str, first: int, variants: int, seconds: float) -> dict[str, Any]:
    """A line of the record."""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "way": way,
        "seeds": [first, tally.last],
        "variants": variants,
        "seconds": round(seconds),
        "counts": {name: tally.counts[name] for name in COUNTED},
        "places": dict(sorted(tally.places.items())),
        "trained": dict(sorted(tally.trained.items())),
        "failed": tally.failed,
    }


def recorded_series() -> list[dict[str, Any]]:
    return [json.loads(line) for line in SERIES.read_text(encoding="utf-8").splitlines()] if SERIES.exists() else []


def add_series(series: dict[str, Any]) -> None:
    with SERIES.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(series) + "\n")
    PAGE.write_text(fuzz_page(recorded_series()), encoding="utf-8")


def fuzz_page(recorded: list[dict[str, Any]]) -> str:
    """docs/fuzz.md."""
    rows = []
    sums: dict[str, Counter[str]] = {name: Counter() for name in ("counts", "places", "trained")}
    for each in recorded:
        first, last = each["seeds"]
        seeds = f"{first}–{last}" + f", {each['variants']} variants" * (each["variants"] > 1)
        figures = [each["date"], each["way"], seeds, f"{each['seconds'] / 60:.0f}"]
        rows.append([*figures, *(f"{each['counts'][name]:,}" for name in COUNTED)])
        for name, counter in sums.items():
            counter.update(each[name])
    counts = sums["counts"]
    trained = sorted(sums["trained"].items(), key=lambda item: (item[0].startswith("task="), item[0]))
    failed = [line for each in recorded for line in each["failed"]]
    return WORDS.format(
        kills=counts["kills"],
        runs=counts["runs"],
        lost=counts["lost"],
        differing=counts["differing bits"],
        series=markdown(["date", "started as", "seeds", "minutes", *COUNTED.values()], rows, 3),
        failed="".join(f"\n- {line}" for line in failed) + "\n" * bool(failed),
        places=markdown(["the file-system call, or moment", "kills"], sorted_rows(sums["places"]), 1),
        trained=markdown(["recipe or task", "kills"], [[name, f"{number:,}"] for name, number in trained], 1),
    )


def sorted_rows(counter: Counter[str]) -> list[list[str]]:
    return [[name, f"{number:,}"] for name, number in sorted(counter.items(), key=lambda item: (-item[1], item[0]))]


def markdown(headings: list[str], rows: list[list[str]], texts: int) -> str:
    """A table whose first columns are texts, and the others numbers."""
    rule = ["---"] * texts + ["---:"] * (len(headings) - texts)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows))


if __name__ == "__main__":
    print(fuzz_page(recorded_series()), end="")
