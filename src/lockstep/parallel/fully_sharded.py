"""What fully_shard (FSDP2) is told by every recipe that shards with it, and what it leaves in torch's DTensors."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from lockstep.training.precision import AUTOCAST


def precision_policies(precision: str, reduce: str = "fp32") -> tuple[MixedPrecisionPolicy, MixedPrecisionPolicy]:
    """(of a block, of the rest of the model): weights are cast when they are gathered, which halves the traffic.

    It takes the place of autocast. The rest's outputs are fp32: the logits, for the loss.

    Args:
        precision: the key; other than bf16 and fp16 it changes nothing.
        reduce: what gradients are averaged in, fp32 or bf16.
    """
    if precision not in AUTOCAST:
        return MixedPrecisionPolicy(), MixedPrecisionPolicy()
    mean = torch.float32 if reduce == "fp32" else torch.bfloat16
    block = MixedPrecisionPolicy(param_dtype=AUTOCAST[precision], reduce_dtype=mean)
    return block, replace(block, output_dtype=torch.float32)


def expect_two_gathers() -> None:
    """Keep torch from advising against what cannot be otherwise.

    A tensor that is cut along one dim by tensor parallelism first and by fully_shard then is put together in two
    all-gathers. That is for exports, saves and statistics, not for training, and torch warns of it on every rank.
    """
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
