"""pytorch/examples' imagenet/main.py, unmodified, started as `examples.py FOLDER IMAGES main.py --dummy …`.

Its dummy images, of which it makes 1.3 million one by one and through PIL, come from memory and are IMAGES. What it
writes goes into FOLDER.
"""

import os
import runpy
import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets


class InMemory(Dataset[tuple[Tensor, int]]):
    def __init__(self, size: int, shape: tuple[int, int, int], classes: int, transform: Any) -> None:
        self.images, self.size = torch.rand(64, *shape), IMAGES if size > 100_000 else 64  # to train on, to validate

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return self.images[number % len(self.images)], number % 10


if __name__ == "__main__":
    folder, IMAGES = sys.argv[1], int(sys.argv[2])
    datasets.FakeData = InMemory
    sys.argv = sys.argv[3:]
    os.chdir(folder)
    runpy.run_path(sys.argv[0], run_name="__main__")
