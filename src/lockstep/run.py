"""What a recipe is handed: its config, its place among the ranks, and the loop `run.steps(...)`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lockstep.callbacks.base import Callback, CallbackContext
from lockstep.callbacks.build import build_callbacks
from lockstep.checkpoint.backbone import backbone
from lockstep.checkpoint.manager import CheckpointManager
from lockstep.checkpoint.types import Engine, Stateful
from lockstep.config.schema import ConfigT
from lockstep.data.batch import Batch
from lockstep.data.batches import BatchSource
from lockstep.distributed.parallel_dims import ParallelDims
from lockstep.distributed.process_group import World
from lockstep.distributed.signals import Listener
from lockstep.loggers.console import ConsoleReport
from lockstep.loop.training_loop import TrainingLoop
from lockstep.memory.tracker import held_bytes
from lockstep.memory.usage import process_bytes
from lockstep.tasks.build import blocks_of_task, build_task
from lockstep.training.activation_checkpointing import checkpoint_activations
from lockstep.training.auto import choose_for_hardware
from lockstep.training.compiling import compile_model
from lockstep.training.optim import Schedule, as_one_optimizer
from lockstep.training.precision import DTYPES, Scaler, autocast


class Run(Generic[ConfigT]):
    """One run of one recipe, seen from one rank.

    Args:
        shards: in how many equal shares a global batch is cut; None: one per rank, or one per pipeline.
        quiet: it belongs to a tool: nothing on the console, no checkpoints, never resumed.
        callbacks: a tool's own, which are called before all others.

    Attributes:
        config: every key the user can set, those that were `auto` decided.
        asked, world: the same as it was typed; rank, world_size, device and backend.
        out: the run directory, the same on all ranks.
        shards, shard: in how many equal shares a global batch is cut, and which of them is this rank's.
        started: when, by time.perf_counter().
        scheduled_steps: steps of all epochs, which the learning rate is planned over.
        task: what is trained: model, data and loss.
        data: the data sets, and this rank's batches of them.
        loop: what happens around the steps, for a trainer that has a loop of its own.
        report, prepare: what a person reads; called with every model that is placed.
    """

    def __init__(
        self,
        recipe: str,
        config: ConfigT,
        world: World,
        out: Path,
        next_command: str = "",
        shards: int | None = None,
        quiet: bool = False,
        listener: Listener | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.recipe, self.world, self.out, self.started = recipe, world, out, time.perf_counter()
        self.asked = config  # what was typed: tools hand it on to runs that choose for themselves
        self.config, choices = choose_for_hardware(config, recipe, world, out)
        config = self.config
        self.device, self.device_ids, self.listener = world.device, world.device_ids, listener
        dims = ParallelDims.of(world.rank, world.world_size, config, shards)
        self.shards, self.shard, self._home = dims.shards, dims.shard, "cpu" if dims.in_stages else self.device
        torch.autograd.set_detect_anomaly(config.detect_anomaly)
        self.task: Any = build_task(config)
        torch.manual_seed(config.seed)  # all ranks draw the same weights; `loop.restore` seeds them apart
        self.data = BatchSource(self.task, config, world, dims, DTYPES[config.precision])
        self._bytes_before = process_bytes("VmRSS")  # of the interpreter, libraries and images
        self.report = ConsoleReport(recipe, config, world, out, next_command, quiet)
        self.prepare: Callable[[nn.Module], None] | None = None
        self.steps_per_epoch = self.data.train_size // config.global_batch_size
        self.scheduled_steps = config.epochs * self.steps_per_epoch
        total_steps = min(self.scheduled_steps, config.max_steps or self.scheduled_steps)
        self._context = CallbackContext(
            recipe, config, world, out, quiet, self.report, self.started, self.steps_per_epoch, total_steps
        )
        self._callbacks = build_callbacks(config, world, dims, self.data, first=callbacks)
        self.loop = TrainingLoop(
            self._context,
            dims,
            self.data,
            CheckpointManager(recipe, config, world, out, self.report.line),
            self._callbacks,
            chosen=[str(choice) for choice in choices],
            listener=listener,
        )

    @property
    def step(self) -> int:
        """Optimizer updates done."""
        return self._context.step

    @property
    def total_steps(self) -> int:
        """Optimizer updates in all; a run that stops early lowers it."""
        return self._context.total_steps

    @total_steps.setter
    def total_steps(self, steps: int) -> None:
        self._context.total_steps = steps

    @property
    def notes(self) -> dict[str, Any]:
        """What has been noted for result.json."""
        return self._context.notes

    # What recipes call ------------------------------------------------------------------------------------------
    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to this rank's device, or to the host where the rank then takes its own stages from there.

        It gets its dtype and memory format; its blocks are checkpointed, and it is compiled, if asked."""
        model = model.to(device=self._home, dtype=DTYPES[self.config.precision])
        if self.config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        checkpoint_activations(model, self.blocks(model), self.config.checkpoint_activations)
        if self.config.compile:
            compile_model(model, self.blocks(model))
        if self.prepare:
            self.prepare(model)
        return model

    def backbone(self, model: nn.Module, head: str, pretrained: str | None = None) -> dict[str, Tensor]:
        """On rank 0 all weights of a trained model but its head's, whose names begin with `head`; elsewhere nothing.

        resume=PATH or `pretrained` says whose; they fit `model`, for `load_state_dict(..., strict=False)`. A run that
        asks for them starts at step 0, or resumes from a checkpoint of its own.

        Raises:
            UserError: there are none, or they are another model's.
        """
        self.loop.backbone_only = True
        found, said = backbone(self.config, model, head, pretrained) if self.world.rank == 0 else ({}, "")
        if pretrained != "random":
            self.loop.checkpoints.resumed_from = source = pretrained or self.config.resume
            self.report.line(f"backbone from {source}: {len(found)} tensors{said}")
        return found

    def restore_bucket_order(self, model: nn.Module, since: int) -> None:
        """To be called where a model is wrapped anew between two steps, which is to happen at step `since`.

        In a run that is resumed from a later step, DDP is given back the order in which it had come to send gradients.
        """
        if self.step > since:
            self.loop.restore_bucket_order(model)

    def blocks(self, model: nn.Module) -> list[str]:
        """The modules that are sharded, or cut between: the task's `blocks`, or `models.blocks.default_blocks`."""
        return list(blocks_of_task(self.task, model))

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context for forward and loss: bf16 or fp16 where the precision says so, else nothing."""
        return autocast(self.config.precision, self.device)

    def scaler(self) -> Scaler:
        """What scales the loss before backward and the gradients back before the update: for fp16; else it passes on.

        Its state becomes part of the checkpoints.
        """
        fp16 = self.config.precision == "fp16"
        self._context.scaler = scaler = Scaler(self.device, self.config.loss_scale, enabled=fp16)
        return scaler

    def record(self, *, loss: Tensor, weight: float | Tensor = 1.0, **scalars: float | Tensor) -> None:
        """Hand over a micro-batch's mean loss and its weight; `scalars` are further means to log, averaged likewise."""
        self._callbacks.on_loss(self._context, loss, weight, scalars)

    def note(self, text: str, **values: Any) -> None:
        """Add what a technique has to say of itself: `values` to result.json, `text` to the final summary."""
        self._context.note(text, **values)

    def steps(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        scheduler: Schedule = None,
        whole: Callable[[], nn.Module] | None = None,
        evaluated: nn.Module | None = None,
        keep: Mapping[str, Stateful] | None = None,
        engine: Engine | None = None,
    ) -> Iterator[Batch]:
        """Yield this rank's share of every global batch, on its device, until training is over.

        Before the first batch it takes the run up where an earlier start was cut off. Between two batches it logs,
        evaluates at the end of an epoch, saves checkpoints, keeps time, and leaves when the run is preempted or no
        longer gets better. What decides the training is the recipe's: nothing here changes a weight, a gradient or a
        learning rate.

        The model is in training mode when the first batch comes. It is evaluated in evaluation mode, the whole of it on
        each rank or in its shards, and is back in training mode before the next batch.

        Args:
            model: what is trained, wrapped or not.
            optimizer: what updates it, or several, each of which updates tensors of its own.
            scheduler: what sets an optimizer's learning rate, of any of torch's classes, where it is not constant, or
                several; the recipe calls step(). Their state is part of the checkpoints, but that of
                `build_scheduler`'s, which goes to the step at which the run resumes.
            whole: called on all ranks together, returns the complete model on each, for evaluation and export; needed
                where a rank holds only some of its layers. A model sharded by fully_shard is evaluated as it is.
            evaluated: evaluated in place of that one, by a forward that those who hold one model make together.
            keep: further objects that checkpoints are to hold, by name, such as an average of the weights.
            engine: what saves and restores model and optimizer by its own means.

        Yields:
            Batch: global_batch_size / shards samples as the data sets and `collate` give them, floats in the model's dtype.

        Raises:
            Preempted: a signal has come to any of the ranks, and the state is saved.
        """
        loop, joint = self.loop, as_one_optimizer(optimizer)
        loop.restore(model, joint, scheduler=scheduler, whole=whole, evaluated=evaluated, keep=keep, engine=engine)
        loop.begin(joint, model)
        batches = self.batches(self.step, self.total_steps)
        model.train()
        while loop.before_step():
            batch = next(batches, None)
            if batch is None:
                raise RuntimeError(
                    f"rank {self.world.rank} has no batch for step {self.step + 1} of {self.total_steps}: its data set "
                    "or its sampler is shorter than that of other ranks"
                )
            yield batch
            if loop.after_step():
                loop.evaluate()

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """This rank's shares of the global batches of steps start…stop − 1, as `steps` yields them."""
        return self.loop.fetched(self.data.train_batches(start, stop))

    def finish(self) -> None:
        """Export the weights and write result.json, when the recipe's function has returned."""
        self.loop.finish()

    def held_bytes(self) -> dict[str, int]:
        """What this rank's memory is held by right now, in bytes by name."""
        return held_bytes(self.loop.module, getattr(self._context, "optimizer", None), self.device, self._bytes_before)
