"""How many parameters a model has, which of them are its head, and the model within a wrapper."""

from __future__ import annotations

from torch import nn

from lockstep.errors import UserError

NO_HEAD = "\0"  # where names that begin with a head's are left out: none does with this


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters of a model."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trainable in sizes if trainable)


def unwrap(model: nn.Module) -> nn.Module:
    """The module that a wrapper like DistributedDataParallel holds under the name `module`."""
    inner = getattr(model, "module", None)
    return inner if isinstance(inner, nn.Module) else model


def head_of(model: nn.Module) -> str:
    """What the names of the parameters of a model's last layer begin with: `fc.`, `classifier.3.`, `heads.head.`.

    It is the last Linear or, where there is none, as in SqueezeNet, the last 2-dimensional convolution.

    Raises:
        UserError: the model has neither.
    """
    for kind in (nn.Linear, nn.Conv2d):
        if found := [name for name, module in model.named_modules() if isinstance(module, kind) and name]:
            return f"{found[-1]}."
    raise UserError(
        f"{type(model).__name__}: has no Linear and no Conv2d below it, so no head that could be told from its backbone; "
        "train the whole of it with recipes.ddp resume=PATH"
    )
