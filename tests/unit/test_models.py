"""Models: torchvision's own, with the stem, the normalisation and the initialisation that the config names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import resnet

from lockstep.config.schema import ModelConfig
from lockstep.errors import UserError
from lockstep.models.parameters import count_parameters, head_of
from lockstep.models.resnet import build_model
from lockstep.models.torchvision_models import check_model


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


def test_the_narrow_one_has_the_modules_of_the_whole_one() -> None:
    for size in (8, 96):
        narrow, whole = (model(name=name, image_size=size, norm="group") for name in ("narrow_resnet18", "resnet18"))
        assert [*narrow.state_dict()] == [*whole.state_dict()]
        assert narrow(torch.zeros(1, 3, size, size)).shape == (1, 10)
        for mine, theirs in zip(narrow.modules(), whole.modules(), strict=True):
            if isinstance(theirs, nn.GroupNorm):
                assert isinstance(mine, nn.GroupNorm)
                assert mine.num_channels * 4 == theirs.num_channels
                assert mine.num_channels // mine.num_groups == theirs.num_channels // theirs.num_groups


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


OTHERS = {  # {name: side of the images}
    "vit_b_32": 64,
    "convnext_tiny": 32,
    "efficientnet_b0": 32,
    "mobilenet_v3_small": 8,
    "swin_t": 32,
    "densenet121": 32,
    "googlenet": 32,
    "regnet_y_400mf": 32,
    "squeezenet1_1": 32,
    "maxvit_t": 224,
}


@pytest.mark.slow_except("mobilenet_v3_small", "vit_b_32", "regnet_y_400mf", "googlenet")
@pytest.mark.parametrize("name", OTHERS)
def test_any_classification_model_of_torchvision_by_its_name(name: str) -> None:
    config = ModelConfig(name=name, num_classes=7, image_size=OTHERS[name])
    check_model(config)
    assert (config.norm, config.init) == ("own", "own")
    images = torch.randn(2, 3, OTHERS[name], OTHERS[name])
    outputs = build_model(config)(images)
    assert outputs.shape == (2, 7)
    with torch.device("meta"):
        assert {tensor.device.type for tensor in build_model(config).state_dict().values()} == {"meta"}


def test_group_norm_in_any_model_that_has_batch_norm() -> None:
    config = ModelConfig(name="mobilenet_v3_small", num_classes=7, image_size=8, norm="group")
    check_model(config)
    net = build_model(config).eval()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    groups = {module.num_channels: module.num_groups for module in net.modules() if isinstance(module, nn.GroupNorm)}
    assert groups[16] == 16
    assert groups[24] == 8
    assert groups[576] == 32
    assert net(torch.randn(1, 3, 8, 8)).shape == (1, 7)


def test_a_model_s_own_arguments_reach_it() -> None:
    config = ModelConfig(name="convnext_tiny", num_classes=7, image_size=32, arguments={"stochastic_depth_prob": 0.5})
    check_model(config)
    assert build_model(config).features[7][2].stochastic_depth.p == 0.5  # type: ignore[index, union-attr]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "vit_b16"}, ["model=vit_b16", "resnet18", "nearest: vit_b_16"]),
        ({"name": "vit_b_16", "image_size": 40}, ["model.image_size=40", "16 × 16", "image_size=32 or 48"]),
        ({"name": "densenet121", "image_size": 8}, ["model.image_size=8", "too small", "image_size=224"]),
        ({"name": "swin_t", "norm": "group"}, ["model.norm=group: swin_t has no BatchNorm to replace; leave"]),
        ({"name": "vit_b_32", "norm": "batch"}, ["model.norm=batch: vit_b_32 has no BatchNorm and gets none; leave"]),
        ({"name": "convnext_tiny", "init": "kaiming"}, ["model.init=kaiming", "convnext_tiny has torchvision's"]),
        ({"name": "vgg11", "arguments": {"drop": 1}}, ["model.arguments.drop", "vgg11", "dropout"]),
        ({"name": "vit_b_32", "image_size": 64, "arguments": {"num_layers": 1}}, ["num_layers", "multiple values"]),
        ({"name": "resnet18", "arguments": {"width": 1}}, ["model.arguments={'width': 1}", "resnet18 takes none"]),
    ],
)
def test_what_a_model_cannot_be_is_said_in_one_line(changes: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        check_model(ModelConfig(**({"num_classes": 7, "image_size": 32} | changes)))
    assert "\n" not in str(raised.value)
    assert all(word in str(raised.value) for word in said), str(raised.value)


HEADS = {
    "resnet18": "fc.",
    "vit_b_32": "heads.head.",
    "convnext_tiny": "classifier.2.",
    "efficientnet_b0": "classifier.1.",
    "mobilenet_v3_small": "classifier.3.",
    "swin_t": "head.",
    "densenet121": "classifier.",
    "squeezenet1_1": "classifier.1.",
    "googlenet": "fc.",
}


@pytest.mark.parametrize("name", HEADS)
def test_the_head_is_the_layer_that_tells_the_classes_apart(name: str) -> None:
    with torch.device("meta"):
        shapes = [
            build_model(ModelConfig(name=name, num_classes=classes, image_size=224)).state_dict() for classes in (7, 9)
        ]
    assert head_of(build_model(ModelConfig(name=name, num_classes=7, image_size=224))) == HEADS[name]
    differing = {key for key in shapes[0] if shapes[0][key].shape != shapes[1][key].shape}
    assert differing == {f"{HEADS[name]}weight", f"{HEADS[name]}bias"}
