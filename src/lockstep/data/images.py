"""Labelled sets of images, in memory or in files, and the loader that reads whole batches of them.

Which samples a batch holds is lockstep.data.sampler's matter, how files are read lockstep.data.image_files'. Images
stay uint8 until they are on the device: a quarter of the bytes to copy.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from lockstep.config.schema import DataConfig
from lockstep.data.image_files import (
    DIGITS,
    chosen_classes,
    cifar10_files,
    list_folder,
    read_cifar,
    read_digits,
    root_of,
)
from lockstep.data.sampler import sample_uniform
from lockstep.distributed.signals import be_a_helper
from lockstep.errors import UserError


class Batch(NamedTuple):
    """images: [N, 3, H, W], uint8 from a loader, normalised floats from `Run.steps`; labels: [N], int64."""

    images: Tensor
    labels: Tensor


# The images -------------------------------------------------------------------------------------------------------


class Images(Protocol):
    """A labelled set of images. `draws` holds each sample's random numbers where the set is to be augmented."""

    classes: int
    labels: Tensor

    def __len__(self) -> int: ...

    def fetch(self, samples: Tensor, draws: Tensor | None) -> Batch: ...


class First:
    """The first samples of a set."""

    def __init__(self, images: Images, size: int) -> None:
        self._images, self._size, self.classes = images, min(size, len(images)), images.classes
        self.labels = images.labels[: self._size]

    def __len__(self) -> int:
        return self._size

    def fetch(self, samples: Tensor, draws: Tensor | None) -> Batch:
        return self._images.fetch(samples, draws)


DRAWS = 5  # random numbers a sample may use: area, aspect, two positions, flip


class InMemoryImages:
    """Images held as one uint8 tensor [N, 3, H, W]; a batch is one gather, an augmentation one more.

    Augmentation shifts by up to `shift` pixels, the border filled with black, and mirrors where `flip`.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: int, shift: int, flip: bool) -> None:
        self.images, self.labels, self.classes = images, labels, classes
        self.shift, self.flip = shift, flip

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, samples: Tensor, draws: Tensor | None) -> Batch:
        images = self.images.index_select(0, samples)  # bytes by the row; images[samples] copies them one by one
        if draws is not None:
            images = self._augment(images, draws)
        return Batch(images, self.labels[samples])

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


class ImageFolder:
    """`root/<class>/*.jpg`, the ImageNet layout: decoded when fetched, cropped to size × size.

    For training, Inception's crop (https://arxiv.org/abs/1409.4842: 8 to 100 % of the area, sides 3:4 to 4:3) and
    a mirror image every other time; for evaluation the centre crop of the image resized to size · 256 / 224.
    """

    def __init__(self, root: Path, size: int) -> None:
        self.size = size
        self.paths, labels, names = list_folder(root)
        self.classes = len(names)
        self.labels = torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.paths)

    def fetch(self, samples: Tensor, draws: Tensor | None) -> Batch:
        images = [
            self._load(self.paths[sample], None if draws is None else draws[i].tolist())
            for i, sample in enumerate(samples.tolist())
        ]
        return Batch(torch.cat(images), self.labels[samples])

    def _load(self, path: Path, draws: list[float] | None) -> Tensor:
        """One image, [1, 3, size, size] in the memory format that decoders write and convolutions like best."""
        image = decode(path)
        _, height, width = image.shape
        if draws is None:
            return resized(image, centre(height, width), self.size)
        image = resized(image, random_crop(height, width, draws), self.size)
        return image.flip(3) if draws[4] < 0.5 else image


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def centre(height: int, width: int) -> Box:
    """The square that is left when an image is resized to 256 and cut to 224."""
    side = round(min(height, width) * 224 / 256)
    return Box((height - side) // 2, (width - side) // 2, side, side)


def random_crop(height: int, width: int, draws: list[float]) -> Box:
    """Inception's crop from four numbers in [0, 1): area, aspect, and two for the place."""
    area = height * width * (0.08 + 0.92 * draws[0])
    aspect = math.exp(math.log(3 / 4) + draws[1] * math.log(16 / 9))
    crop_height = min(height, max(1, round(math.sqrt(area / aspect))))
    crop_width = min(width, max(1, round(math.sqrt(area * aspect))))
    return Box(
        int(draws[2] * (height - crop_height + 1)), int(draws[3] * (width - crop_width + 1)), crop_height, crop_width
    )


def decode(path: Path) -> Tensor:
    """An image file as [3, H, W] uint8.

    Raises:
        UserError: it is not a readable image.
    """
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms.v2 import functional as transforms

    try:
        image = decode_image(str(path), ImageReadMode.RGB)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{path}: not a readable image ({str(error).splitlines()[0]}); replace it or take it out of data.root"
        ) from None
    image = image[0] if image.ndim == 4 else image  # of an animation, the first frame
    return transforms.to_dtype(image, torch.uint8, scale=True)  # a PNG may have 16 bits


def resized(image: Tensor, box: Box, size: int) -> Tensor:
    """A part of an image [3, H, W] resized, [1, 3, size, size], channels_last."""
    top, left, height, width = box
    # Pixel by pixel, as a decoder writes them, torch resizes bytes at twice the speed; but it must be told so by
    # strides that a crop, or a batch of one, does not have by itself.
    pixels = image.permute(1, 2, 0)[None, top : top + height, left : left + width].contiguous()
    return F.interpolate(pixels.permute(0, 3, 1, 2), (size, size), mode="bilinear", antialias=True)


