"""MNIST-1D: 4,000 digits of 40 numbers each to train on and 1,000 to evaluate on, which the package makes by itself.

Data and models: https://github.com/greydanus/mnist1d (https://arxiv.org/abs/2011.14439), whose README says what each model
reaches on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from mnist1d.data import get_dataset_args, make_dataset
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

CHANNELS = 25


@cache
def digits() -> dict[str, Any]:
    """Four seconds of work, once for all forked ranks."""
    return dict(make_dataset(get_dataset_args()))


@dataclass
class Mnist1d:
    """Attributes:
    model: linear, or the authors' cnn: three convolutions, of 25 channels each.
    """

    model: str = "cnn"

    best = "accuracy"
    unit = "signals"

    def __post_init__(self) -> None:
        found = {name: torch.tensor(digits()[name]) for name in ("x", "y", "x_test", "y_test")}
        self.train_set = TensorDataset(found["x"].float(), found["y"])
        self.eval_set = TensorDataset(found["x_test"].float(), found["y_test"])

    def build_model(self) -> nn.Module:
        if self.model == "linear":
            return nn.Linear(40, 10)
        return nn.Sequential(
            nn.Unflatten(1, (1, 40)),
            nn.Conv1d(1, CHANNELS, 5, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv1d(CHANNELS, CHANNELS, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv1d(CHANNELS, CHANNELS, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(5 * CHANNELS, 10),
        )

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, tuple[Tensor, int]]:
        return {"accuracy": ((outputs.argmax(1) == targets).sum(), len(targets))}
