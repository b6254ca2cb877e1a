"""Numbers of a run: exact evaluation over any number of ranks, step times, peak memory."""

from __future__ import annotations

import random
import resource
import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy

from lockstep.data import Batch
from lockstep.order import EvalSampler
from lockstep.pulse import Pulse

KEPT = 64  # wrong predictions that an evaluation remembers
WARM_UP = 5  # steps whose time says nothing yet
SAMPLE = 4096  # step times that are remembered of a longer run
UNREAD = 64  # intervals on a GPU that are not looked at yet, because it may be that far behind


@dataclass(frozen=True)
class Evaluation:
    """Over the whole evaluation set: mean loss, accuracy, and macro-F1, the mean of the classes' F1 scores.

    A class that no image has and none was taken for has no F1 and does not count. `wrong` has the first KEPT samples
    that were taken for something else: (sample, label, prediction).
    """

    loss: float
    accuracy: float
    f1: float
    count: int
    wrong: tuple[tuple[int, int, int], ...] = ()


class Tally:
    """Sums over this rank's batches of an evaluation, which become everyone's.

    Each rank writes its batches' sums into their own rows of a table of zeros, and one all-reduce adds the tables.
    Adding zero is exact, so every rank then holds the very table that one process would have made, and adds its rows
    in the same order: the same metric to the last bit on any number of ranks. What is counted by class are whole
    numbers, exact in any order.
    """

    def __init__(self, sampler: EvalSampler) -> None:
        self._size, self._rows = sampler.size, iter(sampler.numbers())
        self._table = torch.zeros(sampler.batches(), 3, dtype=torch.float64)
        self._classes = torch.zeros(3, 0, dtype=torch.float64)  # of each: images, images taken for it, rightly so
        self._batch_size, self._wrong = sampler.batch_size, torch.empty(0, 3, dtype=torch.int64)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count this rank's next batch: logits [N, C], labels [N]."""
        labels = labels.to(logits.device)  # a model split over devices answers on its last one
        number = next(self._rows)
        row = self._table[number]
        row[0] = cross_entropy(logits.double(), labels, reduction="sum").item()
        taken_for = logits.argmax(1)
        right = taken_for == labels
        row[1] = right.sum().item()
        row[2] = len(labels)
        count = logits.shape[1]
        counts = [which.bincount(minlength=count).cpu() for which in (labels, taken_for, labels[right])]
        self._classes = self._wide(count) + torch.stack(counts)
        if len(self._wrong) < KEPT:
            places = (~right).nonzero().flatten()[:KEPT]
            wrong = [places + number * self._batch_size, labels[places], taken_for[places]]
            self._wrong = torch.cat([self._wrong, torch.stack(wrong, 1).cpu()])[:KEPT]

    def result(self, device: torch.device) -> Evaluation:
        """All ranks' sums; all call it together.

        Raises:
            RuntimeError: a sample was lost or counted twice.
        """
        width = torch.tensor(self._classes.shape[1], device=device)
        dist.all_reduce(width, dist.ReduceOp.MAX)  # a rank without a batch has seen no classes
        classes = self._wide(int(width.item()))
        both = torch.cat([self._table.flatten(), classes.flatten()]).to(device)
        dist.all_reduce(both)
        table, classes = both.cpu().split([self._table.numel(), classes.numel()])
        loss, correct, count = table.view(-1, 3).sum(0).tolist()
        if count != self._size:
            raise RuntimeError(f"evaluation counted {count:g} samples of {self._size}")
        f1 = torch.zeros((), dtype=torch.float64, device=device)
        if dist.get_rank() == 0:  # alone, for what computes it takes a second to import
            f1.fill_(macro_f1(*classes.view(3, -1)))
        dist.broadcast(f1, src=0)
        return Evaluation(loss / count, correct / count, f1.item(), int(count), self._gather_wrong(device))

    def _wide(self, count: int) -> Tensor:
        return functional.pad(self._classes, (0, count - self._classes.shape[1]))

    def _gather_wrong(self, device: torch.device) -> tuple[tuple[int, int, int], ...]:
        """The same on any number of ranks: each has the first of its batches, so the first of all are among them."""
        table = torch.zeros(dist.get_world_size(), KEPT, 3, dtype=torch.int64, device=device)
        table[dist.get_rank(), : len(self._wrong)] = self._wrong.to(device) + 1  # 0 is no sample
        dist.all_reduce(table)
        rows = sorted((table.flatten(0, 1).cpu() - 1).tolist())
        return tuple((sample, label, predicted) for sample, label, predicted in rows if sample >= 0)[:KEPT]


