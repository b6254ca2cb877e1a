"""Kills, signals and damages runs at random, starts them again, and compares them bit by bit with undisturbed ones.

    python -m tests.helpers.fuzz --runs 100 --seed 1             forked ranks on a narrow model, some seconds a run
    python -m tests.helpers.fuzz --runs 4 --seed 1 --way launched    `python -m recipes.ddp` as a user starts it
    python -m tests.helpers.fuzz --runs 4 --seed 1 --way slurm       two nodes of a Slurm box, and what goes down there

A seed decides everything that is drawn: the recipe, what it saves and how often, who is killed, and when. What a moment
of a clock then hits is up to the machine; a kill at the n-th file-system call of a save hits the same call each time.
"""

from __future__ import annotations

import argparse
import math
import sys
import time

from tests.helpers.fuzz.record import add_series, series_of
from tests.helpers.fuzz.series import WAYS, fuzz


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.helpers.fuzz", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--runs", type=int, default=20, help="seeds to play")
    parser.add_argument("--seed", type=int, default=0, help="the first of them")
    parser.add_argument("--variants", type=int, default=1, help="plans per seed: the same training, other faults")
    parser.add_argument("--jobs", type=int, default=1, help="seeds that are played at a time")
    parser.add_argument("--way", choices=WAYS, default=WAYS[0], help="how ranks are started")
    parser.add_argument(
        "--hours", type=float, default=0, help="begin no seed after so long (0: when all seeds are played)"
    )
    parser.add_argument("--record", action="store_true", help="add what became of them to docs/fuzz.md")
    asked = parser.parse_args()
    began = time.monotonic()
    seconds = 3600 * asked.hours or math.inf
    found = fuzz(asked.runs, asked.seed, asked.way, say, variants=asked.variants, jobs=asked.jobs, seconds=seconds)
    if asked.record:
        add_series(series_of(found, asked.way, asked.seed, asked.variants, time.monotonic() - began))
    return 1 if found.counts["lost"] or found.counts["differing bits"] else 0


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
