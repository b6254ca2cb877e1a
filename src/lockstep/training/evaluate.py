"""Evaluation, exact over any number of ranks: every sample counts once, and all ranks get the same bits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy

from lockstep.config.schema import Config
from lockstep.data.batches import BatchSource
from lockstep.data.datasets import Batch
from lockstep.data.sampler import EvalSampler
from lockstep.distributed.parallel_dims import ParallelDims
from lockstep.training.precision import autocast

KEPT = 64  # wrong predictions that an evaluation remembers


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


class Evaluator:
    """Evaluates a model on this rank's batches of the evaluation set; all ranks call it together."""

    def __init__(self, config: Config, source: BatchSource, device: torch.device, dims: ParallelDims) -> None:
        self._precision, self._source, self._device, self._dims = config.precision, source, device, dims

    def evaluate(self, module: nn.Module, *, sharded: bool = False) -> Evaluation:
        """Evaluate a complete model, and leave it in evaluation mode.

        Args:
            module: without DistributedDataParallel, whose forward communicates: ranks may have unequally many batches.
            sharded: its forward communicates all the same, because no rank ever holds the whole model; and its own
                policy says in which precision it computes.
        """
        module.eval()
        if self._dims.shards > 1:
            sync_buffers(module)
        sampler = self._source.eval_sampler()
        batches = self._source.eval_batches(sampler)
        if sharded:
            return evaluate(module, batches, sampler, self._device, self._source.blank_images(1))
        with autocast(self._precision, self._device):
            return evaluate(module, batches, sampler, self._device)


def sync_buffers(module: nn.Module) -> None:
    """Give every rank rank 0's buffers, as DistributedDataParallel does before each training forward.

    Local BatchNorm leaves each rank with its own running statistics; evaluated as they are, the metric would be a mix
    of as many models as there are ranks.
    """
    for buffer in module.buffers():
        dist.broadcast(buffer, src=0)
