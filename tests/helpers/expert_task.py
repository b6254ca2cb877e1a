"""A task of one's own with experts: two layers of affine maps, three experts each, a router that picks one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

WIDTH = 5


class Maps(nn.Module):
    """Affine maps, [E, width, width] and [E, width]; which one a row takes is worked out in one product, without a loop."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.weight = nn.Parameter(torch.randn(experts, WIDTH, WIDTH) / WIDTH**0.5)
        self.bias = nn.Parameter(torch.randn(experts, WIDTH))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        mine = torch.repeat_interleave(torch.arange(len(counts)), counts)
        weight = self.inner.get_parameter("weight")
        return torch.einsum("nij,nj->ni", weight[mine], rows) + self.bias[mine]


class Layer(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.router, self.maps = nn.Linear(WIDTH, experts), Maps(experts)

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.router(x).softmax(-1).max(-1)
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=self.router.out_features)
        return x + torch.tanh(share[:, None] * self.maps(x[order], counts)[order.argsort()])


@dataclass
class Affine:
    """Forty rows of numbers, to train on and the first 15 to evaluate on."""

    maps: int = 3

    def __post_init__(self) -> None:
        x = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(1))
        self.train_set, self.eval_set = (TensorDataset(part, part.roll(1, 1).sin()) for part in (x, x[:15]))

    def build_model(self) -> nn.Module:
        return nn.Sequential(*(Layer(self.maps) for _ in range(2)))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets)

    def expert_parallel_modules(self, model: nn.Module) -> list[str]:
        return ["*.maps"]
