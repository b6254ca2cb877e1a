"""What a callback is: it looks on while a run trains, is told at fixed moments, and changes nothing that is trained.

A callback gets a `CallbackContext` and not the Run: what it may know, and the few things that it may do. One that is
off is never constructed (lockstep.callbacks.build), so it costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lockstep.config.schema import Config
from lockstep.distributed.process_group import World
from lockstep.loggers.base import Histogram
from lockstep.loggers.console import ConsoleReport
from lockstep.training.evaluate import Evaluation
from lockstep.training.local_gradients import LocalGradients
from lockstep.training.precision import Scaler


@dataclass
class CallbackContext:
    """Where a training is, on one rank. The training loop writes it; callbacks read it.

    Attributes:
        recipe: its name.
        out: the run directory.
        quiet: the run belongs to a tool: nothing on the console.
        saves: whether checkpoints are written and resumed; not where it is quiet, unless the tool says so.
        report: what a person reads.
        started: when, by time.perf_counter().
        step: optimizer updates done, those that fp16's scaler left out included.
        steps_per_epoch, total_steps: how many there are; a run that stops early lowers `total_steps`.
        learning_rate: of the current step, in the first parameter group.
        updated: whether the last step changed the weights; fp16's scaler leaves out a step that overflows.
        paused_seconds: time so far that does not count for the speed that is logged.
        train_loss: of the last logged step, over the global batch; None before there is one.
        train_loss_step: the number of that step; 0 before there is one.
        scaler: fp16's, where the recipe has asked for one.
        notes: further fields of result.json.

    From `on_train_begin` on also:
        module: what this rank holds of the model, without any wrapper.
        model: the same, in its wrapper where it has one.
        parameter_names: every parameter of the whole model, in the same order on all ranks.
        gradients: what this rank holds of gradients and weights, and when they can be seen.
        columns: the names of the scalars that callbacks add to logged steps. They enter them in `on_train_begin`.
    """

    recipe: str
    config: Config
    world: World
    out: Path
    quiet: bool
    report: ConsoleReport
    started: float
    steps_per_epoch: int
    total_steps: int
    step: int = 0
    learning_rate: float = 0.0
    updated: bool = True
    paused_seconds: float = 0.0
    train_loss: float | None = None
    train_loss_step: int = 0
    scaler: Scaler | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)
    saves: bool = field(init=False)
    parameter_names: Sequence[str] = ()
    # Unset until on_train_begin, and never None in a callback.
    module: nn.Module = field(init=False)
    model: nn.Module = field(init=False)
    optimizer: Optimizer = field(init=False)
    gradients: LocalGradients = field(init=False)

    def __post_init__(self) -> None:
        self.saves = not self.quiet

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def rank(self) -> int:
        return self.world.rank

    @property
    def loss_scaling(self) -> dict[str, float]:
        """The loss scale and the steps left out so far, where losses are scaled."""
        if self.scaler is None or not self.scaler.is_enabled():
            return {}
        return {"loss_scale": self.scaler.get_scale(), "skipped_steps": self.scaler.skipped}

    def is_logged(self, step: int) -> bool:
        """Whether scalars are logged after a step, by its number from 1 up."""
        return step % self.config.log_every == 0 or step == self.total_steps

    def say(self, text: str) -> None:
        """A line for people: into this rank's log, and from rank 0 onto the console."""
        self.report.line(text)

    def note(self, text: str, **values: Any) -> None:
        """Add `values` to result.json, and `text`, which may be empty, to the final summary."""
        self.notes |= values
        if text:
            self.report.notes.append(text)

    def pause(self, seconds: float) -> None:
        """Not to count so much time for the speed that is logged."""
        self.paused_seconds += seconds


@dataclass
class LogRecord:
    """What is logged of one step: callbacks add to it in `on_log`, on all ranks.

    Attributes:
        usage: how busy the device is, in words, for the progress display.
    """

    scalars: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    usage: str = ""


