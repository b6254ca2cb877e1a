"""What fully_shard (FSDP2) is told by every recipe that shards with it, and what it leaves in torch's DTensors."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn import functional as F

from lockstep.errors import UserError
from lockstep.training.precision import AUTOCAST


def refuse_tied(model: nn.Module, recipe: str, blocks: Sequence[str] | None = None) -> None:
    """Refuse a tensor under two names: each block is sharded by itself, and one on the meta device would become two.

    Args:
        blocks: those that are sharded by themselves: a tensor that lies in none of them may have several names; None: no
            tensor may.

    Raises:
        UserError: names both.
    """
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        before = names.setdefault(id(parameter), name)
        within = blocks is None or any(
            f"{each}.".startswith(f"{block}.") for block in blocks for each in (before, name)
        )
        if before != name and within:
            raise UserError(f"recipes.{recipe}: {before} and {name} are one tensor; untie them, or use ddp")


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


class EmbeddingSummedInFp32(nn.Embedding):
    """What the class of an embedding becomes a subclass of on CPUs in 16 bits; its outputs keep their bits.

    A token's gradient is the sum over all places where it is. torch's kernel for CPUs adds up in the weight's type, and
    16 bits of it lose what is added late: of digits, where half of the tokens are one, 8 % (CUDA's adds up in fp32).
    """

    def forward(self, tokens: Tensor) -> Tensor:
        given = self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        return F.embedding(tokens, self.weight.float(), *given).to(self.weight.dtype)


def sum_embeddings_in_fp32(model: nn.Module, precision: str, device: torch.device) -> None:
    """Have embeddings on CPUs lose nothing of their gradients in bf16 and fp16, in place; before they are sharded."""
    for module in model.modules() if precision in AUTOCAST and device.type == "cpu" else ():
        if type(module) is nn.Embedding:
            module.__class__ = EmbeddingSummedInFp32


def expect_two_gathers() -> None:
    """Keep torch from advising against what cannot be otherwise.

    A tensor that is cut along one dim by tensor parallelism first and by fully_shard then is put together in two
    all-gathers. That is for exports, saves and statistics, not for training, and torch warns of it on every rank.
    """
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