class SomeClasses:
    """The samples of some classes of a set, relabelled 0…n − 1 in the order in which `chosen` has the old labels."""

    def __init__(self, images: Images, chosen: list[int]) -> None:
        self.images, self.classes = images, len(chosen)
        self._new = torch.full((images.classes,), -1)
        self._new[chosen] = torch.arange(len(chosen))
        everyone = self._new[images.labels]
        self._samples = (everyone >= 0).nonzero().squeeze(1)
        self.labels = everyone[self._samples]

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, samples: Tensor, draws: Tensor | None) -> Batch:
        batch = self.images.fetch(self._samples[samples], draws)
        return Batch(batch.images, self._new[batch.labels])


class Normalise:
    """Bytes to floats: x ↦ (x / 255 − mean) / std by channel, as one multiplication and addition in place."""

    def __init__(self, mean: list[float], std: list[float]) -> None:
        self._mean, self._std = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        self._scale = self._shift = torch.empty(0)

    def __call__(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """images: [N, 3, H, W] uint8; floats of the same memory format and device."""
        floats = images.to(dtype)
        if self._scale.shape[1:] != floats.shape[1:]:
            # One whole image each, laid out as the batch is: three numbers to broadcast would break the loops over
            # memory into pieces of one pixel where images are channels_last.
            self._scale, self._shift = (
                torch.empty_like(floats[:1]).copy_(numbers.view(3, 1, 1))
                for numbers in (1 / (255 * self._std), -self._mean / self._std)
            )
        return torch.addcmul(self._shift, floats, self._scale, out=floats)


class Samples(Dataset[Batch]):
    """What a DataLoader reads: a sampler's (epoch, sample numbers) in, a whole Batch out."""

    def __init__(self, images: Images, seed: int, augment: bool) -> None:
        self.images, self.seed, self.augment = images, seed, augment

    def __getitem__(self, key: tuple[int, Tensor]) -> Batch:
        epoch, samples = key
        draws = sample_uniform(self.seed, epoch, samples, DRAWS) if self.augment else None
        return self.images.fetch(samples, draws)


def loader(samples: Samples, sampler: Sampler[tuple[int, Tensor]], workers: int, pin_memory: bool) -> Iterable[Batch]:
    """A DataLoader that asks the dataset for whole batches (`batch_size=None`: nothing to collate).

    `workers` processes fetch ahead, two batches each; 0 fetches in the training process, which is faster for images in
    memory. Pinned memory lets the copy to a GPU run beside the computation. Where there is neither to see to, a
    DataLoader would only take time.
    """
    if not workers and not pin_memory:
        return map(samples.__getitem__, sampler)
    return DataLoader(
        samples,
        sampler=sampler,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=2 if workers else None,
        multiprocessing_context="fork" if workers else None,  # which is what be_a_helper expects
        worker_init_fn=be_a_helper,
        generator=torch.Generator(),  # or it would draw its base seed from training's random numbers
    )


# The data sets ----------------------------------------------------------------------------------------------------


def load_data(config: DataConfig, image_size: int, seed: int) -> tuple[Images, Images]:
    """(training set, evaluation set) of `config.name`; imagefolder decodes to image_size × image_size.

    Raises:
        UserError: a folder or a file is not what its format says.
    """
    if config.name == "digits":
        sets = digits()
    elif config.name == "synthetic":
        sets = synthetic(config, seed)
    elif config.name == "cifar10":
        sets = cifar10(root_of(config))
    else:
        sets = ImageFolder(root_of(config) / "train", image_size), ImageFolder(root_of(config) / "val", image_size)
    if config.classes is None:
        return sets
    names = list_folder(root_of(config) / "train")[2] if config.name == "imagefolder" else DIGITS
    chosen = chosen_classes(config, names)
    return SomeClasses(sets[0], chosen), SomeClasses(sets[1], chosen)


def digits() -> tuple[Images, Images]:
    """scikit-learn's digits: 1,797 scans of 8 × 8 pixels, 10 classes; 1,437 to train on, 360 to evaluate."""

    def hold(grey: np.ndarray, labels: np.ndarray) -> InMemoryImages:
        images = torch.from_numpy(grey)[:, None].repeat(1, 3, 1, 1)  # a ResNet takes 3 channels
        return InMemoryImages(images, torch.from_numpy(labels), 10, shift=1, flip=False)  # a mirrored 2 is no digit

    train, test = read_digits()
    return hold(*train), hold(*test)


def synthetic(config: DataConfig, seed: int) -> tuple[Images, Images]:
    """`data.size` images of noise with random labels, a quarter as many to evaluate: for measuring, not learning."""
    classes = config.num_classes or 10
    generator = torch.Generator().manual_seed(seed)

    def make(count: int) -> InMemoryImages:
        shape = (count, 3, config.image_size, config.image_size)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, classes, (count,), generator=generator)
        return InMemoryImages(images, labels, classes, shift=4, flip=True)

    return make(config.size), make(max(1, config.size // 4))


def cifar10(root: Path) -> tuple[Images, Images]:
    """CIFAR-10 from its published files, binary or Python, whichever folder is in `root`.

    Source and format: https://www.cs.toronto.edu/~kriz/cifar.html. Augmented as in He et al.: 4 pixels, mirrored.
    """
    train_files, test_files = cifar10_files(root)

    def read(files: list[Path]) -> InMemoryImages:
        parts = [read_cifar(file) for file in files]
        images, labels = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True))
        return InMemoryImages(images.view(-1, 3, 32, 32), labels.long(), 10, shift=4, flip=True)

    return read(train_files), read(test_files)


def checksum(images: Images) -> int:
    """Of the labels and, where the images are files, of their names; what is in the files would take too long."""
    names = "\n".join("/".join(path.parts[-2:]) for path in getattr(images, "paths", []))
    return zlib.crc32(names.encode(), zlib.crc32(images.labels.numpy().tobytes()))
