"""Whether training still has finite numbers: looked at where a loss is logged anyway, and before weights are kept.

It costs nothing per step. `gradients.stop_on_nan` looks at every step, and names the layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lockstep.callbacks.base import CallbackContext
from lockstep.callbacks.nan_guard import names_of_false
from lockstep.distributed.collectives import gather_objects, on_any_rank
from lockstep.errors import CheckFailed


class FiniteCheck:
    """Ends a run whose weights are not finite any more; with `gradients.allow_nan` it says so, once.

    All ranks call each method together.

    Args:
        stop: brings to an end what is under way, before the run ends.
    """

    def __init__(self, context: CallbackContext, stop: Callable[[], None]) -> None:
        self._context, self._stop = context, stop
        self._loss_step = context.train_loss_step
        self._said_loss = self._said_weights = False

    def check_loss(self) -> None:
        """Look at a logged loss that has just come in; it is the same on all ranks.

        Raises:
            CheckFailed: neither it nor the weights are finite.
        """
        context, loss = self._context, self._context.train_loss
        if loss is None or context.train_loss_step == self._loss_step:
            return
        self._loss_step = context.train_loss_step
        if math.isfinite(loss) or context.quiet:
            return
        if self.check_weights() and not self._said_loss:
            self._said_loss = True
            context.say(f"step {context.train_loss_step}: the loss is {loss}; the weights are still finite")

    def check_weights(self) -> bool:
        """Whether the weights may be kept: saved, or taken for the best.

        Raises:
            CheckFailed: they are not finite; naming the first one, the step and the rank.
        """
        context = self._context
        if context.quiet:  # a tool judges by itself
            return True
        mine = first_not_finite(context)
        if not on_any_rank(bool(mine), context.device):
            return True
        everyone = gather_objects(mine, context.world.control)
        rank, name = next((rank, name) for rank, name in enumerate(everyone) if name)
        loss, at = context.train_loss, context.train_loss_step
        logged = "" if loss is None or math.isfinite(loss) else f" (the loss of step {at} is {loss})"
        said = f"after step {context.step}, {name} is not finite on rank {rank}{logged}"
        if not context.config.gradients.allow_nan:
            self._stop()
            raise CheckFailed(
                f"{said}; these weights are not saved; lower optim.lr, set gradients.clip_norm, find the layer with "
                "gradients.stop_on_nan=true, or train on with gradients.allow_nan=true"
            )
        if not self._said_weights:
            context.say(f"{said}; gradients.allow_nan=true: training continues, and saves nothing until it is")
        self._said_weights = True
        return False


@torch.no_grad()
def first_not_finite(context: CallbackContext) -> str:
    """The first parameter or buffer in this rank's part of the model that is not finite; empty: all are.

    A buffer may be infinite on purpose, as an attention mask is; it may not be NaN.
    """
    gradients, flags = context.gradients, dict[str, Tensor]()
    for name, parameter in gradients.parameters.items():
        weight = gradients.weight(parameter)
        if may_be_infinite(weight):
            flags[name] = weight.isfinite().all()
    for name, buffer in context.module.named_buffers():
        if may_be_infinite(buffer):
            flags[name] = ~buffer.isnan().any()
    return next(iter(names_of_false(flags, context.device)), "")


def may_be_infinite(tensor: Tensor) -> bool:
    """Of a floating type that torch can look at; it cannot at eight bits."""
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.element_size() > 1
