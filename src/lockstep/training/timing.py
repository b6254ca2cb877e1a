"""How long steps take: a stopwatch for a CPU and for a GPU, and what is left out as warm-up."""

from __future__ import annotations

import random
import statistics
import time
from collections import deque

import torch

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


def percentile(values: list[float], percent: int) -> float:
    """The value below which `percent` % of the values lie."""
    if len(values) < 2:
        return values[0] if values else 0.0
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
