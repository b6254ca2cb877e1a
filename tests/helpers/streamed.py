"""A task on a stream of samples of unequal length, with random numbers in them, for the tests of streams."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset


class Numbers(IterableDataset[tuple[Tensor, Tensor]]):
    """Sequences of 1 to 4 numbers, and their sums; from `first` on, each `step`-th."""

    def __init__(self, size: int, first: int = 0, step: int = 1) -> None:
        self.size, self.first, self.step, self.epoch, self.reads = size, first, step, 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def sample(self, number: int) -> tuple[Tensor, Tensor]:
        self.reads += 1
        values = torch.tensor([number / 50, self.epoch / 10, random.random(), torch.rand(()).item()])[: 1 + number % 4]
        return values, values.sum()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(self.first, self.size, self.step):
            yield self.sample(number)


class Addressed(Numbers):
    """The same, with the convention of torchdata's StatefulDataLoader."""

    at = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        begin, self.at = self.at, 0
        for number in range(self.first + begin * self.step, self.size, self.step):
            begin += 1
            self.done = begin
            yield self.sample(number)

    def state_dict(self) -> dict[str, Any]:
        return {"done": getattr(self, "done", 0)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["done"]


@dataclass
class Streamed:
    addressed: bool = False
    per_rank: bool = False
    length: int = 50
    epoch_samples: int | None = 48

    def __post_init__(self) -> None:
        kind = Addressed if self.addressed else Numbers
        ranks = dist.is_initialized() and self.per_rank
        self.train_set = kind(self.length, *((dist.get_rank(), dist.get_world_size()) if ranks else ()))
        self.eval_set = Numbers(21)
        self.stream_per_rank = self.per_rank

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1), nn.Flatten(0))

    def collate(self, samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        inputs = pad_sequence([values for values, _ in samples] + [torch.zeros(4)], batch_first=True)[:-1]
        return inputs, torch.stack([total for _, total in samples])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return mse_loss(outputs, targets)
