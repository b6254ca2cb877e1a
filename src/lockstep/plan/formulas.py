"""The bytes that a technique must send in a step, by formula, to hold against those that were counted.

Of W bytes of weights, on n ranks:

- ddp: an all-reduce of the gradients, W; and a broadcast of the model's buffers, in their own precisions.
- zero1: the same, and a broadcast of the weights that each rank has updated, W in all.
- fsdp: every block's weights are gathered for its forward and again for its backward; what is in no block once. Their
  gradients are reduced and scattered. Each tensor's first dim is filled up to a multiple of n. Several copies of the
  model (replicate=R) are n / R ranks each, and all-reduce their gradients' parts.

A task that counts its own items, such as tokens, has its loader all-reduce one number more.
Source: the recipes' own pages; https://arxiv.org/abs/1910.02054 (ZeRO)
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lockstep.config.schema import Config
from lockstep.parallel.compressed_gradients import sent_numbers
from lockstep.task import option
from lockstep.tasks.build import blocks_of_task, known_task, sketch
from lockstep.training.precision import AUTOCAST, DTYPES

COUNTED_ITEMS = 8  # bytes of the number by which ranks agree how many items, such as tokens, a global batch has


def expected_traffic(name: str, config: Config, ranks: int) -> dict[str, int] | None:
    """{kind: bytes per step} of a recipe by formula; None where there is none for it or for these settings."""
    found = technique_traffic(name, config, ranks)
    if found is not None and ranks > 1 and option(known_task(config), "weigh") is not None:
        found["all-reduce"] = found.get("all-reduce", 0) + COUNTED_ITEMS
    return found


def technique_traffic(name: str, config: Config, ranks: int) -> dict[str, int] | None:
    """`expected_traffic` of the technique alone."""
    model = sketch(config)
    if config.accumulate != 1 or not all(each.requires_grad for each in model.parameters()):
        return None
    item = DTYPES[config.precision].itemsize
    if name in ("ddp", "zero1"):
        weights = item * sum(each.numel() for each in model.parameters())
        half = getattr(config, "comm", "fp32") != "fp32"
        buffers = sum(each.numel() * (item if each.is_floating_point() else each.itemsize) for each in model.buffers())
        sent = {"all-reduce": weights // 2 if half else weights}
        if given := buffers + (weights if name == "zero1" else 0):
            sent["broadcast"] = given
        return sent
    if name == "comm_hooks":
        return compressed_traffic(model, config, item)
    if name == "fsdp":
        return sharded_traffic(model, config, ranks, item)
    return None


def compressed_traffic(model: nn.Module, config: Any, item: int) -> dict[str, int] | None:
    """`expected_traffic` of DDP with PowerSGD; rounded buckets are filled up by numbers that only DDP knows."""
    if config.compress != "powersgd" or config.start_step or any(True for _ in model.buffers()):
        return None
    return {"all-reduce": item * sum(sent_numbers(each, config.matrix_rank) for each in model.parameters())}


def sharded_traffic(model: nn.Module, config: Any, ranks: int, item: int) -> dict[str, int] | None:
    """`expected_traffic` of FSDP."""
    narrow = config.precision in AUTOCAST
    if narrow and any(isinstance(each, _BatchNorm) for each in model.modules()):
        return None  # these are gathered apart, in fp32
    shards = ranks // config.replicate
    blocks = blocks_of_task(known_task(config), model)
    inside = [p for name in blocks for p in model.get_submodule(name).parameters()]
    known = {id(each) for each in inside}
    outside = [each for each in model.parameters() if id(each) not in known]
    gathered = AUTOCAST[config.precision].itemsize if narrow else item
    averaged = gathered if narrow and config.reduce == "bf16" else item
    again = 2 if config.reshard_after_forward else 1
    within, beside = padded_size(inside, shards), padded_size(outside, shards)
    found = {"all-gather": gathered * (again * within + beside), "reduce-scatter": averaged * (within + beside)}
    if config.replicate > 1:
        found["all-reduce"] = averaged * (within + beside) // shards
    return found


def padded_size(parameters: list[nn.Parameter], shards: int) -> int:
    """Numbers in these, each tensor's first dim filled up to a multiple of `shards`."""
    return sum(
        math.ceil(each.shape[0] / shards) * shards * math.prod(each.shape[1:]) if each.dim() else shards
        for each in parameters
    )
