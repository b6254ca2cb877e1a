"""Evaluation, exact over any number of ranks: every sample counts once, and all ranks get the same bits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lockstep.config.schema import Config
from lockstep.data.batch import Batch, as_scalar, describe, first_tensor, map_tensors, on_device_of
from lockstep.data.batches import BatchSource, items_of
from lockstep.data.sampler import EvalSampler
from lockstep.distributed.collectives import gather_objects
from lockstep.distributed.dtensor import local_shard
from lockstep.distributed.parallel_dims import ParallelDims
from lockstep.errors import UserError
from lockstep.task import metrics_of, option, summary_of
from lockstep.training.handed_metrics import HandedMetrics
from lockstep.training.precision import autocast

KEPT = 64  # wrong predictions that an evaluation remembers


@dataclass(frozen=True)
class Evaluation:
    """Over the whole evaluation set: the mean loss, and the task's metrics by name.

    `wrong` has the first KEPT samples that a classifier took for something else: (sample, label, prediction).
    """

    loss: float
    metrics: dict[str, float] = field(default_factory=dict)
    count: int = 0
    wrong: tuple[tuple[int, int, int], ...] = ()

    @property
    def scalars(self) -> dict[str, float]:
        """{name as it is logged: value}."""
        return {"eval_loss": self.loss} | {f"eval_{name}": value for name, value in self.metrics.items()}


Layout = dict[str, list[tuple[list[int], bool]]]  # of a metric: (shape, is whole) of sum and count, or of its sums


class Tally:
    """Sums over this rank's batches of an evaluation, which become everyone's.

    Each rank writes its batches' sums into their own rows of a table of zeros, and one all-reduce adds the tables.
    Adding zero is exact, so every rank then holds the very table that one process would have made, and adds its rows
    in the same order: the same metric to the last bit on any number of ranks. Sums that are whole numbers are exact in
    any order, and are added up at once.

    Args:
        task: gives loss, weights and metrics. They are computed in float64.
        group: connects the CPUs of all ranks.
    """

    def __init__(self, task: Any, sampler: EvalSampler, group: dist.ProcessGroup | None) -> None:
        self._task, self._group, self._sampler = task, group, sampler
        self._metrics, self._weigh = metrics_of(task), option(task, "weigh")
        self._mistakes = option(task, "mistakes")
        self._handed = HandedMetrics(task)
        self._numbers = iter(sampler.numbers())
        self._rows: dict[int, Tensor] = {}  # of a batch: loss, items, samples, then what is no whole number
        self._whole: Tensor | None = None
        self._layout: Layout = {}
        self._wrong = torch.empty(0, 3, dtype=torch.int64)

    def add(self, outputs: Any, batch: Batch) -> None:
        """Count this rank's next batch."""
        number = next(self._numbers)
        outputs = map_tensors(_in_double, outputs)
        device = first_tensor(outputs, "the model's outputs").device
        targets = map_tensors(_in_double, on_device_of(outputs, batch.targets))
        count = torch.full((), batch.count, dtype=torch.float64, device=device)
        items = items_of(self._weigh, targets) if self._weigh else count
        loss = self._task.loss(outputs, targets).double()
        # A batch without any item has no mean, and 0 × nan would be nan. Nothing here waits for a GPU.
        row = [torch.where(items > 0, loss * items, 0.0), items, count]
        whole: list[Tensor] = []
        layout: Layout = {}
        parts = {name: _pair_of(name, pair) for name, pair in self._metrics(outputs, targets).items()}
        if twice := sorted(parts.keys() & self._handed.names):
            raise UserError(
                f"the task has the metric {twice[0]} in metrics() and in torchmetrics(); rename one of them"
            )
        for name, values in (parts | self._handed.add(number, outputs, targets)).items():
            layout[name] = []
            for number_or_tensor in values:
                value = as_scalar(number_or_tensor, device).detach()
                is_whole = not value.is_floating_point()
                layout[name].append((list(value.shape), is_whole))
                (whole if is_whole else row).append(value)
        if self._layout and layout != self._layout:
            raise UserError(
                f"the task's metrics gave {_in_words(layout)} for one batch and {_in_words(self._layout)} for another; "
                "they must have the same names and shapes for every batch"
            )
        self._layout = layout
        self._rows[number] = torch.cat([value.double().flatten() for value in row])
        if whole:
            counts = torch.cat([value.long().flatten() for value in whole])
            self._whole = counts if self._whole is None else self._whole + counts
        if self._mistakes:
            rows = _require_rows(self._mistakes(outputs, targets)).clone()
            rows[:, 0] += torch.where(rows[:, 0] < 0, 0, number * self._sampler.batch_size)
            self._wrong = first_wrong(torch.cat([self._wrong.to(rows.device), rows]), KEPT)

    def result(self, device: torch.device) -> Evaluation:
        """All ranks' sums; all call it together.

        Raises:
            UserError: the ranks' metrics are called differently.
            RuntimeError: a sample was lost or counted twice.
        """
        layout = self._agree()
        shapes = [part for parts in layout.values() for part in parts]
        width = 3 + sum(_size(shape) for shape, is_whole in shapes if not is_whole)
        table = torch.zeros(self._sampler.batches(), width, dtype=torch.float64, device=device)
        for number, row in self._rows.items():
            table[number] = row
        count = sum(_size(shape) for shape, is_whole in shapes if is_whole)
        whole = torch.zeros(count, dtype=torch.int64) if self._whole is None else self._whole
        whole = whole.to(device)
        dist.all_reduce(table)
        if count:
            dist.all_reduce(whole)
        sums = table.cpu().sum(0)
        if int(sums[2]) != self._sampler.size:
            raise RuntimeError(f"evaluation counted {sums[2]:g} samples of {self._sampler.size}")
        totals = _as_laid_out(layout, sums[3:], whole.cpu())
        metrics = self._summarise(totals)
        return Evaluation(float(sums[0] / sums[1]), metrics, int(sums[2]), self._gather_wrong(device))

    def _agree(self) -> Layout:
        """What the metrics are called and of what shape; a rank without a batch has seen none."""
        everyone = gather_objects(self._layout if self._rows else None, self._group)
        known = [(rank, each) for rank, each in enumerate(everyone) if each is not None]
        for rank, each in known[1:]:
            if each != known[0][1]:
                raise UserError(
                    f"rank {rank}'s metrics are {_in_words(each)}, and rank {known[0][0]}'s {_in_words(known[0][1])}; a "
                    "task's metrics must be the same on all ranks"
                )
        return known[0][1] if known else {}

    def _summarise(self, totals: Mapping[str, tuple[Tensor, ...]]) -> dict[str, float]:
        """The task's own summary, made by rank 0 alone, for what computes it may take a second to import.

        Raises:
            UserError: on all ranks: a metric that was handed in is no number.
        """
        if not totals:
            return {}
        handed = self._handed.compute(totals, self._group)
        found: list[Any] = [handed]
        if dist.get_rank() == 0 and not isinstance(handed, UserError):
            own: Any = {name: total for name, total in totals.items() if name not in self._handed.names}
            summary = summary_of(self._task)(own) if own else {}
            found = [{name: float(value) for name, value in summary.items()} | handed]
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(found, src=0, group=self._group)
        if isinstance(found[0], UserError):
            raise found[0]
        return dict(found[0])

    def _gather_wrong(self, device: torch.device) -> tuple[tuple[int, int, int], ...]:
        """The same on any number of ranks: each has the first of its batches, so the first of all are among them."""
        if not self._mistakes:
            return ()
        table = torch.zeros(dist.get_world_size(), KEPT, 3, dtype=torch.int64, device=device)
        table[dist.get_rank(), : len(self._wrong)] = self._wrong.to(device) + 1  # 0 is no sample
        dist.all_reduce(table)
        rows = sorted((table.flatten(0, 1).cpu() - 1).tolist())
        return tuple((sample, label, predicted) for sample, label, predicted in rows if sample >= 0)[:KEPT]


