"""torchvision's ResNets, fitted to the image size and the normalisation the config asks for.

Models here know one device and nothing of ranks: parallelism is applied from outside, by the recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from lockstep.config.schema import NARROW, RESNETS, ModelConfig
from lockstep.models.torchvision_models import build_torchvision_model

SMALL_IMAGE = 64  # up to this side, the ImageNet stem (stride 4 in all) would leave almost no pixels


def build_model(config: ModelConfig) -> nn.Module:
    """Build a model on the CPU, in fp32, its weights drawn from torch's global generator: here, a ResNet.

    The model maps images [N, 3, image_size, image_size] to logits [N, num_classes]. With `image_size` above 64 its
    state_dict is torchvision's own, key by key; below, the stem is one 3 × 3 convolution of stride 1 without pooling,
    as He et al. use for CIFAR (https://arxiv.org/abs/1512.03385, section 4.2). With init=zero_residual every block begins
    as the identity, its last norm's weight at zero (https://arxiv.org/abs/1706.02677, section 5.1): a large learning rate
    does no harm at first.
    """
    if config.name not in RESNETS:
        return build_torchvision_model(config)
    from torchvision.models import resnet  # 0.9 s to import: paid by the ranks, not by the process that starts them

    assert config.num_classes is not None, "the app fills in what the data set says"
    assert config.image_size is not None, "the app fills in what the data set says"
    from lockstep.models.narrow_resnet import NARROW_GROUPS, NarrowResNet18

    narrow = config.name == NARROW
    model = (NarrowResNet18 if narrow else getattr(resnet, config.name))(
        num_classes=config.num_classes,
        zero_init_residual=config.init == "zero_residual",
        norm_layer=norm_layer(config.norm, NARROW_GROUPS if narrow else 32),
    )
    if config.image_size <= SMALL_IMAGE:
        model.conv1 = nn.Conv2d(3, model.conv1.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
        model.maxpool = nn.Identity()
    model.apply(partial(init_weights, scheme=config.init))
    return model


def norm_layer(name: str, groups: int = 32) -> Callable[[int], nn.Module]:
    """The layer torchvision calls with a channel count: BatchNorm, or GroupNorm, which no other sample can influence.

    GroupNorm(32) is Wu & He's (https://arxiv.org/abs/1803.08494); every ResNet width is a multiple of 32.
    """
    return partial(nn.GroupNorm, groups) if name == "group" else nn.BatchNorm2d


def init_weights(module: nn.Module, scheme: str) -> None:
    """Initialise one layer, for `model.apply`: Kaiming's fan-out normal or Xavier's uniform.

    Sources: https://arxiv.org/abs/1502.01852 (Kaiming), Glorot & Bengio 2010 (Xavier).
    """
    if isinstance(module, nn.Conv2d | nn.Linear):
        if scheme == "xavier":
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        else:  # the classifier: no ReLU follows it, and fan_out would be its few classes
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="linear")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
