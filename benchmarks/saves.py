"""What asynchronous checkpoints cost a training in all, and what one consists of.

    python -m benchmarks.saves [--rounds N] [--steps N] [--saves N]

In each round recipes.ddp trains a ResNet-18 for 100 steps on two ranks, without a checkpoint and with 5, in turn. What
is compared is the wall clock from the first step to the end of the run, which waits for the last save to be on disk.
Where all cores train, the background's work is taken from training; so beside it, on one rank, is the CPU time of a
save by what it is spent on: the copy that training waits for, and in the background agreeing on who writes what,
pickling, hashing and writing, flushing to disk, sealing and renaming.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torchvision.models import resnet18

from benchmarks import common
from lockstep.checkpoint import dcp, saver
from lockstep.checkpoint.state import TrainingState

TRAINING = ("-m", "recipes.ddp", "model=resnet18", "nproc=2", "global_batch_size=96", "epochs=1000", "eval_every=0")


def train(folder: Path, steps: int, saves: int) -> dict[str, float]:
    """A run's seconds of wall clock after its start, and those it waited for checkpoints."""
    out = folder / f"{saves}-{time.time_ns()}"
    when = f"checkpoint.every={steps // saves}" if saves else "checkpoint.minutes=0"
    ran = common.run([*TRAINING, f"max_steps={steps}", "log_every=1000", when, f"out={out}"])
    result = json.loads((out / "result.json").read_text())
    return {
        "seconds": result["wall_seconds"] - result["setup_seconds"],
        "stall": result["checkpoint_stall_seconds"],
        "cpu": ran.cpu_seconds,
    }


class Parts:
    """CPU seconds of the calling thread within functions, by the names given to them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def watch(self, owner: Any, name: str, part: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            started = time.thread_time()
            try:
                return real(*arguments, **named)
            finally:
                self.seconds[part] = self.seconds.get(part, 0) + time.thread_time() - started

        setattr(owner, name, timed)


def taken_apart(folder: Path, rounds: int) -> common.Row:
    """One save by what its CPU time is spent on."""
    torch.set_num_threads(1)
    model = resnet18(num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    cross_entropy(model(torch.randn(2, 3, 64, 64)), torch.tensor([0, 1])).backward()
    optimizer.step()
    state = TrainingState(model, optimizer, {}, rank=0, device=torch.device("cpu"), owns_buffers=True)
    parts = Parts()
    parts.watch(saver.HostCopy, "of", "copy")
    parts.watch(saver.CheckpointSaver, "_write", "background")
    parts.watch(dcp.Writer, "write_data", "all writing")
    parts.watch(dcp.HashedFile, "write", "hash and write")
    parts.watch(dcp.HashedFile, "sync", "flush")
    parts.watch(dcp.Writer, "finish", "seal and rename")
    found: dict[str, list[float]] = {}
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 1), rank=0, world_size=1)
    checkpoints = saver.CheckpointSaver(folder, asynchronous=True, keep=1, warn=print)
    for number in range(rounds + 1):
        parts.seconds.clear()
        started = time.thread_time()
        held = {name: tensor.clone() for name, tensor in state.tensors().items()}
        clone = time.thread_time() - started
        checkpoints.save(state.tensors(), {"step": number})
        checkpoints.wait()
        spent = parts.seconds
        writing = spent.pop("all writing")
        spent["pickle"] = writing - spent["hash and write"] - spent["flush"]
        spent["agree"] = spent["background"] - writing - spent["seal and rename"]
        if number:  # the first one allocates
            for name, seconds in ({"clone": clone} | spent).items():
                found.setdefault(name, []).append(seconds)
    dist.destroy_process_group()
    size = sum(tensor.nbytes for tensor in held.values()) / 1e6
    note = ", ".join(f"{name} {1000 * statistics.median(seconds):.0f}" for name, seconds in found.items())
    whole = [copy + rest for copy, rest in zip(found["copy"], found["background"], strict=True)]
    name = "CPU time of a save, background and all / of a clone"
    return common.Row(name, common.ratios(whole, found["clone"]), note=f"{size:.0f} MB, ms: {note}")


def rows(arguments: argparse.Namespace) -> list[common.Row]:
    with tempfile.TemporaryDirectory(dir=os.getcwd()) as scratch:
        folder = Path(scratch)
        found = [taken_apart(folder, max(5, arguments.rounds))]
        if not arguments.steps:
            return found
        ran = common.in_turn(
            {
                "without": lambda _: train(folder, arguments.steps, 0),
                "with": lambda _: train(folder, arguments.steps, arguments.saves),
            },
            arguments.rounds,
        )
    with_them, without = ran["with"], ran["without"]
    stall = statistics.median(run["stall"] for run in with_them)
    cpu = [(a["cpu"] - b["cpu"]) / arguments.saves for a, b in zip(with_them, without, strict=True)]
    note = f"waited {stall:.2f} s in all; {statistics.median(cpu):.2f} CPU s a save, both ranks"
    name = f"wall of {arguments.steps} steps: {arguments.saves} saves / none"
    seconds = [[run["seconds"] for run in runs] for runs in (with_them, without)]
    return [common.Row(name, common.ratios(*seconds), 1.1, True, note), *found]


if __name__ == "__main__":
    common.main(
        __doc__,
        rows,
        steps={"type": int, "default": 100, "help": "steps of each training; 0: take a save apart alone (100)"},
        saves={"type": int, "default": 5, "help": "checkpoints in them (5)"},
    )