def first_wrong(rows: Tensor, most: int) -> Tensor:
    """The first `most` of the rows (sample, label, prediction) whose sample is no negative number, before others.

    Their number is known to the device alone: to ask it would be to wait for it.
    """
    order = torch.argsort((rows[:, 0] < 0).byte(), stable=True)
    return rows[order[:most]]


def _require_rows(rows: Any) -> Tensor:
    if isinstance(rows, Tensor) and rows.dtype == torch.int64 and rows.dim() == 2 and rows.shape[1] == 3:
        return rows
    raise UserError(
        f"the task's mistakes(outputs, targets) gave {describe(rows)}; allowed is int64 [N, 3], a row for each sample: "
        "its place in the batch, -1 if it is right; its label; the prediction"
    )


def _in_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _size(shape: list[int]) -> int:
    return int(torch.Size(shape).numel())


def _in_words(layout: Mapping[str, Any]) -> str:
    shapes = {name: " / ".join(str(shape) for shape, _ in parts) for name, parts in layout.items()}
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "none"


def _pair_of(name: str, pair: Any) -> tuple[Any, Any]:
    """(sum, count) of a metric.

    Raises:
        UserError: it is something else.
    """
    if isinstance(pair, tuple | list) and len(pair) == 2:
        return pair[0], pair[1]
    raise UserError(f"metrics(outputs, targets)[{name!r}] is {type(pair).__name__}; allowed is (sum, count)")


