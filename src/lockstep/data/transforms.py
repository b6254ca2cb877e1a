"""From an image file to the floats that a model takes: decoding, cropping, resizing, normalising.

torchvision's functions decode; the crops are ours because their random numbers belong to the sample
(lockstep.data.sampler), and resizing is because bytes in the decoder's own layout are resized at twice the speed.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lockstep.data.image_folder import printable
from lockstep.errors import UserError


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def center_crop(height: int, width: int) -> Box:
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


def decode(path: str) -> Tensor:
    """An image file as [3, H, W] uint8.

    Raises:
        UserError: it is not a readable image.
    """
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms.v2 import functional as transforms

    try:
        content = Path(path).read_bytes()  # torch's own reader takes no name that is not UTF-8
        try:
            image = decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
        except (RuntimeError, ValueError):
            image = _decode_by_pillow(content)
    except Exception as error:  # Pillow's decoders raise anything
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{printable(path)}: not a readable image ({said}); replace it or take it out of data.root"
        ) from None
    image = image[0] if image.ndim == 4 else image  # of an animation, the first frame
    return transforms.to_dtype(image, torch.uint8, scale=True)  # a PNG may have 16 bits


def _decode_by_pillow(content: bytes) -> Tensor:
    """As torchvision.datasets.ImageFolder does, what torch decodes not: BMP, TIFF, animated WebP's first frame, …"""
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def resized_crop(image: Tensor, box: Box, size: int) -> Tensor:
    """A part of an image [3, H, W] resized, [1, 3, size, size], channels_last."""
    top, left, height, width = box
    # Pixel by pixel, as a decoder writes them, torch resizes bytes at twice the speed; but it must be told so by
    # strides that a crop, or a batch of one, does not have by itself.
    pixels = image.permute(1, 2, 0)[None, top : top + height, left : left + width].contiguous()
    return F.interpolate(pixels.permute(0, 3, 1, 2), (size, size), mode="bilinear", antialias=True)


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
