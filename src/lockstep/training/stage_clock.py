"""How long each part of a split model computes and how long it waits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lockstep.training.timing import Stopwatch


class StageClock:
    """Times the parts of a model that one process runs one after the other, forward and backward.

    `enter` and `leave` are identities that stand before and behind each part; activations pass them on their way
    forward, and gradients pass them again on their way back. The copy between two devices lies outside of both. The
    backward ends with the first trained parameter's gradient, which is the last one to be computed.
    """

    def __init__(self, devices: list[torch.device], first_parameter: nn.Parameter) -> None:
        self.busy = [Stopwatch(device) for device in devices]
        self.whole = Stopwatch(devices[0])
        self._one_at_a_time = all(device.type == "cpu" for device in devices)
        self._running: set[int] = set()
        self._step_begun = False
        first_parameter.register_post_accumulate_grad_hook(self._end)

    def enter(self, x: Tensor, part: int) -> Tensor:
        return _ClockMark.apply(x, self, part, True) if torch.is_grad_enabled() else x

    def leave(self, x: Tensor, part: int) -> Tensor:
        return _ClockMark.apply(x, self, part, False) if torch.is_grad_enabled() else x

    def idle_shares(self) -> list[float]:
        """Of the time from a step's first forward to its last backward, the share in which each part waited."""
        return [1 - watch.total() / self.whole.total() for watch in self.busy]

    def start(self, part: int) -> None:
        if not self._step_begun:
            self._step_begun = True
            self.whole.start()
        # On one host a part that starts means that the one before is over, also where no gradient passed its end.
        for other in list(self._running):
            if other == part or self._one_at_a_time:
                self.stop(other)
        self._running.add(part)
        self.busy[part].start()

    def stop(self, part: int) -> None:
        if part in self._running:
            self._running.remove(part)
            self.busy[part].stop()

    def _end(self, _: Any) -> None:
        for part in list(self._running):
            self.stop(part)
        self.whole.stop()
        self._step_begun = False


class _ClockMark(torch.autograd.Function):
    """The identity, which starts or stops a part's watch when it is passed, and the other way round in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: StageClock, part: int, entering: bool) -> Tensor:
        ctx.clock, ctx.part, ctx.entering = clock, part, entering
        (clock.start if entering else clock.stop)(part)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (ctx.clock.stop if ctx.entering else ctx.clock.start)(ctx.part)
        return gradients[0], None, None, None
