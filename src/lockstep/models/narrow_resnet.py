"""ResNet-18 with a quarter of its channels, and its modules under their names: a proof needs no more (recipes.verify)."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

SHARE = 4  # of the channels, one of so many is left
NARROW_GROUPS = 32 // SHARE  # of GroupNorm: as many channels per group as the whole model has


class NarrowResNet18(ResNet):
    """0.7 million weights in place of 11 million; 16, 32, 64 and 128 channels. Arguments are torchvision's."""

    def __init__(self, num_classes: int, zero_init_residual: bool, norm_layer: Callable[..., nn.Module]) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes, zero_init_residual, norm_layer=norm_layer)
        stem = 64 // SHARE
        self.conv1, self.bn1 = nn.Conv2d(3, stem, 7, 2, 3, bias=False), norm_layer(stem)
        self.fc = nn.Linear(512 // SHARE, num_classes)

    def _make_layer(
        self, block: type, planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        if planes == 64:  # the first layer's input is the stem's
            self.inplanes = 64 // SHARE
        return super()._make_layer(block, planes // SHARE, blocks, stride, dilate)
