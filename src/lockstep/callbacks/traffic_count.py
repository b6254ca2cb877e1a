"""With `profile=N`: what a rank hands to its collectives in a step, into result.json."""

from __future__ import annotations

from lockstep.callbacks.base import Callback, CallbackContext
from lockstep.callbacks.step_time import StepTimeMonitor
from lockstep.distributed.collectives import gather_objects
from lockstep.distributed.traffic import TrafficCounter
from lockstep.training.timing import warm_up


class TrafficCount(Callback):
    """Counts in the warm-up, whose steps are not timed; where ranks talk in one step of many, in so many steps after it.

    It sees operations one by one, which compiled code does not have: with compile=true nothing is counted.

    Args:
        profiled: steps that are profiled after the warm-up, and not counted.
        step_time: what is not to time the counted steps.
    """

    def __init__(self, profiled: int, step_time: StepTimeMonitor) -> None:
        self._profiled, self._step_time = profiled, step_time
        self._steps = range(0)  # that are counted, by the number of steps done before each
        self._counter: TrafficCounter | None = None
        self._late = False  # counted are steps that would be timed

    @property
    def distorts_time(self) -> bool:  # type: ignore[override]
        return self._late and self._counter is not None

    def on_train_begin(self, context: CallbackContext) -> None:
        left, apart = context.total_steps - context.step, context.config.steps_between_exchanges
        early = warm_up(left)
        begin = context.step + (0 if apart <= early else early + self._profiled)
        number = early if apart <= early else apart
        if number and not context.config.compile and begin + number <= context.total_steps:
            self._steps = range(begin, begin + number)
            self._late, self._sent = apart > early, 0

    def on_step_begin(self, context: CallbackContext) -> None:
        if context.step in self._steps:
            if self._late and context.step == self._steps[0]:
                self._since = self._step_time.now()
            self._counter = TrafficCounter()
            self._counter.__enter__()

    def on_step_end(self, context: CallbackContext) -> None:
        if not self._counter:
            return
        self._counter.__exit__(None, None, None)
        self._sent += self._counter.sent()
        self._counter = None
        if context.step == self._steps[-1] + 1:
            mine = self._sent / len(self._steps)
            context.note("", sent_bytes_by_rank=gather_objects(mine, context.world.control))
            if self._late:
                self._step_time.leave_out(len(self._steps), self._since)
