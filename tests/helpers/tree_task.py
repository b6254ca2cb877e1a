"""A task whose inputs are a dataclass with a dict in it, whose targets are a tuple and whose outputs are a dict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss


@dataclass
class Row:
    values: Tensor
    extra: dict[str, Any]


class Rows:
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Row, tuple[Tensor, int]]:
        g = torch.Generator().manual_seed(index)
        x = torch.rand(6, generator=g)
        return Row(x, {"scale": 1.0 + index % 3}), (x.sum() * (1 + index % 3), index % 2)


class Net(nn.Module):
    def __init__(self, hidden: int, depth: int) -> None:
        super().__init__()
        self.first = nn.Linear(6, hidden)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU()) for _ in range(depth))
        self.last = nn.Linear(hidden, 1)

    def forward(self, row: Row) -> dict[str, Tensor]:
        x = self.first(row.values)
        for block in self.blocks:
            x = x + block(x)
        return {"value": self.last(x).flatten() * row.extra["scale"]}


@dataclass
class TreeTask:
    hidden: int = 32
    depth: int = 2
    sizes: list[int] = field(default_factory=lambda: [64, 20])

    def __post_init__(self) -> None:
        self.train_set, self.eval_set = Rows(self.sizes[0]), Rows(self.sizes[1])

    def build_model(self) -> nn.Module:
        return Net(self.hidden, self.depth)

    def loss(self, outputs: dict[str, Tensor], targets: tuple[Tensor, Tensor]) -> Tensor:
        return mse_loss(outputs["value"], targets[0])

    def metrics(
        self, outputs: dict[str, Tensor], targets: tuple[Tensor, Tensor]
    ) -> Mapping[str, tuple[Tensor, Tensor]]:
        return {
            "even_mae": (((outputs["value"] - targets[0]).abs() * (targets[1] == 0)).sum(), (targets[1] == 0).sum())
        }

    lower_is_better = ("even_mae",)
