"""What a pipeline over two single-threaded ranks gives: ResNet-50 against one single-threaded process, in turn.

    python -m benchmarks.pipeline [--rounds N] [--precision fp32|bf16]

Four runs on the same synthetic images, each through its recipe: `single` on the whole batch with the C library's
allocator as it is, and again with memory that is kept (allocator=keep, the default); `single` on the same micro-batches
one after the other (accumulate); and `pipeline_parallel` with `cut=balanced` and 1F1B. With p = 2 stages and m = 4
micro-batches the bubble alone would allow p · m / (m + p − 1) = 1.6 times the third. What is missing from that is
accounted for in the last line: each stage's idle share, of which the bubble is (p − 1) / (m + p − 1) = 20 %, and how
much longer both stages together compute than one process does, for two cores share the memory's bandwidth.
"""

import argparse
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import common

STAGES, PIECES = 2, 4
BATCH = {"fp32": 16, "bf16": 32}
COMMON = ["model=resnet50", "data=synthetic", "data.image_size=224", "data.size=64", "data.augment=false"]
COMMON += ["max_steps=6", "log_every=100", "eval_batch_size=16", "channels_last=true", "threads=1", "device=cpu"]
RUNS = {
    "whole batch": ["-m", "recipes.single", "allocator=system"],
    "whole batch, kept memory": ["-m", "recipes.single"],
    "micro-batches": ["-m", "recipes.single", f"accumulate={PIECES}"],
    "pipeline": ["-m", "recipes.pipeline_parallel", f"stages={STAGES}", f"micro_batches={PIECES}", "cut=balanced"],
}


def rows(arguments: argparse.Namespace) -> list[common.Row]:
    more = [f"precision={arguments.precision}", f"global_batch_size={BATCH[arguments.precision]}"]

    def result(number: int, name: str) -> dict[str, Any]:
        """The run's result.json."""
        with tempfile.TemporaryDirectory() as folder:
            common.run([*RUNS[name], *COMMON, *more, f"out={folder}/run"])
            return json.loads(Path(folder, "run/result.json").read_text())  # type: ignore[no-any-return]

    results = common.in_turn({name: partial(result, name=name) for name in RUNS}, arguments.rounds)
    speed = {name: [each["images_per_second"] for each in found] for name, found in results.items()}
    note = "images/s: " + ", ".join(f"{name} {statistics.median(found):.1f}" for name, found in speed.items())
    ideal = STAGES * PIECES / (PIECES + STAGES - 1)

    def row(below: str, target: float | None, note: str) -> common.Row:
        name = f"images/s, {arguments.precision}: pipeline / {below}"
        return common.Row(name, common.ratios(speed["pipeline"], speed[below]), target, note=note)

    return [
        row("whole batch", 2.0, note),
        row("whole batch, kept memory", None, ""),
        row("micro-batches", 1.45, f"bubble alone allows {ideal:.2f}"),
        common.Row(
            f"seconds, {arguments.precision}: computed by both stages / by micro-batches in one process",
            [computed(piped) / one["step_seconds_p50"] for piped, one in both(results)],
            note=f"idle {shares(results['pipeline'])}, cut {results['pipeline'][-1]['cuts']}",
        ),
    ]


def both(results: dict[str, list[dict[str, Any]]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return list(zip(results["pipeline"], results["micro-batches"], strict=True))


def computed(result: dict[str, Any]) -> float:
    """Seconds in which the stages computed, in one step, all of them together."""
    return float(sum((1 - idle) * result["step_seconds_p50"] for idle in result["idle_shares"]))


def shares(results: list[dict[str, Any]]) -> str:
    """The stages' idle shares, the median of the rounds."""
    ranks = zip(*(result["idle_shares"] for result in results), strict=True)
    return ", ".join(f"{statistics.median(each):.0%}" for each in ranks)


if __name__ == "__main__":
    common.main(
        __doc__, rows, rounds=3, precision={"choices": list(BATCH), "default": "fp32", "help": "arithmetic (fp32)"}
    )
