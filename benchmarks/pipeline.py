"""What a pipeline over two single-threaded ranks gives: ResNet-50 against one single-threaded process, in turn.

    python -m benchmarks.pipeline [--rounds N]

Three runs on the same synthetic images, each through its recipe: `single` on the whole batch, `single` on the same
micro-batches one after the other (accumulate), and `pipeline_parallel` with `cut=balanced` and 1F1B. With p = 2 stages
and m = 4 micro-batches the bubble alone would allow p · m / (m + p − 1) = 1.6 times the second.
"""

import argparse
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path

from benchmarks import common

STAGES, PIECES = 2, 4
COMMON = ["model=resnet50", "data=synthetic", "data.image_size=224", "data.size=64", "data.augment=false"]
COMMON += ["batch_size=16", "max_steps=5", "log_every=100", "eval_batch_size=16", "channels_last=true", "threads=1"]
RUNS = {
    "whole batch": ["-m", "recipes.single"],
    "micro-batches": ["-m", "recipes.single", f"accumulate={PIECES}"],
    "pipeline": ["-m", "recipes.pipeline_parallel", f"stages={STAGES}", f"micro_batches={PIECES}", "cut=balanced"],
}


def result(words: list[str], name: str, folder: Path, number: int) -> dict[str, float]:
    """The run's result.json."""
    out = folder / f"{name}-{number}"
    common.run([*words, *COMMON, f"out={out}"])
    return json.loads((out / "result.json").read_text())  # type: ignore[no-any-return]


def rows(arguments: argparse.Namespace) -> list[common.Row]:
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: partial(result, words, name, Path(folder)) for name, words in RUNS.items()}
        results = common.in_turn(runs, arguments.rounds)
    speed = {name: [result["images_per_second"] for result in found] for name, found in results.items()}
    note = "images/s: " + ", ".join(f"{name} {statistics.median(found):.1f}" for name, found in speed.items())
    last = results["pipeline"][-1]
    ideal = STAGES * PIECES / (PIECES + STAGES - 1)
    return [
        common.Row(
            "images/s: pipeline / whole batch", common.ratios(speed["pipeline"], speed["whole batch"]), 2.0, note=note
        ),
        common.Row(
            "images/s: pipeline / micro-batches",
            common.ratios(speed["pipeline"], speed["micro-batches"]),
            1.45,
            note=f"bubble alone allows {ideal:.2f}; idle {last['idle_shares']}, cut {last['cuts']}",
        ),
    ]


if __name__ == "__main__":
    common.main(__doc__, rows, rounds=3)
