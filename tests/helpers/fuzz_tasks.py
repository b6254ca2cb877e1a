"""Tasks that the fuzzer draws besides images: small ones, each with what could come apart over a kill or over ranks.

All have 144 samples an epoch and 36 to evaluate on, as the fuzzer's images have.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Subset

from lockstep.tasks.language import Language
from tests.helpers.streamed import Streamed

SIZES = 144, 36
NONE = -1  # a target that does not count


@dataclass
class FewSequences(Language):
    """The built-in language model on a few of its windows, writing no samples."""

    samples: int = 0
    dropout: float = 0.1
    defaults: ClassVar[dict[str, object]] = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.train_set = Subset(self.train_set, range(SIZES[0]))  # type: ignore[assignment]
        self.eval_set = Subset(self.eval_set, range(SIZES[1]))  # type: ignore[assignment]


class Sentences:
    """Index → (numbers [T], classes [T]), T from 1 to 7; drawn anew each time from three generators."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        length = 1 + random.randrange(7)
        values = torch.tensor([(index * 7 + place * 3) % 11 / 11 for place in range(length)])
        values = values + 0.1 * torch.rand(length) + 0.1 * float(np.random.random())
        return values, (values * 4).long().clamp(0, 4)


@dataclass
class Ragged:
    """A class for each number of sentences of unequal length; each number weighs the same."""

    dropout: float = 0.1

    lower_is_better: ClassVar[tuple[str, ...]] = ("error",)
    best: ClassVar[str] = "error"

    def __post_init__(self) -> None:
        self.train_set, self.eval_set = Sentences(SIZES[0]), Sentences(SIZES[1])

    def build_model(self) -> nn.Module:
        layers = (nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(self.dropout)) for _ in range(3))
        return nn.Sequential(nn.Unflatten(-1, (-1, 1)), nn.Linear(1, 8), nn.Sequential(*layers), nn.Linear(8, 5))

    def collate(self, samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        inputs = pad_sequence([values for values, _ in samples], batch_first=True)
        return inputs, pad_sequence([classes for _, classes in samples], batch_first=True, padding_value=NONE)

    def weigh(self, targets: Tensor) -> Tensor:
        return (targets != NONE).sum()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), ignore_index=NONE)

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, tuple[Tensor, Tensor]]:
        counts = targets != NONE
        return {"error": (((outputs.argmax(-1) != targets) & counts).sum(), counts.sum())}


class Points:
    """Index → (numbers [8], their class of three)."""

    def __init__(self, size: int, first: int = 0) -> None:
        self.size, self.first = size, first

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(self.first + index)
        values = torch.rand(8, generator=generator)
        return values + 0.05 * torch.randn(8), int(values.sum() * 3 / 8) % 3


@dataclass
class Weighted:
    """A classifier of points, of which a third is never drawn, and others more often than the rest.

    Attributes:
        norm: `batch` for BatchNorm, `layer` for LayerNorm.
    """

    norm: str = "batch"

    def __post_init__(self) -> None:
        self.train_set, self.eval_set = Points(SIZES[0]), Points(SIZES[1], first=1000)
        self.sample_weights = torch.arange(SIZES[0]) % 3 * 1.5

    def build_model(self) -> nn.Module:
        norm = nn.BatchNorm1d if self.norm == "batch" else nn.LayerNorm
        layers = (nn.Sequential(nn.Linear(16, 16), norm(16), nn.ReLU()) for _ in range(3))
        return nn.Sequential(nn.Linear(8, 16), nn.Sequential(*layers), nn.Linear(16, 3))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, tuple[Tensor, int]]:
        return {"accuracy": ((outputs.argmax(1) == targets).sum(), len(targets))}


@dataclass
class Read(Streamed):
    """A stream that ends within an epoch's batches, and begins anew."""

    length: int = 100
    epoch_samples: int | None = SIZES[0]

    def build_model(self) -> nn.Module:
        layers = (nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        return nn.Sequential(nn.Linear(4, 8), nn.Sequential(*layers), nn.Linear(8, 1), nn.Flatten(0))
