"""When each operation and each collective of a step would end on some hardware: a roofline, and two queues.

A device computes one operation after the other. Each takes as long as its arithmetic or as the bytes that it reads and
writes, whichever is more, and never less than a launch. Collectives wait in a queue of their own, as on NCCL's stream: one
begins when what it sends has been computed and the one before is done. An operation that needs what a collective brings
waits for it; that is communication which nothing hides. Where hardware cannot do both at once, as CPUs cannot that copy
the messages themselves, each collective is waited for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from lockstep.plan.hardware import Hardware
from lockstep.plan.links import Collective


@dataclass
class StepTimes:
    """Seconds of a step on one rank.

    Attributes:
        compute: in which it computes.
        communication: of all collectives, hidden or not.
        exposed: in which it waits for them.
        kinds: of `compute`, by class of operation.
    """

    compute: float = 0.0
    communication: float = 0.0
    exposed: float = 0.0
    kinds: dict[str, float] = field(default_factory=dict)

    @property
    def step(self) -> float:
        return self.compute + self.exposed


class DeviceClock:
    """The two queues of one device."""

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware
        self.begin()

    def begin(self) -> None:
        """Start a step: both queues are empty."""
        self._now = self._link = 0.0
        self._written: dict[int, float] = {}  # when a storage is ready, by its key
        self.times = StepTimes()

    def operation(
        self, kind: str, flops: float, dtype: str, size: float, reads: Iterable[int], writes: Iterable[int]
    ) -> None:
        """An operation of so many floating-point operations, which moves so many bytes."""
        hardware = self.hardware
        start = max([self._now, *(self._written.get(key, 0.0) for key in reads)])
        moving = size / (hardware.memory_bandwidth * hardware.memory_achieved)
        seconds = max(flops / hardware.rate(dtype) if flops else 0.0, moving, hardware.launch)
        self._wait_until(start)
        self._now += seconds
        self.times.compute += seconds
        self.times.kinds[kind] = self.times.kinds.get(kind, 0.0) + seconds
        for key in writes:
            self._written[key] = self._now

    def collective(self, each: Collective, reads: Iterable[int], writes: Iterable[int]) -> None:
        """A collective that sends what `reads` holds and fills `writes`."""
        seconds = each.seconds(self.hardware)
        self.times.communication += seconds
        start = max([self._link, *(self._written.get(key, 0.0) for key in reads)])
        if not self.hardware.overlaps:
            start = max(start, self._now)
        self._link = start + seconds
        for key in writes:
            self._written[key] = self._link
        if not self.hardware.overlaps:
            self._wait_until(self._link)

    def passed_on(self, reads: Iterable[int], writes: Iterable[int]) -> None:
        """A copy on the collectives' own queue: its output is ready as soon as its input."""
        ready = max((self._written.get(key, 0.0) for key in reads), default=0.0)
        for key in writes:
            self._written[key] = ready

    def end(self) -> StepTimes:
        """The step is over when both queues are."""
        self._wait_until(self._link)
        return self.times

    def _wait_until(self, moment: float) -> None:
        if moment > self._now:
            self.times.exposed += moment - self._now
            self._now = moment
