"""Low-rank adapters: a frozen layer plus a product of two small matrices, which are trained, and can be added into it.

Source: https://arxiv.org/abs/2106.09685
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ADAPTER = ("lora_a", "lora_b")  # what an adapted layer has beside its weight, of shapes [r, …] and [outputs, r]


class LoraLinear(nn.Linear):
    """x [..., inputs] to W x + b + scale · B A x. Only A and B are trained; the layer keeps its weight's name."""

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_scale: float

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora_scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


class LoraConv2d(nn.Conv2d):
    """x [N, inputs, H, W] to the convolution plus scale times one with r outputs and, after it, a 1 × 1 one."""

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_scale: float

    def forward(self, x: Tensor) -> Tensor:
        narrow = self._conv_forward(x, self.lora_a.unflatten(1, self.weight.shape[1:]), None)
        return super().forward(x) + self.lora_scale * F.conv2d(narrow, self.lora_b[:, :, None, None])


ADAPTED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: LoraLinear, nn.Conv2d: LoraConv2d}
MERGED = {adapted: plain for plain, adapted in ADAPTED.items()}


def adaptable(model: nn.Module) -> dict[str, int]:
    """The layers that can be adapted, {name: largest rank that makes sense}: Linear, and Conv2d that is not grouped.

    Others that derive from these are left out: MultiheadAttention's, for one, are read and never called.
    """
    found = dict[str, int]()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and type(layer) in (*ADAPTED, *MERGED):
            sides = layer.weight.flatten(1).shape
            found |= {name: min(sides)} if getattr(layer, "groups", 1) == 1 else {}
    return found


def adapt(model: nn.Module, layers: Iterable[str], rank: int, alpha: float) -> None:
    """Give layers of a model their two matrices, in place: A drawn as torch draws a Linear's weight, B zero.

    So the model computes at first what it computed before. The state_dict has two more entries per layer, `lora_a` [rank,
    inputs] (of a convolution inputs · height · width) and `lora_b` [outputs, rank].

    Args:
        layers: of `adaptable`'s.
        rank: of the product B A, the matrices' common size.
        alpha: B A is multiplied by alpha / rank, so that another rank needs no other learning rate.
    """
    for layer in map(model.get_submodule, layers):
        if type(layer) not in ADAPTED:  # it has them already
            continue
        layer.__class__ = ADAPTED[type(layer)]
        assert isinstance(layer, LoraLinear | LoraConv2d)
        weight = layer.weight.flatten(1)
        drawn = torch.empty(rank, weight.shape[1], dtype=weight.dtype, device=weight.device)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
        layer.lora_a, layer.lora_b = nn.Parameter(drawn), nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        layer.lora_scale = alpha / rank


@torch.no_grad()
def merged(model: nn.Module) -> nn.Module:
    """A copy of a model with every product added into its layer's weight: the model as it was before `adapt`."""
    whole = copy.deepcopy(model)
    for layer in whole.modules():
        if isinstance(layer, LoraLinear | LoraConv2d):
            layer.weight += layer.lora_scale * (layer.lora_b @ layer.lora_a).view_as(layer.weight)
            del layer.lora_a, layer.lora_b
            object.__setattr__(layer, "__class__", MERGED[type(layer)])
    return whole
