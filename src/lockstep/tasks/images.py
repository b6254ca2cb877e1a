"""`task=images`: labelled images by torchvision's models; what `model=` and `data=` are about."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lockstep.config.schema import RESNETS, Config
from lockstep.data.datasets import ImageDataset, load_data
from lockstep.data.transforms import Normalise
from lockstep.models.resnet import build_model
from lockstep.task import Task
from lockstep.training.precision import DTYPES


class Images(Task):
    """Classification of images: inputs [N, 3, H, W], targets [N] int64, outputs [N, classes].

    The loader gives bytes, which are quicker to move than floats; `to_device` normalises and resizes them.
    """

    unit = "images"
    best = "accuracy"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.decodes = config.data.name == "imagefolder"
        self._normalise = Normalise(config.data.mean, config.data.std)

    @classmethod
    def from_config(cls, config: Config) -> Images:
        return cls(config)

    @property
    def size(self) -> int:
        """Side of the images that the model takes, in pixels."""
        return self.config.model.image_size or self.config.data.image_size

    @cached_property
    def _sets(self) -> tuple[ImageDataset, ImageDataset]:
        return load_data(self.config.data, self.size, self.config.seed)

    @property
    def train_set(self) -> ImageDataset:
        return self._sets[0]

    @property
    def eval_set(self) -> ImageDataset:
        return self._sets[1]

    def build_model(self) -> nn.Module:
        return build_model(self.config.model)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, tuple[Any, Any]]:
        """Accuracy, and of each class the images, those taken for it, and those rightly so, which F1 is made of.

        bincount would wait for the GPU: how long its result is depends on the data.
        """
        taken_for, classes, size = outputs.argmax(1), outputs.shape[1], len(targets)
        right = (taken_for == targets).long()
        one, none = torch.ones_like(right), right.new_zeros(classes)
        counts = [none.scatter_add(0, *each) for each in ((targets, one), (taken_for, one), (targets, right))]
        return {"accuracy": (right.sum(), size), "f1": (torch.stack(counts), size)}

    def summarise(self, totals: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
        right, size = totals["accuracy"]
        return {"accuracy": float(right.double() / size), "f1": macro_f1(*totals["f1"][0].double())}

    def mistakes(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Rows (place in the batch, label, prediction) of the images: [N, 3]; of those taken for what they are, the
        place is -1."""
        taken_for, places = outputs.argmax(1), torch.arange(len(targets), device=targets.device)
        return torch.stack([torch.where(taken_for == targets, -1, places), targets, taken_for], 1)

    def to_device(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        images, size = inputs, self.size
        if images.is_floating_point():
            return images, targets
        if not self.config.channels_last:
            images = images.contiguous()  # an image folder's are channels_last
        images = self._normalise(images, DTYPES[self.config.precision])
        if images.shape[-1] != size:
            images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
        return images, targets

    def example(self, count: int) -> tuple[Tensor, Tensor]:
        """Black images: floats, so that they are not normalised."""
        return torch.zeros(count, 3, self.size, self.size), torch.zeros(count, dtype=torch.int64)

    def describe(self) -> tuple[str, str]:
        """(the model, the data) in words."""
        model, data = self.config.model, self.config.data
        norm = "batch" if model.norm == "own" and model.name in RESNETS else model.norm
        shown = model.name if norm == "own" else f"{model.name}, {norm} norm"
        return shown, f"{data.name}, {self.size} × {self.size} pixels"

    def pictures(self, samples: list[int]) -> Tensor:
        """Images of the evaluation set by their numbers: uint8 [N, 3, H, W]."""
        return self.eval_set.fetch(torch.tensor(samples), None)[0]


def macro_f1(images: Tensor, taken_for: Tensor, right: Tensor) -> float:
    """The mean of the classes' F1 scores, from three counts of each: its images, those taken for it, both.

    torchmetrics computes it, from counts that are exact; classes with none are left out, as in scikit-learn.
    """
    # Here and not above: it takes a second to import, which no start need wait for.
    from torchmetrics.classification import MulticlassF1Score

    metric: Any = MulticlassF1Score(num_classes=len(images), average="macro", sync_on_compute=False)
    metric.tp, metric.fp, metric.fn, metric.tn = right, taken_for - right, images - right, torch.zeros_like(right)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The ``compute`` method")  # that it has not seen predictions is intended
        return float(metric.compute())
