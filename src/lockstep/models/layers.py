"""Layers that a GPT's blocks are made of, whose weights `GPT.init_weights` draws."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LayerT = TypeVar("LayerT", nn.Embedding, nn.Linear)


def projection(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer without a bias."""
    return undrawn(nn.Linear(inputs, outputs, bias=False, device="meta"))


def undrawn(layer: LayerT) -> LayerT:
    """A layer that was made on the meta device, with memory for its weight on torch's default device.

    Made there at once it would draw weights that `init_weights` replaces: many seconds for 1B, and other random numbers
    than those that `init_weights` alone draws.
    """
    layer.weight = nn.Parameter(torch.empty(layer.weight.shape))
    return layer


class SwiGLU(nn.Module):
    """[N, T, width] to [N, T, width]: down(silu(gate(x)) · up(x))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = projection(width, hidden)
        self.up = projection(width, hidden)
        self.down = projection(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))