class Callback:
    """Derive from it and override what you need; every hook does nothing by default.

    All ranks have the same callbacks and call each hook together, so that a hook may communicate. `context` is the same
    object in every call.

    Attributes:
        distorts_time: whether what it does to the current step makes that step's time say nothing.
    """

    distorts_time: bool = False

    def on_train_begin(self, context: CallbackContext) -> None:
        """The state to start from is in place, and no step has been taken yet."""

    def on_step_begin(self, context: CallbackContext) -> None:
        """Step number `context.step + 1` begins: its batch has not been fetched."""

    def on_fetch_begin(self, context: CallbackContext) -> None:
        """This rank begins to wait for a batch."""

    def on_fetch_end(self, context: CallbackContext) -> None:
        """The batch is there."""

    def on_loss(
        self, context: CallbackContext, loss: Tensor, weight: float | Tensor, scalars: dict[str, float | Tensor]
    ) -> None:
        """The recipe has recorded a mean loss, which may have its graph, its weight, and numbers of its own."""

    def on_step_end(self, context: CallbackContext) -> None:
        """Step number `context.step` has been taken.

        Raises:
            CheckFailed: to end the run in good order; on all ranks, or on none.
        """

    def on_log(self, context: CallbackContext, record: LogRecord) -> None:
        """Step number `context.step` is logged: add scalars and histograms."""

    def on_save(self, context: CallbackContext) -> None:
        """A checkpoint is about to say that all so far has happened: have it on disk."""

    def on_evaluation_begin(self, context: CallbackContext) -> None:
        """The model is about to be evaluated."""

    def on_evaluation_end(self, context: CallbackContext, evaluation: Evaluation) -> None:
        """An evaluation after step number `context.step` is done; the same on all ranks."""

    def on_train_end(self, context: CallbackContext, evaluation: Evaluation | None) -> None:
        """The last step has been taken; `evaluation` is the last one. Not called where a run is cut off."""

    def on_exit(self, context: CallbackContext) -> None:
        """The rank leaves, after `on_train_end` or in good order before: close what is open."""


class CallbackList(Callback):
    """Calls several callbacks, in their order."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.callbacks = list(callbacks)

    @property
    def distorts_time(self) -> bool:  # type: ignore[override]
        return any(each.distorts_time for each in self.callbacks)

    def on_train_begin(self, context: CallbackContext) -> None:
        for each in self.callbacks:
            each.on_train_begin(context)

    def on_step_begin(self, context: CallbackContext) -> None:
        for each in self.callbacks:
            each.on_step_begin(context)

    def on_fetch_begin(self, context: CallbackContext) -> None:
        for each in self.callbacks:
            each.on_fetch_begin(context)

    def on_fetch_end(self, context: CallbackContext) -> None:
        for each in self.callbacks:
            each.on_fetch_end(context)

    def on_loss(
        self, context: CallbackContext, loss: Tensor, weight: float | Tensor, scalars: dict[str, float | Tensor]
    ) -> None:
        for each in self.callbacks:
            each.on_loss(context, loss, weight, scalars)

    def on_step_end(self, context: CallbackContext) -> None:
        for each in self.callbacks:
            each.on_step_end(context)

    def on_log(self, context: CallbackContext, record: LogRecord) -> None:
        for each in self.callbacks:
            each.on_log(context, record)

    def on_save(self, context: CallbackContext) -> None:
        for each in self.callbacks:
            each.on_save(context)

    def on_evaluation_begin(self, context: CallbackContext) -> None:
        for each in self.callbacks:
            each.on_evaluation_begin(context)

    def on_evaluation_end(self, context: CallbackContext, evaluation: Evaluation) -> None:
        for each in self.callbacks:
            each.on_evaluation_end(context, evaluation)

    def on_train_end(self, context: CallbackContext, evaluation: Evaluation | None) -> None:
        for each in self.callbacks:
            each.on_train_end(context, evaluation)

    def on_exit(self, context: CallbackContext) -> None:
        for each in self.callbacks:
            each.on_exit(context)
