"""torchmetrics' metrics that a task hands in, exact over any number of ranks.

A metric gets one batch at a time, from its empty state, on whichever rank has that batch. What it then holds is reduced
over batches as torchmetrics would reduce it over ranks: sums are added up, and lists put together, in the order of the
batches, which depends on no number of ranks. torchmetrics' own communication is left out.
Source: https://lightning.ai/docs/torchmetrics/stable/pages/implement.html (states and their reductions)
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.data.batch import describe, first_tensor
from lockstep.errors import UserError
from lockstep.task import option

Kept = dict[tuple[str, str], Tensor]  # (metric, state) → what one batch leaves of it

_LESSER, _GREATER = torch.minimum, torch.maximum


def handed_in(task: Any) -> dict[str, Any]:
    """{name: torchmetrics.Metric}, new ones, that compute in float64; empty where the task hands none in.

    Raises:
        UserError: they cannot be made; one is no metric, cannot be put together from batches, or says that it is better
            in the other direction than the task.
    """
    try:
        found = task.torchmetrics() if hasattr(task, "torchmetrics") else {}
    except Exception as error:
        raise UserError(f"torchmetrics() failed: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not isinstance(found, Mapping):
        raise UserError(f"torchmetrics() gave {describe(found)}; allowed is {{name: torchmetrics.Metric}}")
    for name, metric in found.items():
        _check(name, metric, option(task, "lower_is_better"))
        metric.set_dtype(torch.float64)
        metric.distributed_available_fn = _never  # compute() is not to talk to other ranks
    return dict(found)


def _never() -> bool:
    return False


def _check(name: str, metric: Any, lower_is_better: Any) -> None:
    from torchmetrics import Metric

    who = f"torchmetrics()[{name!r}]"
    if not isinstance(metric, Metric):
        raise UserError(f"{who} is {describe(metric)}; allowed is a torchmetrics.Metric")
    kind = type(metric).__name__
    if not metric._defaults or any(isinstance(each, Metric) for each in metric.modules() if each is not metric):
        raise UserError(f"{who}: {kind} wraps other metrics; hand in each of those, and put them together in none")
    for state, default in metric._defaults.items():
        how = _reduction(metric, state)
        sums_up = how == "sum" and isinstance(default, Tensor) and not bool(default.any())
        if not sums_up and how not in ("cat", "min", "max"):
            of = getattr(metric._reductions[state], "__name__", metric._reductions[state])
            raise UserError(
                f"{who}: {kind} reduces its state {state} by {of}, which is not exact over ranks; allowed are sum from "
                "zero, cat, min and max: use another metric, or give sums in metrics(outputs, targets)"
            )
    if metric.higher_is_better is not None and metric.higher_is_better == (name in lower_is_better):
        better, change = ("larger", "take it out of") if metric.higher_is_better else ("smaller", "add it to")
        raise UserError(f"{who}: {kind} is better when {better}; {change} the task's lower_is_better")


def _reduction(metric: Any, state: str) -> str:
    """How a state is reduced: sum, cat, min or max; empty: in another way."""
    from torchmetrics.utilities.data import dim_zero_cat, dim_zero_max, dim_zero_min, dim_zero_sum

    known = {dim_zero_sum: "sum", dim_zero_cat: "cat", dim_zero_min: "min", dim_zero_max: "max"}
    return known.get(metric._reductions[state], "")


class HandedMetrics:
    """The metrics that a task hands in, during one evaluation.

    Attributes:
        names: theirs.
    """

    def __init__(self, task: Any) -> None:
        self._metrics = handed_in(task)
        self.names = frozenset(self._metrics)
        self._sums = {  # by metric, those of its states that are sums
            name: [state for state in metric._defaults if _reduction(metric, state) == "sum"]
            for name, metric in self._metrics.items()
        }
        self._kept: dict[int, Kept] = {}  # by the number of the batch

    def add(self, number: int, outputs: Any, targets: Any) -> dict[str, tuple[Tensor, ...]]:
        """Show batch `number` to each; returns, by metric, those of its states that are sums.

        Raises:
            UserError: a metric does not take these outputs and targets.
        """
        sums: dict[str, tuple[Tensor, ...]] = {}
        self._kept[number] = {}
        device = first_tensor(outputs, "the model's outputs").device
        for name, metric in self._metrics.items():
            if metric.device != device:
                metric.to(device)
            metric.reset()
            try:
                metric.update(outputs, targets)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                said = " ".join(str(error).split())
                raise UserError(
                    f"torchmetrics()[{name!r}].update(outputs, targets) failed: {type(error).__name__}: {said}; outputs "
                    f"{describe(outputs)}, targets {describe(targets)}: write a subclass whose update takes them"
                ) from error
            sums[name] = tuple(getattr(metric, state) for state in self._sums[name])
            for state in metric._defaults.keys() - set(self._sums[name]):
                value = getattr(metric, state)
                if isinstance(value, list):
                    if not value:
                        continue
                    value = torch.cat([each if each.dim() else each[None] for each in value])
                self._kept[number][name, state] = value.detach()
        return sums

    def compute(
        self, totals: Mapping[str, tuple[Tensor, ...]], group: dist.ProcessGroup | None
    ) -> dict[str, float] | UserError:
        """Each metric of all batches on rank 0, nothing elsewhere, or what is wrong with one; all ranks call it.

        Args:
            totals: the sums of `add`, added up over all batches.
        """
        if not self._metrics:
            return {}
        mine = {number: {key: value.cpu() for key, value in kept.items()} for number, kept in self._kept.items()}
        everyone: list[Any] | None = [None] * dist.get_world_size(group) if dist.get_rank() == 0 else None
        dist.gather_object(mine, everyone, group=group, group_dst=0)
        if everyone is None:
            return {}
        batches = [kept for _, kept in sorted((item for part in everyone for item in part.items()), key=_number)]
        found = {}
        for name, metric in self._metrics.items():
            self._fill(name, metric, totals[name], batches)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The ``compute`` method")  # this rank may have seen no batch
                try:
                    value = metric.compute()
                except (RuntimeError, ValueError, TypeError, IndexError) as error:
                    said = " ".join(str(error).split())
                    return UserError(f"torchmetrics()[{name!r}].compute() failed: {type(error).__name__}: {said}")
            if not isinstance(value, Tensor | float | int) or (isinstance(value, Tensor) and value.numel() != 1):
                return UserError(
                    f"torchmetrics()[{name!r}] computes {describe(value)}; allowed is one number: have it averaged, or "
                    "hand in a metric for each"
                )
            found[name] = float(value)
        return found

    def _fill(self, name: str, metric: Any, sums: tuple[Tensor, ...], batches: list[Kept]) -> None:
        """Put a metric into the state of one that has seen all batches."""
        metric.to("cpu")
        metric.reset()
        for state, total in zip(self._sums[name], sums, strict=True):
            setattr(metric, state, total.to(metric._defaults[state].dtype))
        for state in metric._defaults.keys() - set(self._sums[name]):
            values = [kept[name, state] for kept in batches if (name, state) in kept]
            how = _reduction(metric, state)
            if how == "cat":
                joined = [torch.cat(values)] if values else []
                is_list = isinstance(metric._defaults[state], list)
                setattr(metric, state, joined if is_list else (joined or [metric._defaults[state]])[0])
            elif values:
                setattr(metric, state, reduce(_LESSER if how == "min" else _GREATER, values))


def _number(item: tuple[int, Kept]) -> int:
    return item[0]
