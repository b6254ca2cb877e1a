"""What of DDP's communication is exposed: `recipes.ddp` against a loop by hand, in fewer bits, and accumulated.

    python -m benchmarks.communication [--rounds N] [--model resnet50]

Two ranks of one thread over gloo, bf16 and channels_last, ResNet-18 on 32 × 32 pixels (or ResNet-50 on 224 × 224). Five
steps of each are recorded by torch.profiler; what is exposed is the communication during which nothing else of the rank
computes (lockstep/callbacks/communication.py). Ranks wait for each other in it, so a machine that does other things
shows here first.
"""

import argparse
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.contestants.profiled import FOLDER, RECORDED

STEPS, RANKS = 14, 2
SIZES = {"resnet18": (32, 32), "resnet50": (224, 8)}  # pixels per side, images per rank
OURS = {
    "recipes.ddp": [],
    "comm=bf16": ["comm=bf16"],
    "comm=fp16": ["comm=fp16"],
    "accumulate=4": ["accumulate=4"],
}


def rows(arguments: argparse.Namespace) -> list[common.Row]:
    size, share = SIZES[arguments.model]
    fixed = ["data=synthetic", f"data.image_size={size}", "data.size=256", "data.augment=false", "threads=1"]
    fixed += [f"model={arguments.model}", f"global_batch_size={RANKS * share}", f"nproc={RANKS}", "device=cpu"]
    fixed += ["precision=bf16", "channels_last=true", f"max_steps={STEPS}", "eval_every=0"]

    def bare(number: int) -> dict[str, float]:
        words = ["--model", arguments.model, "--size", size, "--share", share, "--steps", STEPS]
        command = common.torchrun("benchmarks.contestants.profiled", RANKS, *words, "--bf16", "--channels-last")
        with tempfile.TemporaryDirectory() as folder:
            common.run(command, environment={FOLDER: folder})
            found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(RANKS)]
        return {name: statistics.fmean(each[name] for each in found) for name in ("communication", "exposed")}

    def ours(number: int, words: list[str]) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            common.run(["-m", "recipes.ddp", *fixed, f"profile={RECORDED}", f"out={folder}/run", *words])
            result: dict[str, Any] = json.loads(Path(folder, "run/result.json").read_text())
        names = {"communication": "communication_seconds_by_rank", "exposed": "exposed_communication_seconds_by_rank"}
        return {name: statistics.fmean(result[key]) for name, key in names.items()}

    contestants = {name: partial(ours, words=words) for name, words in OURS.items()}
    ran = common.in_turn({"by hand": bare, **contestants}, arguments.rounds)

    def row(what: str, above: str, below: str, target: float | None = None) -> common.Row:
        found = {name: [each[what] for each in ran[name]] for name in (above, below)}
        note = ", ".join(f"{name} {1000 * statistics.median(values):.1f} ms" for name, values in found.items())
        name = f"{what} a step: {above} / {below}"
        return common.Row(name, common.ratios(found[above], found[below]), target, at_most=True, note=note)

    return [
        row("exposed", "recipes.ddp", "by hand", 1.0),
        *(row("exposed", name, "recipes.ddp") for name in OURS if name != "recipes.ddp"),
        row("communication", "accumulate=4", "recipes.ddp"),
    ]


if __name__ == "__main__":
    common.main(__doc__, rows, rounds=3, model={"choices": list(SIZES), "default": "resnet18", "help": "resnet18"})
