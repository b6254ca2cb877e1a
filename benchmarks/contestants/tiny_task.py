"""The tiny model and the digits as a task, which recipes/ddp.py trains with every line of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.contestants import work
from lockstep.data.datasets import digits
from lockstep.data.transforms import Normalise
from lockstep.task import Task


class Tiny(Task):
    """Inputs [N, 3, 8, 8], targets [N] int64, outputs [N, 10]. The data sets give whole batches, as bytes."""

    unit = "images"

    def __init__(self) -> None:
        self.train_set, self.eval_set = digits()
        self._normalise = Normalise([work.MEAN] * 3, [work.STD] * 3)

    def build_model(self) -> nn.Module:
        return work.tiny()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets)

    def to_device(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self._normalise(inputs, torch.float32), targets
