"""What checkpointed activations cost in time and save in memory: one model, with each mode in turn, step by step.

    python -m benchmarks.recompute [--rounds N] [--task language|images]

One process of one thread: a GPT of 6 layers and width 384 on 64 tokens a digit, or ResNet-18 on 64 × 64 pixels; forward
and backward. A second forward of every block is a third of a step's arithmetic at most: 1.33 times the time. What is
kept for backward is counted as `memory=report` does.
"""

import argparse
import statistics
import time
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks import common
from lockstep.config.schema import ModelConfig
from lockstep.memory.tracker import saved_bytes
from lockstep.models.blocks import default_blocks
from lockstep.models.gpt import GPT, gpt_config
from lockstep.models.resnet import build_model
from lockstep.training.activation_checkpointing import checkpoint_activations

MODES: tuple[str | int, ...] = ("none", "selective", 2, "full")
STEPS = 3  # of each mode in a round


def subject(task: str) -> tuple[nn.Module, Tensor]:
    """(a model, its inputs)."""
    torch.manual_seed(0)
    if task == "language":
        return GPT(gpt_config("tiny", 17)), torch.randint(17, (16, 64))
    return build_model(ModelConfig(num_classes=10, image_size=64)), torch.randn(16, 3, 64, 64)


def seconds(model: nn.Module, inputs: Tensor) -> float:
    """Of one forward and backward."""
    started = time.perf_counter()
    outputs = model(inputs).flatten(0, -2)
    cross_entropy(outputs, torch.zeros(len(outputs), dtype=torch.int64)).backward()
    model.zero_grad()
    return time.perf_counter() - started


def rows(arguments: argparse.Namespace) -> list[common.Row]:
    torch.set_num_threads(1)
    models: dict[Any, nn.Module] = {}
    for mode in MODES:
        models[mode], inputs = subject(arguments.task)
        checkpoint_activations(models[mode], default_blocks(models[mode]), cast(Any, mode))
        seconds(models[mode], inputs)
    kept = {mode: saved_bytes(model, inputs) / 2**20 for mode, model in models.items()}
    found: dict[Any, list[float]] = {mode: [] for mode in MODES}
    for _ in range(arguments.rounds):
        taken: dict[Any, list[float]] = {mode: [] for mode in MODES}
        for _ in range(STEPS):
            for mode, model in models.items():
                taken[mode].append(seconds(model, inputs))
        for mode, times in taken.items():
            found[mode].append(statistics.median(times))
    return [
        common.Row(
            f"seconds per step, {arguments.task}: checkpoint_activations={mode} / none",
            common.ratios(found[mode], found["none"]),
            1.45 if mode == "full" else None,
            at_most=True,
            note=f"{statistics.median(found[mode]):.2f} s; kept {kept[mode]:.1f} of {kept['none']:.1f} MiB",
        )
        for mode in MODES[1:]
    ]


if __name__ == "__main__":
    common.main(
        __doc__, rows, rounds=5, task={"choices": ["language", "images"], "default": "language", "help": "what"}
    )
