"""Models: torchvision's own, with the stem, the normalisation and the initialisation that the config names."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import resnet

from lockstep.config.schema import ModelConfig
from lockstep.models.parameters import count_parameters
from lockstep.models.resnet import build_model


def model(**changes) -> nn.Module:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    return build_model(ModelConfig(**({"num_classes": 10, "image_size": 32} | changes)))


@pytest.mark.slow_except("resnet18", "resnet50")
@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_at_imagenet_size_the_state_dict_is_torchvision_s(name: str) -> None:
    ours = model(name=name, image_size=224, num_classes=1000)
    theirs = getattr(resnet, name)()
    theirs.load_state_dict(ours.state_dict())
    assert count_parameters(ours)[0] == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(("size", "pixels"), [(8, 8), (32, 32), (64, 64), (96, 24), (224, 56)])
def test_the_stem_keeps_the_pixels_of_small_images(size: int, pixels: int) -> None:
    net = model(image_size=size)
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)  # type: ignore[arg-type]
    assert stem(torch.zeros(1, 3, size, size)).shape == (1, 64, pixels, pixels)


def test_group_norm_leaves_no_batch_norm() -> None:
    kinds = {type(module) for module in model(norm="group").modules()}
    assert nn.GroupNorm in kinds
    assert nn.BatchNorm2d not in kinds


def test_a_sample_s_output_depends_on_the_batch_only_with_batch_norm() -> None:
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for norm, alone in (("group", True), ("batch", False)):
        net = model(norm=norm, image_size=8).double().train()
        assert torch.allclose(net(images)[:3], net(images[:3]), atol=1e-12) == alone


def test_initialisation_is_the_one_that_is_named() -> None:
    def spread(init: str) -> float:
        return model(init=init).layer4[1].conv2.weight.std().item()  # type: ignore[index, union-attr]

    fan = 512 * 9  # fan_in and fan_out of that layer
    assert spread("kaiming") == pytest.approx((2 / fan) ** 0.5, rel=0.01)
    assert spread("xavier") == pytest.approx((2 / (2 * fan)) ** 0.5, rel=0.01)


def test_the_seed_decides_the_weights() -> None:
    first, second = model().state_dict(), model().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_frozen_parameters_are_counted_apart() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    assert count_parameters(net) == (3 * 4 + 4 + 4 * 2 + 2, 4 * 2 + 2)
