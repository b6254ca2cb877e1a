"""Numbers of a run: exact evaluation over any number of ranks, step times, peak memory."""

from __future__ import annotations

import random
import statistics
import time
from collections import deque
from collections.abc import Sequence

import torch

from lockstep.distributed.heartbeat import Heartbeat

WARM_UP = 5  # steps whose time says nothing yet
SAMPLE = 4096  # step times that are remembered of a longer run
UNREAD = 64  # intervals on a GPU that are not looked at yet, because it may be that far behind


class Stopwatch:
    """Seconds of the intervals between start() and stop(), however many there are: a sum, and a sample to judge by.

    On CUDA the CPU runs ahead of the device, so events on the stream are read instead of the clock, later.

    Attributes:
        count: intervals that have been read: all, or on CUDA those before the last few.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.count, self._total = 0, 0.0
        self._first: list[float] = []
        self._sample: list[float] = []
        self._draw = random.Random(0)  # its own: nothing that is trained may depend on it
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._begun: float | torch.cuda.Event = 0.0

    def start(self) -> None:
        self._begun = self._now()

    def stop(self) -> None:
        ended = self._now()
        if isinstance(ended, float):
            assert isinstance(self._begun, float)
            self._add(ended - self._begun)
        else:
            assert not isinstance(self._begun, float)
            self._events.append((self._begun, ended))
            while len(self._events) > UNREAD and self._events[0][1].query():
                self._read()

    def _now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _read(self) -> None:
        begun, ended = self._events.popleft()
        self._add(begun.elapsed_time(ended) / 1000)

    def _add(self, seconds: float) -> None:
        self.count += 1
        self._total += seconds
        if len(self._first) < WARM_UP:
            self._first.append(seconds)
        elif len(self._sample) < SAMPLE:
            self._sample.append(seconds)
        elif (place := int(self._draw.random() * (self.count - WARM_UP))) < SAMPLE:
            self._sample[place] = seconds  # each interval is in the sample with the same probability (algorithm R)

    def _finish(self) -> None:
        if self._events:
            torch.cuda.synchronize(self.device)
            while self._events:
                self._read()

    def total(self) -> float:
        """Seconds of all intervals together."""
        self._finish()
        return self._total

    def seconds(self) -> list[float]:
        """The lengths of the intervals without the warm-up's; of more than SAMPLE of them, some drawn at random."""
        self._finish()
        return self._first[warm_up(self.count) :] + self._sample


def warm_up(steps: int) -> int:
    """How many of so many steps are the warm-up: the first 5, or the first one of fewer than 10."""
    return WARM_UP if steps >= 2 * WARM_UP else min(1, max(0, steps - 1))


class StepTime:
    """What this rank's steps were spent on, without the warm-up: waiting for batches, computing, or neither.

    Args:
        heartbeat: whose clocks are read.
    """

    def __init__(self, heartbeat: Heartbeat) -> None:
        self._heartbeat, self._steps = heartbeat, 0
        self._marks: dict[int, Sequence[float]] = {0: heartbeat.of_steps()}  # where the steps after so many begin
        self._left_out = [0.0] * 4

    def before_step(self) -> None:
        """Be told of each step, before it begins."""
        if self._steps in (1, WARM_UP):
            self._marks[self._steps] = self._heartbeat.of_steps()
        self._steps += 1

    def leave_out(self, steps: int, since: Sequence[float]) -> None:
        """Not to count the last `steps` steps, which began at `since`, as `heartbeat.of_steps` said."""
        self._steps -= steps
        self._left_out = [out + more for out, more in zip(self._left_out, self._since(since), strict=True)]

    def shares(self) -> dict[str, float]:
        """Of a second of a step, by name; empty where no step was taken."""
        passed = self._since(self._marks[warm_up(self._steps)])
        wall, cpu, main, waited = (here - out for here, out in zip(passed, self._left_out, strict=True))
        if wall <= 0:
            return {}
        return {"data_wait_share": waited / wall, "cores_busy": cpu / wall, "main_thread_busy": main / wall}

    def _since(self, mark: Sequence[float]) -> list[float]:
        return [after - before for after, before in zip(self._heartbeat.of_steps(), mark, strict=True)]


def percentile(values: list[float], percent: int) -> float:
    """The value below which `percent` % of the values lie."""
    if len(values) < 2:
        return values[0] if values else 0.0
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
