"""When each operation and each collective of a step would end on some hardware: a roofline, and two queues.

A device computes one operation after the other. Each takes as long as its arithmetic or as the bytes that it reads and
writes, whichever is more, and never less than a launch. Collectives wait in a queue of their own, as on NCCL's stream: one
begins when what it sends has been computed and the one before is done. An operation that needs what a collective brings
waits for it; that is communication which nothing hides. Where hardware cannot do both at once, as CPUs cannot that copy
the messages themselves, each collective is waited for.

What is offloaded lies in the host's memory. Copies to the device and from it have a queue per direction, where the engine has
streams for them. What the host computes takes as long as its bytes, and the device waits for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lockstep.plan.hardware import Hardware
from lockstep.plan.links import Collective
from lockstep.plan.measured_seconds import seconds_at

HOST_UPDATE = "host update"  # the class of operations that a host makes on what is offloaded
ClockEvent = tuple[str, tuple[Any, ...]]  # a method of DeviceClock, and what it was given


@dataclass
class StepTimes:
    """Seconds of a step on one rank.

    Attributes:
        compute: in which it computes.
        communication: of all collectives, hidden or not.
        exposed: in which it waits for them.
        bubble: in which it waits for the other ranks of its pipeline.
        kinds: of `compute`, by class of operation.
        work: of the processor, in computing and in collectives; of a measured CPU alone.
        copies: of all copies between host and device, hidden or not.
    """

    compute: float = 0.0
    communication: float = 0.0
    exposed: float = 0.0
    bubble: float = 0.0
    kinds: dict[str, float] = field(default_factory=dict)
    work: float = 0.0
    copies: float = 0.0

    @property
    def step(self) -> float:
        return self.compute + self.exposed + self.bubble


class DeviceClock:
    """The two queues of one device."""

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware
        self.begin()

    def begin(self) -> None:
        """Start a step: both queues are empty."""
        self._now = self._link = 0.0
        self._copied = {True: 0.0, False: 0.0}  # when the queue of copies to the device, and of those from it, is free
        self._written: dict[int, float] = {}  # when a storage is ready, by its key
        self.times = StepTimes()
        self.events: list[ClockEvent] = []

    def operation(
        self,
        kind: str,
        flops: float,
        dtype: str,
        size: float,
        reads: Iterable[int],
        writes: Iterable[int],
        operation: str = "",
    ) -> None:
        """An operation of so many floating-point operations, which moves so many bytes.

        Args:
            operation: its class in a measured profile; where that has a curve for it, the curve counts.
        """
        hardware, reads, writes = self.hardware, tuple(reads), tuple(writes)
        self.events.append(("operation", (kind, flops, dtype, size, reads, writes, operation)))
        start = max([self._now, *(self._written.get(key, 0.0) for key in reads)])
        if curve := hardware.measured.get(operation):
            seconds = hardware.launch + seconds_at(curve, flops or size)
            return self._work(kind, seconds, start, writes)
        moving = size / (hardware.memory_bandwidth * hardware.memory_achieved)
        seconds = max(flops / hardware.rate(dtype) if flops else 0.0, moving, hardware.launch)
        return self._compute(kind, seconds, start, writes)

    def host(self, way: str) -> None:
        """What the host alone does: it counts where the host is the device."""
        self.events.append(("host", (way,)))
        if seconds := self.hardware.host.get(way):
            self._work("host", seconds, self._now, ())

    def _work(self, kind: str, seconds: float, start: float, writes: Iterable[int]) -> None:
        """Compute on a processor that several ranks may share."""
        self.times.work += seconds
        self._compute(kind, seconds * self.hardware.ranks_per_core, start, writes)

    def _compute(self, kind: str, seconds: float, start: float, writes: Iterable[int]) -> None:
        self._wait_until(start)
        self._now += seconds
        self.times.compute += seconds
        self.times.kinds[kind] = self.times.kinds.get(kind, 0.0) + seconds
        for key in writes:
            self._written[key] = self._now

    def collective(self, each: Collective, reads: Iterable[int], writes: Iterable[int]) -> None:
        """A collective that sends what `reads` holds and fills `writes`."""
        reads, writes = tuple(reads), tuple(writes)
        self.events.append(("collective", (each, reads, writes)))
        seconds = each.seconds(self.hardware)
        self.times.communication += seconds
        self.times.work += each.work(self.hardware)
        start = max([self._link, *(self._written.get(key, 0.0) for key in reads)])
        if not self.hardware.overlaps:
            start = max(start, self._now)
        self._link = start + seconds
        for key in writes:
            self._written[key] = self._link
        if not self.hardware.overlaps:
            self._wait_until(self._link)

    def on_host(self, size: float, reads: Iterable[int], writes: Iterable[int]) -> None:
        """An operation of the host that reads and writes so many bytes. The device waits: the same thread issues its work."""
        reads, writes, host = tuple(reads), tuple(writes), self.hardware.offload
        assert host
        self.events.append(("on_host", (size, reads, writes)))
        start = max([self._now, *(self._written.get(key, 0.0) for key in reads)])
        self._compute(HOST_UPDATE, max(size / host.update_rate, self.hardware.launch), start, writes)

    def copy(self, size: float, to_device: bool, hides: bool, reads: Iterable[int], writes: Iterable[int]) -> None:
        """A copy between host and device.

        Args:
            hides: whether it has a queue of its own; else the device computes nothing meanwhile.
        """
        reads, writes, host = tuple(reads), tuple(writes), self.hardware.offload
        assert host
        self.events.append(("copy", (size, to_device, hides, reads, writes)))
        seconds = max(size / host.copy_rate, self.hardware.launch)
        start = max([self._copied[to_device], *(self._written.get(key, 0.0) for key in reads)])
        self._copied[to_device] = ready = (start if hides else max(start, self._now)) + seconds
        self.times.copies += seconds
        for key in writes:
            self._written[key] = ready
        if not hides:
            self._wait_until(ready)

    def passed_on(self, reads: Iterable[int], writes: Iterable[int]) -> None:
        """A copy on the collectives' own queue: its output is ready as soon as its input."""
        reads, writes = tuple(reads), tuple(writes)
        self.events.append(("passed_on", (reads, writes)))
        ready = max((self._written.get(key, 0.0) for key in reads), default=0.0)
        for key in writes:
            self._written[key] = ready

    def forget(self, storages: Iterable[int]) -> None:
        """Memory that is new: an earlier storage may have had its address, and its key."""
        storages = tuple(storages)
        self.events.append(("forget", (storages,)))
        for key in storages:
            self._written.pop(key, None)

    def replay(self, events: Iterable[ClockEvent]) -> StepTimes:
        """The times of a step that was seen elsewhere, or of one that is made up."""
        self.begin()
        for name, given in events:
            getattr(self, name)(*given)
        return self.end()

    def end(self) -> StepTimes:
        """The step is over when all queues are."""
        self._wait_until(max(self._link, *self._copied.values()))
        return self.times

    def _wait_until(self, moment: float) -> None:
        if moment > self._now:
            self.times.exposed += moment - self._now
            self._now = moment
