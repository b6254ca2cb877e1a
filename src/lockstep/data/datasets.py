"""Labelled sets of images, in memory or in files, and which of them a config names.

How files are read and checked is lockstep.data.image_files' matter, how they are cropped lockstep.data.transforms'.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lockstep.config.schema import DataConfig
from lockstep.data.image_files import (
    DIGIT_CLASSES,
    chosen_classes,
    cifar10_files,
    data_root,
    read_cifar,
    read_digits,
)
from lockstep.data.image_folder import list_image_folder
from lockstep.data.transforms import center_crop, decode, random_crop, resized_crop


class ImageDataset(Protocol):
    """A labelled set of images, asked for whole batches.

    Attributes:
        draws: random numbers in [0, 1) that a sample is augmented by; 0: it is not.
    """

    classes: int
    labels: Tensor
    draws: int

    def __len__(self) -> int: ...

    def fetch(self, samples: Tensor, draws: Tensor | None) -> tuple[Tensor, Tensor]:
        """Images [N, 3, H, W] uint8, and labels [N] int64, of samples [N] and their random numbers [N, draws]."""
        ...

    def checksum(self) -> int:
        """Of what tells this set from another."""
        ...


DRAWS = 5  # random numbers a sample may use: area, aspect, two positions, flip


class InMemoryImages:
    """Images held as one uint8 tensor [N, 3, H, W]; a batch is one gather, an augmentation one more.

    Augmentation shifts by up to `shift` pixels, the border filled with black, and mirrors where `flip`.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: int, shift: int, flip: bool) -> None:
        self.images, self.labels, self.classes = images, labels, classes
        self.shift, self.flip, self.draws = shift, flip, 0

    def __len__(self) -> int:
        return len(self.labels)

    def checksum(self) -> int:
        return checksum(self.labels)

    def fetch(self, samples: Tensor, draws: Tensor | None) -> tuple[Tensor, Tensor]:
        images = self.images.index_select(0, samples)  # bytes by the row; images[samples] copies them one by one
        if draws is not None:
            images = self._augment(images, draws)
        return images, self.labels[samples]

    def _augment(self, images: Tensor, draws: Tensor) -> Tensor:
        count, _, height, width = images.shape
        top, left = (draws[:, 2:4] * (2 * self.shift + 1)).long().unbind(1)
        windows = F.pad(images, [self.shift] * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view: all shifts
        # NumPy copies row by row what torch's index would copy byte by byte, at a sixth of the speed.
        picked = windows.numpy()[np.arange(count), :, top.numpy(), left.numpy()]
        if self.flip:
            mirrored = (draws[:, 4] < 0.5).numpy()
            picked[mirrored] = picked[mirrored][..., ::-1]
        return torch.from_numpy(picked)


class ImageFiles:
    """`root/<class>/*.jpg`, the ImageNet layout: decoded when fetched, cropped to size × size.

    For training, Inception's crop (https://arxiv.org/abs/1409.4842: 8 to 100 % of the area, sides 3:4 to 4:3) and
    a mirror image every other time; for evaluation the centre crop of the image resized to size · 256 / 224.
    """

    def __init__(self, root: Path, size: int) -> None:
        self.size, self.draws = size, 0
        self.paths, labels, self.names, _ = list_image_folder(root)
        self.classes = len(self.names)
        self.labels = torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.paths)

    def checksum(self) -> int:
        """Of names and labels; what is in the files would take too long."""
        return checksum(self.labels, self.paths)

    def fetch(self, samples: Tensor, draws: Tensor | None) -> tuple[Tensor, Tensor]:
        images = [
            self._load(self.paths[sample], None if draws is None else draws[i].tolist())
            for i, sample in enumerate(samples.tolist())
        ]
        return torch.cat(images), self.labels[samples]

    def _load(self, path: str, draws: list[float] | None) -> Tensor:
        """One image, [1, 3, size, size] in the memory format that decoders write and convolutions like best."""
        image = decode(path)
        _, height, width = image.shape
        if draws is None:
            return resized_crop(image, center_crop(height, width), self.size)
        image = resized_crop(image, random_crop(height, width, draws), self.size)
        return image.flip(3) if draws[4] < 0.5 else image


