"""A ResNet-18 that trains in milliseconds, for tests of everything but its width."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision.models import resnet

# For the first lines of a recipe in a file: the ranks that it starts have the narrow network too, however they start.
NARROW = """
from torchvision.models import resnet

from tests.helpers.narrow_resnet import narrow_resnet18

resnet.resnet18 = narrow_resnet18
"""


class NarrowResNet(resnet.ResNet):
    """ResNet-18's blocks under their names, 32 channels wide: copying 11 million weights would be most of a test."""

    def _make_layer(self, block: Any, planes: int, blocks: int, stride: int = 1, dilate: bool = False) -> nn.Sequential:
        # GroupNorm(32) has one channel a group here, so a layer4 of 1 × 1 pixel would be normalised to nothing.
        return super()._make_layer(block, 32, blocks, stride if planes == 128 else 1, dilate)


def narrow_resnet18(num_classes: int, norm_layer: Any, **options: Any) -> nn.Module:
    model = NarrowResNet(resnet.BasicBlock, [2, 2, 2, 2], num_classes=num_classes, norm_layer=norm_layer, **options)
    model.fc = nn.Linear(32, num_classes)
    return model
