"""Layers that a run does not train, and that must not change all the same."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def hold_statistics(model: nn.Module) -> None:
    """Keep every BatchNorm none of whose parameters is trained in eval mode, whatever `model.train()` says.

    In train mode it would normalise by its batch, and change its running statistics with each forward.
    """
    for layer in model.modules():
        if isinstance(layer, _BatchNorm) and not any(parameter.requires_grad for parameter in layer.parameters()):
            layer.eval()
            # Every loop that evaluates calls model.train() afterwards, and that calls each layer's: this one's is deaf.
            layer.train = lambda mode=True, layer=layer: layer  # type: ignore[method-assign,misc]


def release_statistics(model: nn.Module) -> None:
    """Undo `hold_statistics`."""
    for layer in model.modules():
        vars(layer).pop("train", None)  # the class's own is back
    model.train()
