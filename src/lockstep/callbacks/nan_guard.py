"""`gradients.stop_on_nan`: ends the run at the first number that is not finite, and names layer, step and rank."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lockstep.callbacks.base import Callback, CallbackContext
from lockstep.config.schema import Config
from lockstep.distributed.collectives import gather_objects, on_any_rank
from lockstep.distributed.dtensor import local_shard
from lockstep.errors import CheckFailed


class NanGuard(Callback):
    """Ends the run on all ranks together if anything in a step was not finite on any of them."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._may_overflow = config.precision == "fp16"
        self._finite: dict[str, Tensor] = {}  # of each parameter, whether the gradient that is applied is

    def on_train_begin(self, context: CallbackContext) -> None:
        self._hooks = NonFiniteHooks(
            context.module,
            outputs=not self._config.compile,
            gradients=not self._may_overflow,
            blind=self._config.pipeline_stages > 1,
        )
        self._gradients = context.gradients
        if not self._may_overflow:
            self._gradients.before_update(self._before_update)

    def on_step_begin(self, context: CallbackContext) -> None:
        self._hooks.reset()
        self._finite.clear()

    def on_step_end(self, context: CallbackContext) -> None:
        """Compare what the ranks have found.

        Raises:
            CheckFailed: naming the layer, the step and the rank where it came first.
        """
        found, self._hooks.blind = self._hooks.found(), False
        if found is None and (bad := names_of_false(self._finite, context.device)):  # backward comes from the end
            found = (2, f"the gradient of {bad[-1]}, averaged over the ranks,")
        if not on_any_rank(found is not None, context.device):
            return
        everyone = enumerate(gather_objects(found, None))
        # Forward passes through a pipeline's ranks upwards, backward downwards.
        first = min((each[0], -r if each[0] else r, each[1], r) for r, each in everyone if each is not None)
        raise CheckFailed(
            f"gradients.stop_on_nan: in step {context.step}, {first[2]} is not finite, first on rank {first[3]}; "
            "the step is not saved; lower optim.lr, set gradients.clip_norm, or look closer with +debug=anomaly"
        )

    @torch.no_grad()
    def _before_update(self) -> None:
        for name, parameter in self._gradients.parameters.items():
            gradient = self._gradients.gradient(parameter)
            if gradient is not None:
                self._finite[name] = gradient.isfinite().all()


def names_of_false(flags: dict[str, Tensor], device: torch.device) -> list[str]:
    """The names of the flags that are false, in their order; all are read at once, which waits for the device once."""
    values = torch.stack([flag.to(device) for flag in flags.values()]).tolist() if flags else []
    return [name for name, value in zip(flags, values, strict=True) if not value]


class NonFiniteHooks:
    """Notes the first thing in a step that is not finite on this rank: hooks of modules, and of tensors.

    A hook on each layer's forward looks at its output, and hangs a hook on that tensor, which sees the gradient that
    comes back to it; a hook on each parameter sees the parameter's own gradient. (A module's own full backward hook
    would not do: it wraps the output in a view, which an in-place ReLU behind it may not write to.) Nothing waits for
    the device: a number on it remembers which look was the first to find something, and is read once a step.

    Args:
        outputs: whether to look at layers' outputs; a compiled model's layers are no longer called one by one.
        gradients: whether to look at gradients. Under fp16 they may overflow, which its scaler finds out and skips.
        blind: not to look yet. A pipeline of torch's begins with a forward and a backward of memory that was never
            filled, to learn the shapes; so what is not finite in its first step is seen in the averaged gradients.
    """

    NONE = 2**62

    def __init__(self, module: nn.Module, *, outputs: bool, gradients: bool, blind: bool = False) -> None:
        self._gradients, self.blind = gradients, blind
        self.reset()
        for name, layer in module.named_modules() if outputs else ():
            if not any(layer.children()):
                layer.register_forward_hook(partial(self._forward, name))
        for name, parameter in module.named_parameters() if gradients else ():
            if parameter.requires_grad:
                parameter.register_hook(partial(self._look, (1, f"the gradient of {name}")))

    def reset(self) -> None:
        self._looks: list[tuple[int, str]] = []
        self._first: dict[torch.device, Tensor] = {}  # on each device, the first look that found something

    def found(self) -> tuple[int, str] | None:
        """(0 in forward or 1 in backward, what) of the first look that found something."""
        first = min((int(number.item()) for number in self._first.values()), default=self.NONE)
        return None if first == self.NONE else self._looks[first]

    def _forward(self, name: str, layer: nn.Module, args: Any, output: Any) -> None:
        if not torch.is_grad_enabled() or not isinstance(output, Tensor):
            return  # an evaluation
        self._look((0, f"the output of {name}"), output)
        if output.requires_grad and self._gradients:
            output.register_hook(partial(self._look, (1, f"the gradient of {name}'s output")))

    @torch.no_grad()
    def _look(self, what: tuple[int, str], tensor: Tensor) -> None:
        if self.blind:
            return
        tensor, number = local_shard(tensor.detach()), len(self._looks)
        self._looks.append(what)
        earlier = self._first.get(tensor.device)
        if earlier is None:
            earlier = torch.tensor(self.NONE, device=tensor.device)
        now = torch.where(tensor.isfinite().all(), self.NONE, number)
        self._first[tensor.device] = torch.minimum(earlier, now)
