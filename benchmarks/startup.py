"""How long it takes until training goes: `recipes.ddp` against a torchrun script by hand, and three libraries.

    python -m benchmarks.startup [--rounds N]

All start two ranks, load the digits and take one step of ResNet-18; the time is that from the command to the end of
that step, on the last rank to get there. Ours composes and checks a config, writes a run directory and prints its
summaries on the way; its ranks are copies of one process, which has imported torch once.

`recipes.ddp` and the script by hand (bare_ddp.py) then evaluate and save the weights: the second comparison is the
whole command, from start to exit, in seconds and in CPU seconds.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks import common

OURS, BARE = "recipes.ddp", "bare torchrun script"
HERE = "benchmarks.contestants"
LIBRARIES = {"Fabric": f"{HERE}.by_fabric", "Accelerate": f"{HERE}.by_accelerate", "Trainer": f"{HERE}.by_trainer"}


def rows(arguments: argparse.Namespace) -> list[common.Row]:
    bare = common.torchrun(Path(__file__).with_name("bare_ddp.py"), 2)
    ours = ["-m", "recipes.ddp", "max_steps=1", "nproc=2", "device=cpu"]
    with tempfile.TemporaryDirectory() as folder:

        def start(number: int, words: Sequence[str]) -> common.Ran:
            return common.run(words, folder, clock=(1, 1))

        contestants = {
            OURS: lambda number: start(number, [*ours, f"out={folder}/{number}"]),
            BARE: partial(start, words=[*bare, f"{folder}/bare.pt"]),
        }
        for name, module in LIBRARIES.items():
            words = common.torchrun(module, 2, "--model", "resnet18", "--share", 48, "--steps", 1)
            contestants[name] = partial(start, words=words)
        ran = common.in_turn(contestants, arguments.rounds, warm=1)

    def row(what: str, other: str, attribute: str, target: float | None) -> common.Row:
        mine, theirs = ([getattr(each, attribute) for each in ran[name]] for name in (OURS, other))
        note = f"{statistics.median(mine):.2f} s, {statistics.median(theirs):.2f} s"
        return common.Row(f"{what}: {OURS} / {other}", common.ratios(mine, theirs), target, True, note)

    found = [row("start to first step", BARE, "first_step", 1.2)]
    found += [row("start to first step", name, "first_step", 1.0) for name in LIBRARIES]
    return [*found, row("whole command", BARE, "seconds", 1.2), row("CPU s of it", BARE, "cpu_seconds", None)]


if __name__ == "__main__":
    common.main(__doc__, rows)
