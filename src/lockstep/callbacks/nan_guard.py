"""nan_guard."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class NanGuard:
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
        number = len(self._looks)
        self._looks.append(what)
        earlier = self._first.get(tensor.device)
        if earlier is None:
            earlier = torch.tensor(self.NONE, device=tensor.device)
        now = torch.where(tensor.detach().isfinite().all(), self.NONE, number)
        self._first[tensor.device] = torch.minimum(earlier, now)
