"""How many parameters a model has, and the model within a wrapper."""

from __future__ import annotations

from torch import nn


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters of a model."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trainable in sizes if trainable)


def unwrap(model: nn.Module) -> nn.Module:
    """The module that a wrapper like DistributedDataParallel holds under the name `module`."""
    inner = getattr(model, "module", None)
    return inner if isinstance(inner, nn.Module) else model
