"""Data of the packages that people stream with, for the tests: Hugging Face's `datasets`, and WebDataset's tar files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.distributed as dist
import webdataset
from datasets.distributed import split_dataset_by_node
from torch import Tensor, nn
from torch.nn.functional import mse_loss

ROWS = 60
datasets.disable_progress_bars()


def table(rows: int = ROWS) -> datasets.Dataset:
    """Columns x [2] and y, as tensors."""
    columns = {"x": [[row / 60, row % 7 / 7] for row in range(rows)], "y": [row % 5 / 5 for row in range(rows)]}
    return datasets.Dataset.from_dict(columns).with_format("torch")


@dataclass
class HuggingFace:
    """Rows of a table: `kind` is map (a row has a number), stream, shuffled (a stream with a buffer) or per_rank."""

    kind: str = "stream"
    epoch_samples: int | None = ROWS

    def __post_init__(self) -> None:
        self.train_set: Any = table()
        self.eval_set = table(20)
        self.stream_per_rank = self.kind == "per_rank"
        if self.kind == "map":
            self.epoch_samples = None
            return
        self.train_set = self.train_set.to_iterable_dataset(num_shards=6)
        if self.kind == "shuffled":
            self.train_set = self.train_set.shuffle(seed=3, buffer_size=16)
        if self.stream_per_rank and dist.is_initialized():
            self.train_set = split_dataset_by_node(self.train_set, dist.get_rank(), dist.get_world_size())

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1), nn.Flatten(0))

    def collate(self, samples: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
        return torch.stack([each["x"] for each in samples]), torch.stack([each["y"] for each in samples])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return mse_loss(outputs, targets)


def write_shards(folder: Path) -> None:
    """Three tar files of 20 samples each: N.x.pth and N.cls."""
    for shard in range(3):
        with webdataset.TarWriter(str(folder / f"{shard}.tar")) as tar:
            for number in range(20 * shard, 20 * shard + 20):
                x = torch.tensor([number / 60, number % 7 / 7])
                tar.write({"__key__": f"{number:03d}", "x.pth": x, "cls": number % 3})


@dataclass
class Shards:
    """Tar files as WebDataset reads them, shuffled; each rank reads them all and keeps its share."""

    folder: str
    epoch_samples: int | None = ROWS

    def __post_init__(self) -> None:
        self.train_set = self.read().shuffle(10, seed=5).map(self.noisy)
        self.eval_set = self.read()

    def read(self) -> Any:
        files = sorted(str(file) for file in Path(self.folder).glob("*.tar"))
        whole = webdataset.WebDataset(files, shardshuffle=False, nodesplitter=None, workersplitter=None)
        return whole.decode().to_tuple("x.pth", "cls")

    @staticmethod
    def noisy(sample: tuple[Tensor, int]) -> tuple[Tensor, int]:
        return sample[0] + 0.1 * torch.rand(2), sample[1]

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)