class ImageSubset:
    """The samples of some classes, whose labels become 0…n − 1 in the order of `chosen`."""

    def __init__(self, images: ImageDataset, chosen: list[int]) -> None:
        self._images, self.classes = images, len(chosen)
        self._relabel = torch.full((images.classes,), -1)
        self._relabel[chosen] = torch.arange(len(chosen))
        relabelled = self._relabel[images.labels]
        self._samples = (relabelled >= 0).nonzero().squeeze(1)
        self.labels = relabelled[self._samples]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def draws(self) -> int:
        return self._images.draws

    @draws.setter
    def draws(self, draws: int) -> None:
        self._images.draws = draws

    def checksum(self) -> int:
        return zlib.crc32(checksum(self.labels).to_bytes(8, "little"), self._images.checksum())

    def fetch(self, samples: Tensor, draws: Tensor | None) -> tuple[Tensor, Tensor]:
        images, labels = self._images.fetch(self._samples[samples], draws)
        return images, self._relabel[labels]


def load_data(config: DataConfig, image_size: int, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """(training set, evaluation set) of `config.name`; imagefolder decodes to image_size × image_size.

    Raises:
        UserError: a folder or a file is not what its format says.
    """
    names = DIGIT_CLASSES
    if config.name == "digits":
        sets = digits()
    elif config.name == "synthetic":
        sets = synthetic(config, seed)
    elif config.name == "cifar10":
        sets = cifar10(data_root(config))
    else:
        train, val = (ImageFiles(data_root(config) / part, image_size) for part in ("train", "val"))
        sets, names = (train, val), train.names
    sets[0].draws = DRAWS if config.augment else 0
    if config.classes is None:
        return sets
    chosen = chosen_classes(config, names)
    return ImageSubset(sets[0], chosen), ImageSubset(sets[1], chosen)


def digits() -> tuple[ImageDataset, ImageDataset]:
    """scikit-learn's digits: 1,797 scans of 8 × 8 pixels, 10 classes; 1,437 to train on, 360 to evaluate."""

    def hold(grey: np.ndarray, labels: np.ndarray) -> InMemoryImages:
        images = torch.from_numpy(grey)[:, None].repeat(1, 3, 1, 1)  # a ResNet takes 3 channels
        return InMemoryImages(images, torch.from_numpy(labels), 10, shift=1, flip=False)  # a mirrored 2 is no digit

    train, test = read_digits()
    return hold(*train), hold(*test)


def synthetic(config: DataConfig, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """`data.size` images of noise with random labels, a quarter as many to evaluate: for measuring, not learning."""
    classes = config.num_classes or 10
    generator = torch.Generator().manual_seed(seed)

    def make(count: int) -> InMemoryImages:
        shape = (count, 3, config.image_size, config.image_size)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, classes, (count,), generator=generator)
        return InMemoryImages(images, labels, classes, shift=4, flip=True)

    return make(config.size), make(max(1, config.size // 4))


def cifar10(root: Path) -> tuple[ImageDataset, ImageDataset]:
    """CIFAR-10 from its published files, binary or Python, whichever folder is in `root`.

    Source and format: https://www.cs.toronto.edu/~kriz/cifar.html. Augmented as in He et al.: 4 pixels, mirrored.
    """
    train_files, test_files = cifar10_files(root)

    def read(files: list[Path]) -> InMemoryImages:
        parts = [read_cifar(file) for file in files]
        images, labels = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True))
        return InMemoryImages(images.view(-1, 3, 32, 32), labels.long(), 10, shift=4, flip=True)

    return read(train_files), read(test_files)


def checksum(labels: Tensor, paths: Sequence[str] = ()) -> int:
    """Of labels, and of the last two parts of files' names."""
    names = "\n".join("/".join(Path(path).parts[-2:]) for path in paths)
    return zlib.crc32(os.fsencode(names), zlib.crc32(labels.numpy().tobytes()))