def macro_f1(images: Tensor, taken_for: Tensor, right: Tensor) -> float:
    """The mean of the classes' F1 scores, from three counts of each: its images, those taken for it, both.

    torchmetrics computes it, from counts that are exact; classes with none are left out, as in scikit-learn.
    """
    # Here and not above: it takes a second to import, which no start need wait for.
    from torchmetrics.classification import MulticlassF1Score

    metric = MulticlassF1Score(num_classes=len(images), average="macro", sync_on_compute=False)
    metric.tp, metric.fp, metric.fn, metric.tn = right, taken_for - right, images - right, torch.zeros_like(right)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The ``compute`` method")  # that it has not seen predictions is intended
        return float(metric.compute())


@torch.no_grad()
def evaluate(
    forward: Callable[[Tensor], Tensor],
    batches: Iterator[Batch],
    sampler: EvalSampler,
    device: torch.device,
    blank: Tensor | None = None,
) -> Evaluation:
    """Evaluate `forward` (images → logits [N, C]) over this rank's batches and combine all ranks' sums.

    Args:
        blank: images for a forward that counts nothing, where `forward` is one that all ranks must make together: the
            ranks that have one batch less than the others make it.
    """
    tally = Tally(sampler)
    for batch in batches:
        tally.add(forward(batch.images), batch.labels)
    if blank is not None and len(sampler) < sampler.rounds():
        forward(blank)
    return tally.result(device)


def sync_buffers(module: nn.Module) -> None:
    """Give every rank rank 0's buffers, as DistributedDataParallel does before each training forward.

    Local BatchNorm leaves each rank with its own running statistics; evaluated as they are, the metric would be a mix
    of as many models as there are ranks.
    """
    for buffer in module.buffers():
        dist.broadcast(buffer, src=0)


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


class Load:
    """What this rank's steps were spent on, without the warm-up: waiting for batches, computing, or neither.

    Args:
        pulse: whose clocks are read.
    """

    def __init__(self, pulse: Pulse) -> None:
        self._pulse, self._steps = pulse, 0
        self._marks: dict[int, Sequence[float]] = {0: pulse.of_steps()}  # where the steps after so many begin
        self._left_out = [0.0] * 4

    def before_step(self) -> None:
        """Be told of each step, before it begins."""
        if self._steps in (1, WARM_UP):
            self._marks[self._steps] = self._pulse.of_steps()
        self._steps += 1

    def leave_out(self, steps: int, since: Sequence[float]) -> None:
        """Not to count the last `steps` steps, which began at `since`, as `pulse.of_steps` said."""
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
        return [after - before for after, before in zip(self._pulse.of_steps(), mark, strict=True)]


def percentile(values: list[float], percent: int) -> float:
    """The value below which `percent` % of the values lie."""
    if len(values) < 2:
        return values[0] if values else 0.0
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def peak_memory_bytes(device: torch.device) -> int:
    """This rank's peak: memory torch allocated on the GPU, or the process's resident set on CPU (it is the device)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def gather_numbers(value: float, device: torch.device) -> list[float]:
    """One number from every rank, in rank order, on every rank."""
    mine = torch.tensor([value], dtype=torch.float64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return [tensor.item() for tensor in everyone]
