"""A task that hands in torchmetrics' metrics of every kind of state: whole sums, sums, lists, extremes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAUROC, MulticlassCalibrationError, MulticlassF1Score

CLASSES = 4


class Spread(Metric):
    """The range of the logits, by their mean square: states that are reduced by min, max and sum."""

    full_state_update = False
    higher_is_better = False
    least: Tensor
    most: Tensor
    squares: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("least", torch.tensor(torch.inf), "min")
        self.add_state("most", torch.tensor(-torch.inf), "max")
        self.add_state("squares", torch.zeros(CLASSES), "sum")
        self.add_state("seen", torch.tensor(0), "sum")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.least = torch.minimum(self.least, outputs.min())
        self.most = torch.maximum(self.most, outputs.max())
        self.squares += outputs.square().sum(0)
        self.seen += len(targets)

    def compute(self) -> Tensor:
        return (self.most - self.least) / (self.squares.mean() / self.seen)


def points(size: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 6, generator=generator)
    noise = 0.7 * torch.randn(size, CLASSES, generator=generator)
    return TensorDataset(x, (x[:, :CLASSES] + noise).argmax(1))


@dataclass
class Handed:
    hidden: int = 8

    lower_is_better: ClassVar[tuple[str, ...]] = ("calibration", "spread")
    best: ClassVar[str] = "auroc"

    def __post_init__(self) -> None:
        self.train_set, self.eval_set = points(96, 0), points(50, 1)

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, self.hidden), nn.Tanh(), nn.Linear(self.hidden, CLASSES))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, tuple[Any, Any]]:
        return {"right": ((outputs.argmax(1) == targets).sum(), len(targets))}

    def torchmetrics(self) -> Mapping[str, Metric]:
        return {
            "f1": MulticlassF1Score(CLASSES),
            "auroc": MulticlassAUROC(CLASSES),  # needs all predictions at once
            "calibration": MulticlassCalibrationError(CLASSES),
            "spread": Spread(),
        }
