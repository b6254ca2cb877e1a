"""Gradients looked at, in every recipe and under every sharding; nothing here changes one.

There are two moments at which to look. A tensor hook on a parameter (`tensor.register_hook`), and a module's backward
hook, see what this rank has computed from one micro-batch, while backward runs: before micro-batches add up, before
ranks average. That is the place to find out in which layer and on which rank a NaN appears. What the optimizer is about
to apply is there when its step begins: after the mean over ranks, and under fp16 unscaled, for GradScaler unscales
before it calls the optimizer, and does not call it when a gradient has overflowed. `optimizer.register_step_pre_hook`
is that moment; where the recipe clips by the norm, it is the one before, within `clip_gradients`.

A rank may hold a part of a gradient (FSDP), or of some layers only (a pipeline), or the same as all others (DDP). Each
writes the sums of squares of what it holds into its rows of a table with a row for every parameter of the model, and
where parts differ one all-reduce adds the tables, 8 bytes a parameter: all ranks then know every layer's norm and the
norm over all, the same to the last bit. Who has the same as another rank writes zeros.

Nothing asked for: no hook is registered, and nothing is computed.

Source: https://docs.pytorch.org/docs/stable/notes/modules.html#module-hooks
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.callbacks.base import Callback, CallbackContext, LogRecord
from lockstep.config.schema import Config
from lockstep.loggers.base import Histogram

BINS = 64  # of a histogram
WARN_STEPS = 100  # a layer is named at most once in so many steps


def wants_gradient_stats(config: Config) -> bool:
    """Whether there is anything to hook into."""
    asked = config.gradients
    return bool(asked.log or asked.warn_above or asked.clip_norm or config.logger.histograms)


def layer_of(parameter: str) -> str:
    """The module that a parameter belongs to, by its name."""
    return parameter.rpartition(".")[0] or parameter


class GradientStats(Callback):
    """What `gradients.*` and `logger.histograms` ask for, on one rank. All ranks make one, or none does."""

    def __init__(self, config: Config) -> None:
        self._asked, self._config = config.gradients, config
        self._warned: dict[str, int] = {}

    def on_train_begin(self, context: CallbackContext) -> None:
        self._names, self._parts, self._device = context.parameter_names, context.gradients, context.device
        self._say = context.say
        self._rows = {name: row for row, name in enumerate(self._names)}
        self.layers = list(dict.fromkeys(layer_of(name) for name in self._names))
        rows = [self.layers.index(layer_of(name)) for name in self._names]
        self._layer_of_row = torch.tensor(rows, device=self._device)
        context.columns.extend(self.columns)
        self._forget(0, logs=False, draws=False)
        self._parts.before_update(self._before_update)
        if self._asked.log or self._config.logger.histograms:
            self._parts.after_update(self._after_update)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the scalars that logged steps have."""
        total = ("gradient_norm",) if self._asked.log or self._asked.clip_norm else ()
        if not self._asked.log:
            return total
        return (*total, *(f"{kind}/{layer}" for kind in ("gradient_norm", "update_ratio") for layer in self.layers))

    def on_step_begin(self, context: CallbackContext) -> None:
        step, every = context.step + 1, self._config.logger.histograms
        logs = context.is_logged(step)
        self._forget(step, logs=logs, draws=logs and every > 0 and -(-step // self._config.log_every) % every == 0)

    def on_log(self, context: CallbackContext, record: LogRecord) -> None:
        if context.updated:
            record.scalars |= self._scalars
            record.histograms |= self._histograms

    def _forget(self, step: int, *, logs: bool, draws: bool) -> None:
        """Forget the last step, and learn of the coming one: its number, whether it is logged, with histograms."""
        self._step, self._logs, self._draws = step, logs, draws
        self._before: dict[str, Tensor] = {}
        self._scalars: dict[str, float] = {}
        self._histograms: dict[str, Histogram] = {}

    @torch.no_grad()
    def _before_update(self) -> None:
        asked, parameters = self._asked, self._parts.parameters
        logs = self._logs and bool(self.columns)
        if logs or asked.warn_above is not None:
            squares = self._sum_of_squares(self._gradients())
            norm = squares.sum().sqrt()
            if asked.warn_above is not None:
                self._warn(squares, asked.warn_above)
            if logs:
                self._scalars["gradient_norm"] = norm.item()
            if logs and asked.log:
                self._scalars |= {f"gradient_norm/{layer}": value for layer, value in self._by_layer(squares)}
        if self._draws:
            self._draw("gradients", self._gradients)
        if self._logs and asked.log:
            self._before = {name: self._parts.weight(p).clone() for name, p in parameters.items()}

    @torch.no_grad()
    def _after_update(self) -> None:
        if self._before:
            now = dict(self._weights())
            moved_by = self._sum_of_squares((name, now[name] - old) for name, old in self._weights(before=True))
            length = self._sum_of_squares(self._weights(before=True))
            pairs = zip(self._by_layer(moved_by), self._by_layer(length), strict=True)
            self._scalars |= {f"update_ratio/{layer}": a / b if b else 0.0 for (layer, a), (_, b) in pairs}
            self._before.clear()
        if self._draws:
            self._draw("weights", self._weights)

    def _gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(name, part) of what counts of this rank's gradients. All ranks go through it together."""
        for name, parameter in self._parts.parameters.items():
            gradient = self._parts.gradient(parameter)
            if gradient is not None and self._parts.counts(parameter, gradient=True):
                yield name, gradient

    def _weights(self, before: bool = False) -> Iterator[tuple[str, Tensor]]:
        """(name, part) of what counts of this rank's weights, as they were before the update or are."""
        for name, parameter in self._parts.parameters.items():
            if self._parts.counts(parameter, gradient=False):
                yield name, self._before[name] if before else self._parts.weight(parameter)

    def _sum_of_squares(self, parts: Iterator[tuple[str, Tensor]]) -> Tensor:
        """[parameters], float64: each one's, over all ranks."""
        table = torch.zeros(len(self._names), dtype=torch.float64, device=self._device)
        norms = {self._rows[name]: torch.linalg.vector_norm(part) for name, part in parts}
        if norms:
            rows = torch.tensor(list(norms), device=self._device)
            table[rows] = torch.stack([norm.to(self._device, torch.float64) for norm in norms.values()]).square()
        return self._everyone(table)

    def _everyone(self, table: Tensor, how: Any = dist.ReduceOp.SUM) -> Tensor:
        if self._parts.differ:
            dist.all_reduce(table, how)
        return table

    def _by_layer(self, squares: Tensor) -> list[tuple[str, float]]:
        """(layer, norm), for every layer."""
        sums = torch.zeros(len(self.layers), dtype=torch.float64, device=self._device)
        return list(zip(self.layers, sums.index_add_(0, self._layer_of_row, squares).sqrt().tolist(), strict=True))

    def _warn(self, squares: Tensor, limit: float) -> None:
        for layer, norm in self._by_layer(squares):
            if limit < norm < float("inf") and self._step >= self._warned.get(layer, -WARN_STEPS) + WARN_STEPS:
                self._warned[layer] = self._step
                self._say(f"step {self._step}: gradient norm {norm:.4g} of {layer} is above {limit:g}")

    def _draw(self, kind: str, parts: Callable[[], Iterator[tuple[str, Tensor]]]) -> None:
        """A histogram for each parameter. The ranks' counts add up once all of them use the same bins.

        Numbers that are not finite are left out.
        """
        ends = torch.full((len(self._names), 2), float("inf"), dtype=torch.float64, device=self._device)
        for name, part in parts():
            numbers = finite(part)
            if numbers.numel():
                low, high = numbers.aminmax()
                ends[self._rows[name], 0], ends[self._rows[name], 1] = low, -high
        self._everyone(ends, dist.ReduceOp.MIN)
        bounds = [(low, -high) if low < -high else (low - 1, 1 - high) for low, high in ends.tolist()]
        table = torch.zeros(len(self._names), BINS + 2, dtype=torch.float64, device=self._device)
        for name, part in parts():
            row, numbers = self._rows[name], finite(part)
            if numbers.numel():
                table[row, :BINS] = torch.histc(numbers, BINS, *bounds[row])
                table[row, BINS] = numbers.sum(dtype=torch.float64)
                table[row, BINS + 1] = torch.linalg.vector_norm(numbers, dtype=torch.float64).square()
        for name, bound, row in zip(self._names, bounds, self._everyone(table).tolist(), strict=True):
            if any(row[:BINS]):
                counts = [int(count) for count in row[:BINS]]
                self._histograms[f"{kind}/{name}"] = Histogram(*bound, counts, row[BINS], row[BINS + 1])


def finite(tensor: Tensor) -> Tensor:
    """The finite ones of a tensor's numbers, in one dim."""
    mask = tensor.isfinite()
    return tensor.flatten() if mask.all() else tensor[mask]
