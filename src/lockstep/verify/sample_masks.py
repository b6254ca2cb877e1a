"""Dropout in a proof: masks that are a function of the sample and the layer, so that it does not matter which rank draws.

Trainings of one process and of several draw from other generators, or in another order, and dropout then drops other
numbers: both are right, and nothing can be compared. Within `sample_masks` a mask is computed from the sample's own numbers,
the name of the layer and the place of the number, by splitmix64's finaliser (https://doi.org/10.1145/2660193.2660195), by
whichever rank needs it, and once more where a block is computed again. Ranks that hold slices of a sequence already take
slices of the whole mask (SlicedDropout, PlacedDropout), which is computed likewise. What is scaled, cut, recomputed,
averaged and weighted around the masks is the recipe's own. Its generators are not looked at: those are held by
tests/ranks/test_tensor_parallel.py, test_context_parallel.py and test_resume.py.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as hooks
from torch.utils._pytree import tree_leaves

from lockstep.verify.watching import plain_name


def drops(model: nn.Module) -> bool:
    """Whether a model drops anything at all."""
    return any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 for module in model.modules())


class SampleMasks:
    """The stand-in of F.dropout, and what it must know: the samples that the model was last called with, and the layer.

    Attributes:
        keys: [N], one number per sample.
        keyed: whether they are of the call that is going on.
        stack: the modules whose forward is going on, each with its number of masks so far.
    """

    def __init__(self) -> None:
        self.keys = torch.zeros(0, dtype=torch.int64)
        self.keyed = False
        self.stack: list[list[Any]] = []
        self.names: dict[nn.Module, str] = {}

    def enter(self, module: nn.Module, args: Any) -> None:
        # A block that backward computes again is called from nowhere, too; its samples are still those of the forward.
        if not self.keyed and torch._C._current_graph_task_id() == -1:
            leaf = next((each for each in tree_leaves(args) if isinstance(each, Tensor) and each.dim()), None)
            if leaf is not None:
                self.keys, self.keyed = sample_keys(leaf), True
                self.name(module)
        self.stack.append([module, 0])

    def name(self, model: nn.Module) -> None:
        """Dropouts by their order, which no wrapping changes; others that call F.dropout by name."""
        if model in self.names:
            return
        number = 0
        for name, each in model.named_modules():
            dropout = isinstance(each, nn.modules.dropout._DropoutNd)
            self.names[each] = f"dropout {number}" if dropout else plain_name(name)
            number += dropout

    def leave(self, *_: Any) -> None:
        self.stack.pop()
        self.keyed = self.keyed and bool(self.stack)

    def dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return x
        if not self.stack or x.shape[0] != len(self.keys):
            raise RuntimeError(
                f"dropout of {list(x.shape)} is not of the {len(self.keys)} samples in its first dimension, which masks are "
                "made by here; set its probability to 0 to verify the rest"
            )
        self.stack[-1][1] += 1
        module, number = self.stack[-1]
        layer = zlib.crc32(f"{self.names.get(module, '')} {number}".encode())
        places = torch.arange(x[0].numel(), device=x.device)
        mixed = mix(self.keys.to(x.device)[:, None] + mix(places + (layer << 32)))
        kept = (mixed & (2**31 - 1)).view(x.shape) >= p * 2**31
        return x * kept / (1 - p)


def sample_keys(inputs: Tensor) -> Tensor:
    """[N, …] → [N]: a number for each sample, from all of its own."""
    whole = inputs if not inputs.is_floating_point() else inputs.float().view(torch.int32)
    flat = whole.long().flatten(1) if whole.dim() > 1 else whole.long()[:, None]
    return mix(flat + mix(torch.arange(flat.shape[1], device=flat.device))).sum(1)


def mix(numbers: Tensor) -> Tensor:
    """splitmix64's finaliser, int64 with the sign's bits shifted in."""
    numbers = (numbers ^ (numbers >> 30)) * -0x40A7B892E31B1A47
    numbers = (numbers ^ (numbers >> 27)) * -0x6B2FB644ECCEEE15
    return numbers ^ (numbers >> 31)


@contextlib.contextmanager
def sample_masks() -> Iterator[None]:
    """Within it, F.dropout and what calls it drop by sample and layer."""
    masks, before = SampleMasks(), functional.dropout
    handles = [
        hooks.register_module_forward_pre_hook(masks.enter),
        hooks.register_module_forward_hook(masks.leave, always_call=True),
    ]
    functional.dropout = masks.dropout  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.dropout = before
        for handle in handles:
            handle.remove()
