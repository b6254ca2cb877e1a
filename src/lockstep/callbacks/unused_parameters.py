"""Which parameters get no gradient, asked once, in the first step.

They would silently stay as they are. And DistributedDataParallel counts on a gradient of every parameter that asked for
one when it was wrapped: where one never comes, the gradients that travel with it are not averaged, so the ranks part,
and the next forward ends with an error that names no parameter.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lockstep.callbacks.base import Callback, CallbackContext
from lockstep.distributed.collectives import gather_objects
from lockstep.errors import UserError
from lockstep.utils.text import some_of


class UnusedParameters(Callback):
    """Watches the gradients of this start's first step."""

    def __init__(self) -> None:
        self._done = False

    def on_train_begin(self, context: CallbackContext) -> None:
        """Hook into parameters and optimizer.

        Raises:
            UserError: DistributedDataParallel was built over other parameters than those that are trained now.
        """
        named = context.module.named_parameters()
        trained = {name: parameter for name, parameter in named if parameter.requires_grad}
        wrappers = (part for part in context.model.modules() if isinstance(part, DistributedDataParallel))
        self._wrapper = next(wrappers, None)
        if self._wrapper:
            wrapped = self._wrapper._get_ddp_logging_data().get("num_parameter_tensors", len(trained))
            if wrapped != len(trained):
                raise UserError(
                    f"{wrapped} tensors were to be trained when DistributedDataParallel wrapped the model, now "
                    f"{len(trained)} are: it learns there what to average; set requires_grad before, or wrap anew"
                )
        self._without = dict.fromkeys(trained)
        self._hooks: list[Any] = [
            parameter.register_post_accumulate_grad_hook(self._seen(name)) for name, parameter in trained.items()
        ]
        self._hooks.append(context.optimizer.register_step_pre_hook(lambda *_: self._look(trained)))

    def on_step_end(self, context: CallbackContext) -> None:
        """Say which parameters got no gradient, whichever rank has them; a step that was left out does not count.

        Raises:
            UserError: DistributedDataParallel was waiting for them.
        """
        if self._done or not context.updated:
            return
        self._done = True
        mine = self._finish()
        names = list(dict.fromkeys(name for some in gather_objects(mine, context.world.control) for name in some))
        if names:
            context.note("", parameters_without_gradient=names)
            context.say(
                f"warning: no gradient in the first step for {some_of(names)}: not trained; use them, or freeze them"
            )

    def _seen(self, name: str) -> Any:
        def hook(_: Tensor) -> None:
            self._without.pop(name, None)

        return hook

    def _look(self, trained: dict[str, nn.Parameter]) -> None:
        """What sets .grad itself, as pipelines do that put weight gradients off, calls no hook."""
        for name, parameter in trained.items():
            if parameter.grad is not None:
                self._without.pop(name, None)

    def _finish(self) -> list[str]:
        """Remove the hooks; the names of this rank's parameters without a gradient."""
        for hook in self._hooks:
            hook.remove()
        names, wrapper = list(self._without), self._wrapper
        if names and wrapper and not (wrapper.find_unused_parameters or wrapper.static_graph):
            raise UserError(
                f"no gradient in the first step for {some_of(names)}: DistributedDataParallel waits for it, and does "
                "not average others meanwhile; call requires_grad_(False) on what is not used before the wrap, or wrap "
                "with find_unused_parameters=True"
            )
        return names
