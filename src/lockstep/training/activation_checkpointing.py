"""Activation checkpointing: blocks that keep little for backward, and compute the rest once more when it comes.

Autograd keeps from forward what backward needs: of a block, every intermediate tensor. A block that is checkpointed
keeps its inputs alone (`full`), or besides them the results of its dear operations, matrix products, convolutions and
attention (`selective`), and runs its forward a second time just before its own backward. The intermediates of one
block at a time are then alive, for one more forward of time at most.

The second forward must compute the same bits as the first:
- it draws the same random numbers, so dropout drops the same (torch puts the generators back and forth);
- it computes in the same autocast (torch does that too);
- it begins with the buffers that the first began with, and leaves no trace in them. Else BatchNorm would count every
  batch twice in its running statistics, which no error would say.

It is applied from outside, block by block: the model knows nothing of it, and neither names nor state_dict change.
Source: https://arxiv.org/abs/1604.06174, https://arxiv.org/abs/2205.05198 (selective),
https://docs.pytorch.org/docs/stable/checkpoint.html
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lockstep.errors import UserError

NONE, FULL, SELECTIVE = "none", "full", "selective"
DEAR = (  # operations whose results `selective` keeps: to compute them again would cost most of a block's forward
    *("mm", "addmm", "bmm", "baddbmm", "convolution"),
    *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention"),
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
)
# torch 2.15 asks whether what `selective` keeps is shown to those who count saved tensors; older ones do not show it.
SHOWN: dict[str, Any] = (
    {"respect_saved_tensors_hooks": True}
    if "respect_saved_tensors_hooks" in inspect.signature(checkpoint).parameters
    else {}
)
Buffers = list[tuple[nn.Module, str, Tensor]]


class CheckpointedBlock(nn.Module):
    """What a block's class becomes a subclass of, as FSDP2 does it: names, hooks and copies stay what they were.

    Attributes:
        recomputes: none, full or selective.
    """

    recomputes = NONE

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The block's own forward, which runs again in backward."""
        forward = super().forward
        if self.recomputes == NONE or not torch.is_grad_enabled():
            return forward(*inputs, **named)
        contexts = functools.partial(recompute_contexts, self)
        return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts, **SHOWN, **named)


@functools.cache
def checkpointed_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The same class for all blocks of a class, also those that keep everything: equal blocks stay equal."""
    space = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (CheckpointedBlock, kind), space)


def recompute_contexts(block: nn.Module) -> tuple[Any, Any]:
    """(around a block's first forward, around its second)."""
    first, second = contextlib.nullcontext(), contextlib.nullcontext()
    if cast(CheckpointedBlock, block).recomputes == SELECTIVE:
        first, second = cast(Any, create_selective_checkpoint_contexts(keeps))
    buffers = [(layer, name, buffer.clone()) for layer, name, buffer in buffers_of(block)]
    return first, SecondForward(block, buffers, second)


def keeps(context: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    """Whether `selective` keeps an operation's result."""
    name = getattr(operation, "_opname", "")
    aten = getattr(operation, "namespace", "") == "aten"
    return CheckpointPolicy.MUST_SAVE if aten and name in DEAR else CheckpointPolicy.PREFER_RECOMPUTE


def buffers_of(block: nn.Module) -> Buffers:
    return [
        (layer, name, buffer)
        for layer in block.modules()
        for name, buffer in layer._buffers.items()
        if buffer is not None
    ]


class SecondForward:
    """The context of a second forward: the block computes on other buffers, and its own are not touched.

    It may be entered several times, one after the other: by each backward over the same graph.
    """

    def __init__(self, block: nn.Module, buffers: Buffers, around: Any) -> None:
        self._block, self._buffers, self._around = block, buffers, around

    def __enter__(self) -> None:
        self._own = buffers_of(self._block)
        for layer, name, buffer in self._buffers:
            layer._buffers[name] = buffer.clone()
        self._around.__enter__()

    def __exit__(self, *error: Any) -> Any:
        for layer, name, buffer in self._own:
            layer._buffers[name] = buffer
        return self._around.__exit__(*error)


def checkpoint_activations(model: nn.Module, blocks: Sequence[str], mode: str | int) -> None:
    """Have a model's blocks compute their intermediates again in backward, in place; `none` changes nothing.

    To be called when the model is on its device or on the meta device, and before it is wrapped, sharded or cut.

    Args:
        blocks: names of its modules.
        mode: the key `checkpoint_activations`: none, full, selective, or K: each K-th block in full.

    Raises:
        UserError: there are no blocks, or fewer than K.
    """
    if mode == NONE:
        return
    check_blocks(blocks, mode)
    for number, name in enumerate(blocks, start=1):
        block = model.get_submodule(name)
        block.__class__ = checkpointed_class(cast(Any, type(block)))
        every = mode if isinstance(mode, int) else 1
        how = FULL if isinstance(mode, int) else mode
        cast(CheckpointedBlock, block).recomputes = how if number % every == 0 else NONE


def check_blocks(blocks: Sequence[str], mode: str | int) -> None:
    """Hold `checkpoint_activations` to the blocks that there are; raises UserError."""
    if not blocks and mode != NONE:
        raise UserError(
            f"checkpoint_activations={mode}: the model has no blocks to compute again; give the task a "
            "blocks(model) -> names of modules, or leave it out"
        )
    if isinstance(mode, int) and mode > len(blocks):
        raise UserError(
            f"checkpoint_activations={mode}: the model has {len(blocks)} blocks; allowed are none, full, selective, "
            f"1…{len(blocks)}"
        )


def keeping_all(model: nn.Module) -> nn.Module:
    """A copy of a model whose blocks keep everything, to compare with."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, CheckpointedBlock):
            module.recomputes = NONE
    return plain