def _as_laid_out(layout: Layout, real: Tensor, whole: Tensor) -> dict[str, tuple[Tensor, ...]]:
    """The sums and counts of each metric, in their shapes."""
    found: dict[str, tuple[Tensor, ...]] = {}
    for name, parts in layout.items():
        values = []
        for shape, is_whole in parts:
            size = _size(shape)
            source = whole if is_whole else real
            values.append(source[:size].reshape(shape))
            whole, real = (whole[size:], real) if is_whole else (whole, real[size:])
        found[name] = tuple(values)
    return found


@torch.no_grad()
def evaluate(
    forward: Callable[[Any], Any],
    batches: Iterator[Batch],
    tally: Tally,
    device: torch.device,
    blank: Any = None,
    rounds: int = 0,
    counts: bool = True,
) -> Evaluation:
    """Evaluate `forward` (inputs → outputs) over this rank's batches and combine all ranks' sums.

    Args:
        blank: inputs for a forward that counts nothing, where `forward` is one that all ranks must make together: the
            ranks that have fewer batches than `rounds` make it.
        counts: whether these batches are this rank's to count: another rank may make the same forwards with it.
    """
    done = 0
    for batch in batches:
        outputs = forward(batch.inputs)
        if counts:
            tally.add(outputs, batch)
        done += 1
    if blank is not None and done < rounds:
        forward(blank)
    return tally.result(device)


class Evaluator:
    """Evaluates a model on this rank's batches of the evaluation set; all ranks call it together."""

    def __init__(
        self,
        config: Config,
        source: BatchSource,
        device: torch.device,
        dims: ParallelDims,
        group: dist.ProcessGroup | None,
    ) -> None:
        self._precision, self._source, self._device, self._dims = config.precision, source, device, dims
        self._group = group

    @property
    def has_data(self) -> bool:
        """Whether there is anything to evaluate on."""
        return len(self._source.eval_set) > 0

    def tally(self) -> Tally:
        """For the sums of one evaluation."""
        return Tally(self._source.task, self._source.eval_sampler(), self._group)

    def evaluate(self, module: nn.Module, *, sharded: bool = False) -> Evaluation:
        """Evaluate a complete model, and leave it in evaluation mode.

        Args:
            module: without DistributedDataParallel, whose forward communicates: ranks may have unequally many batches.
            sharded: its forward communicates all the same, because no rank ever holds the whole model. Where
                fully_shard made it so, its own policy says in which precision it computes.
        """
        module.eval()
        if self._dims.shards > 1:
            sync_buffers(module)
        sampler = self._source.eval_sampler()
        batches = self._source.eval_batches(sampler)
        blank, counts = None, self._dims.counts_evaluation
        policy = getattr(module, "gathers", False) or any(  # fully_shard's
            hasattr(each, "set_requires_gradient_sync") for each in module.modules()
        )
        if sharded and (policy or not self._dims.evaluates_together):  # ranks with other shares gather with it, too
            blank = self._source.example(1).inputs
        with contextlib.nullcontext() if policy else autocast(self._precision, self._device):
            return evaluate(module, batches, self.tally(), self._device, blank, sampler.rounds(), counts)


def sync_buffers(module: nn.Module) -> None:
    """Give every rank rank 0's buffers, as DistributedDataParallel does before each training forward.

    Local BatchNorm leaves each rank with its own running statistics; evaluated as they are, the metric would be a mix
    of as many models as there are ranks.
    """
    for buffer in module.buffers():
        dist.broadcast(local_shard(buffer), src=0)
