"""Tabular regression: how far diabetes has come in a year, from ten measurements of 442 patients.

    python -m recipes.ddp task=examples/tabular.py:Diabetes global_batch_size=38 epochs=60
    python -m recipes.fsdp task=examples/tabular.py:Diabetes global_batch_size=38 epochs=60 task.hidden=128

Expect: a mean absolute error of about 47, where the targets' standard deviation is 77, in less than a minute.
Source: https://scikit-learn.org/stable/datasets/toy_dataset.html#diabetes-dataset
"""

from dataclasses import dataclass

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

HELD_OUT = 100  # patients that the model is evaluated on


@dataclass
class Diabetes:
    hidden: int = 64
    dropout: float = 0.0

    lower_is_better = ("mae",)
    best = "mae"
    unit = "patients"

    def __post_init__(self) -> None:
        measured, progress = load_diabetes(return_X_y=True)
        inputs = torch.tensor(measured / measured.std(0), dtype=torch.float32)
        targets = torch.tensor(progress, dtype=torch.float32)
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
        evaluated, trained = order[:HELD_OUT], order[HELD_OUT:]
        self.mean, self.spread = float(targets[trained].mean()), float(targets[trained].std())
        self.train_set = TensorDataset(inputs[trained], targets[trained])
        self.eval_set = TensorDataset(inputs[evaluated], targets[evaluated])

    def build_model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(10, self.hidden), nn.ReLU(), nn.Dropout(self.dropout), nn.Linear(self.hidden, 1), nn.Flatten(0)
        )

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, (targets - self.mean) / self.spread)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, tuple[Tensor, int]]:
        """Sums that any number of batches and ranks can add up; `summarise` makes mae and r2 of them."""
        error = outputs * self.spread + self.mean - targets
        squares = torch.stack([error.square().sum(), targets.sum(), targets.square().sum()])
        return {"mae": (error.abs().sum(), len(targets)), "r2": (squares, len(targets))}

    def summarise(self, totals: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
        (errors, count), (squares, _) = totals["mae"], totals["r2"]
        unexplained, total, total_of_squares = squares.tolist()
        return {"mae": float(errors / count), "r2": 1 - unexplained / (total_of_squares - total**2 / float(count))}
