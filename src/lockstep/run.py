"""What a recipe is handed: its config, its place among the ranks, and the loop `run.steps(...)`."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Generic

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lockstep.callbacks.instruments import Instruments
from lockstep.checkpoint.backbone import backbone
from lockstep.checkpoint.manager import CheckpointManager, export
from lockstep.checkpoint.state import TrainingState
from lockstep.checkpoint.types import Engine, Stateful
from lockstep.config.schema import ConfigT
from lockstep.data import sampler as order
from lockstep.data.datasets import Batch, checksum, load_data
from lockstep.data.loader import Samples, build_loader
from lockstep.data.transforms import Normalise
from lockstep.distributed.collectives import gather_numbers
from lockstep.distributed.consistency import check_consistency
from lockstep.distributed.dtensor import full_state_dict, is_sharded
from lockstep.distributed.dtensor import full_tensor as whole_tensor
from lockstep.distributed.heartbeat import TRAINING, WAITING
from lockstep.distributed.process_group import World
from lockstep.distributed.signals import Agreement, Listener, Preempted
from lockstep.errors import UserError
from lockstep.loggers.base import Logger, Mistake
from lockstep.loggers.build import build_loggers
from lockstep.loggers.console import ConsoleReport
from lockstep.memory.tracker import held_bytes, state_bytes
from lockstep.memory.usage import peak_memory_bytes, process_bytes
from lockstep.models.parameters import count_parameters
from lockstep.training import timing
from lockstep.training.auto import choose_for_hardware
from lockstep.training.ddp_buckets import settle_buckets
from lockstep.training.evaluate import Evaluation, evaluate, sync_buffers
from lockstep.training.local_gradients import LocalGradients
from lockstep.training.optim import SchedulerState, WarmupLR
from lockstep.training.precision import AUTOCAST, DTYPES, Scaler
from lockstep.training.random_state import seed_generators
from lockstep.utils.files import write_json


class NothingLeft(Exception):
    """Raised out of `run.steps` where a run that is continued had taken its last step already."""


class Run(Generic[ConfigT]):
    """One run of one recipe, seen from one rank.

    Attributes:
        config: every key the user can set, those that were `auto` decided.
        asked: the same as it was typed.
        world: rank, world_size, device and backend.
        out: the run directory, the same on all ranks.
        shards: in how many equal shares a global batch is cut: one a rank, or one a pipeline.
        shard: which of them is this rank's.
        scheduled_steps: steps of all epochs, which the learning rate is planned over.
        total_steps: steps that this run takes; fewer where max_steps ends it earlier.
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
    ) -> None:
        self.recipe, self.world, self.out = recipe, world, out
        self.asked = config  # what was typed: tools hand it on to runs that choose for themselves
        self.config, self.choices = choose_for_hardware(config, recipe, world, out)
        config = self.config
        self.heartbeat = world.heartbeat
        # The stages of a pipeline work on the same images; they are neighbouring ranks.
        self.shards = shards or world.world_size // config.model_parallel_size
        self.shard = world.rank // config.model_parallel_size % self.shards
        self.device, self.device_ids = world.device, world.device_ids
        self.started = time.perf_counter()
        # All ranks draw the same weights; where a recipe also needs different numbers per rank, steps() reseeds.
        torch.manual_seed(config.seed)
        torch.autograd.set_detect_anomaly(config.detect_anomaly)
        assert config.model.image_size is not None, "the app fills in what the data set says"
        self.image_size = config.model.image_size
        self.train_set, self.eval_set = load_data(config.data, self.image_size, config.seed)
        self._normalise = Normalise(config.data.mean, config.data.std)
        self.steps_per_epoch = len(self.train_set) // config.global_batch_size
        self.scheduled_steps = config.epochs * self.steps_per_epoch
        self.total_steps = min(self.scheduled_steps, config.max_steps or self.scheduled_steps)
        self.step = 0  # optimizer updates done
        self._bytes_before = process_bytes("VmRSS")  # of the interpreter, libraries and images
        self.quiet, self.listener = quiet, listener
        self.loggers: list[Logger] = []
        self.report = ConsoleReport(self.recipe, config, world, out, next_command, quiet)
        self.keep_gradients = False
        self.first_gradients: dict[str, Tensor] = {}
        self._whole: Callable[[], nn.Module] | None = None
        self._engine: Engine | None = None
        self._module: nn.Module | None = None  # what is trained, unwrapped
        self._scaler: Scaler | None = None
        self._backbone_only = False  # resume=PATH has done its part
        self.prepare: Callable[[nn.Module], None] | None = None  # what a proof does to every model that is placed
        self._sharded = False  # no rank ever holds the whole model
        self._loss: Tensor | None = None
        self._notes: dict[str, Any] = {}
        self._timer = timing.Stopwatch(self.device)
        self._instruments = Instruments(self)
        self._agreement: Agreement | None = None
        self._keeper = CheckpointManager(recipe, config, world, out, self.report.line)
        self._train_loss: float | None = None
        self._unlogged: Callable[[], None] | None = None  # ends the logging of a step
        self._evaluation: Evaluation | None = None

    # What recipes call ------------------------------------------------------------------------------------------

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to this rank's device in the configured dtype and memory format; compile it if asked to."""
        model = model.to(device=self.device, dtype=DTYPES[self.config.precision])
        if self.config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if self.config.compile:
            model.compile()  # in place: the state_dict keeps its names
        if self.prepare:
            self.prepare(model)
        return model

    def backbone(self, model: nn.Module, head: str, pretrained: str | None = None) -> dict[str, Tensor]:
        """On rank 0 all weights of a trained model but its head's, whose names begin with `head`; elsewhere nothing.

        resume=PATH or `pretrained` says whose; they fit `model`, for `load_state_dict(..., strict=False)`. A run that
        asks for them starts at step 0, or goes on from a checkpoint of its own.

        Raises:
            UserError: there are none, or they are another model's.
        """
        self._backbone_only = True
        found = backbone(self.config, model, head, pretrained) if self.world.rank == 0 else {}
        if pretrained != "random":
            self._keeper.resumed_from = source = pretrained or self.config.resume
            self.report.line(f"backbone from {source}: {len(found)} tensors, all but {head}*")
        return found

    def settle(self, model: nn.Module, since: int) -> None:
        """To be called where a model is wrapped anew between two steps, which is to happen at step `since`.

        In a run that goes on from a later step, DDP is given back the order in which it had come to send gradients.
        """
        if self.step > since:
            self._settle_buckets(model)

    def to_model(self, images: Tensor) -> Tensor:
        """Floats of the dtype, device and memory format that the model takes."""
        images = images.to(self.device, DTYPES[self.config.precision])
        return images.contiguous(memory_format=torch.channels_last) if self.config.channels_last else images

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context for forward and loss: bf16 or fp16 where the precision says so, else nothing."""
        if self.config.precision in AUTOCAST:
            return torch.autocast(self.device.type, AUTOCAST[self.config.precision])
        return contextlib.nullcontext()

    def scaler(self) -> Scaler:
        """What scales the loss before backward and the gradients back before the update: for fp16; else it passes on.

        Its state becomes part of the checkpoints.
        """
        self._scaler = Scaler(self.device, self.config.loss_scale, enabled=self.config.precision == "fp16")
        return self._scaler

    def record(self, *, loss: Tensor, weight: float = 1.0) -> None:
        """Hand over a mean loss; of several in one step, each with its share of this rank's images as its weight.

        Detached, because a kept loss keeps its whole graph; read at logged steps only, because reading waits for the
        GPU.
        """
        self._instruments.recorded(loss)
        part = loss.detach() if weight == 1 else loss.detach() * weight
        self._loss = part if self._loss is None else self._loss + part

    def note(self, text: str, **values: Any) -> None:
        """Add what a technique has to say of itself: `values` to result.json, `text` to the final summary."""
        self._notes |= values
        if text:
            self.report.notes.append(text)

    def steps(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler | None = None,
        whole: Callable[[], nn.Module] | None = None,
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
            optimizer: what updates it.
            scheduler: what sets the optimizer's learning rate, of any of torch's classes, where it is not constant; the
                recipe calls its step(). Its state is part of the checkpoints, but that of `build_scheduler`'s, which
                goes to the step at which the run resumes.
            whole: called on all ranks together, returns the complete model on each, for evaluation and export; needed
                where a rank holds only some of its layers. A model sharded by fully_shard is evaluated as it is.
            keep: further objects that checkpoints are to hold, by name, such as an average of the weights.
            engine: what saves and restores model and optimizer by its own means.

        Yields:
            Batch: images [global_batch_size / shards, 3, H, W], normalised, in the model's dtype; labels int64.

        Raises:
            Preempted: a signal has come to any of the ranks, and the state is saved.
        """
        state = self._take_up(model, optimizer, scheduler, whole, keep, engine)
        self._begin(optimizer, model)
        batches = self.batches(self.step, self.total_steps)
        model.train()
        while self._before_step(state):
            batch = next(batches, None)
            if batch is None:
                raise RuntimeError(
                    f"rank {self.world.rank} has no batch for step {self.step + 1} of {self.total_steps}: its data set "
                    "or its sampler is shorter than that of other ranks"
                )
            yield batch
            if self._after_step():
                model.eval()
                self._evaluated(self._evaluate())
                model.train()  # evaluation switched BatchNorm and dropout off: back on before the next batch

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """This rank's shares of the global batches of steps start…stop − 1, as `steps` yields them."""
        config = self.config
        sampler = order.StepSampler(
            len(self.train_set), config.global_batch_size, config.seed, self.shard, self.shards, start, stop
        )
        samples = Samples(self.train_set, config.seed, config.data.augment)
        loader = build_loader(samples, sampler, self._workers(), self.device.type == "cuda")
        return self._awaited(map(self._prepare, loader))

    def _awaited(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            self.heartbeat.enter(WAITING, self.step + 1)
            with self._instruments.waiting():
                batch = next(batches, None)
            if batch is None:
                return
            self.heartbeat.enter(TRAINING)
            yield batch

    def eval_sampler(self) -> order.EvalSampler:
        """Which samples of the evaluation set are this rank's."""
        size, batch_size = len(self.eval_set), self.config.eval_batch_size
        return order.EvalSampler(size, batch_size, self.world.rank, self.world.world_size)

    def eval_batches(self, sampler: order.EvalSampler) -> Iterator[Batch]:
        """This rank's batches of the evaluation set, prepared as `batches` are, and not augmented."""
        samples = Samples(self.eval_set, self.config.seed, augment=False)
        return map(self._prepare, build_loader(samples, sampler, self._workers(), self.device.type == "cuda"))

    def finish(self) -> None:
        """Export the weights and write result.json, when the recipe's function has returned."""
        if self._whole is None:
            return  # a tool, which did not train
        if self.step < self.total_steps:
            raise UserError(
                f"{self.recipe} left run.steps after step {self.step} of {self.total_steps}; "
                "run the loop to its end, or set max_steps"
            )
        self.heartbeat.enter("finishing")
        self._keeper.wait()
        module = self._whole()
        weights = full_state_dict(module, self.device, keep=self.world.rank == 0)
        memory = gather_numbers(peak_memory_bytes(self.device), self.device)
        mine, total = state_bytes(self._optimizer)
        state = gather_numbers(mine, self.device)
        self._notes = {"state_bytes_by_rank": [int(m) for m in state], "state_bytes_unsharded": total} | self._notes
        self._instruments.finish(self._workers())
        self._show_mistakes()
        for logger in self.loggers:
            logger.close()
        if self.world.rank == 0:
            export(weights, self.out / "model.pt")
            self._keeper.export_best(self._state, weights)
            result = self._result("finished", memory)
            write_json(self.out / "result.json", result)
            self.report.finish(result)

    def _show_mistakes(self) -> None:
        """Give the loggers a few images that the trained model gets wrong; result.json says which they are."""
        wrong = self._evaluation.wrong[: self.config.logger.images] if self._evaluation else ()
        self._notes["misclassified"] = [
            dict(zip(("sample", "label", "predicted"), each, strict=True)) for each in wrong
        ]
        if wrong and self.loggers and not self.quiet:
            images = self.eval_set.fetch(torch.tensor([sample for sample, _, _ in wrong]), None).images
            mistakes = [Mistake(*each, image) for each, image in zip(wrong, images, strict=True)]
            for logger in self.loggers:
                logger.mistakes(self.step, mistakes)

    def held_bytes(self) -> dict[str, int]:
        """What this rank's memory is held by right now, in bytes by name."""
        return held_bytes(self._module, getattr(self, "_optimizer", None), self.device, self._bytes_before)

    # What happens between two batches ---------------------------------------------------------------------------

    def _take_up(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        scheduler: LRScheduler | None = None,
        whole: Callable[[], nn.Module] | None = None,
        keep: Mapping[str, Stateful] | None = None,
        engine: Engine | None = None,
    ) -> TrainingState:
        """Take the run up where an earlier start was cut off, or start it; `steps` has the arguments.

        An engine may make its optimizer later.
        """
        self._engine, self._whole = engine, whole or (lambda: unwrap(model))
        self._module = unwrap(model)
        self._sharded = any(is_sharded(parameter) for parameter in model.parameters())
        if self.keep_gradients and engine:
            engine.keep_gradients(self.first_gradients)
        elif self.keep_gradients and optimizer:
            optimizer.register_step_pre_hook(lambda *_: self._before_update(unwrap(model)))
        seed_generators(self.config.seed * 1_000_003 + self.world.rank)  # dropout and the like differ between ranks
        own: dict[str, Stateful] = {"scaler": self._scaler} if self._scaler and self._scaler.is_enabled() else {}
        if optimizer and scheduler and not isinstance(scheduler, WarmupLR):
            own["scheduler"] = SchedulerState(scheduler, optimizer)
        self._state = TrainingState(
            unwrap(model),
            optimizer,
            own | dict(keep or {}),
            rank=self.world.rank,
            device=self.device,
            owns_buffers=self.shard == 0,
            engine=engine,
        )
        if not self.quiet:  # a tool's run is never continued
            self.heartbeat.enter("resuming")
            self._resume(model)
        if isinstance(scheduler, WarmupLR):
            scheduler.set_step(self.step)
        return self._state

    def _begin(self, optimizer: Optimizer, model: nn.Module) -> None:
        """Start to listen, to log and to keep time, when the state is the one to go on from; `model`: wrapped or not.

        Raises:
            NothingLeft: it is that of the last step.
            UserError: the ranks have not the same data.
        """
        self._optimizer = optimizer
        data_config = self.config.data
        check_consistency(
            {
                "images to train on": len(self.train_set),
                "images to evaluate": len(self.eval_set),
                "steps to take": self.total_steps,
                "other images to train on": checksum(self.train_set),
                "other images to evaluate": checksum(self.eval_set),
            },
            f"data.root={data_config.root}" if data_config.root else f"data={data_config.name}",
            self.world,
        )
        if self.listener:
            if not self.quiet:
                # Whose peer has died waits in here until its time is over, or until a signal ends it: as long as there
                # is nothing to save, the first one does.
                self._keeper.connect()
            self._agreement, self.listener.training = Agreement(self.world.control, self.listener), True
        assert self._whole is not None
        assert self._module is not None
        complete = self._whole()
        self._parameters = count_parameters(complete)
        names = [name for name, _ in complete.named_parameters()]
        self._instruments.begin(self._module, model, optimizer, names, self._parts(optimizer))
        if self.world.rank == 0:
            self.loggers = build_loggers(
                self.out,
                self.config,
                name=f"{self.recipe}/{self.out.name}",
                step=self.step,
                columns=self._instruments.columns,
                say=self.report.line,
            )
        self.report.start(
            parameters=self._parameters,
            images=(len(self.train_set), len(self.eval_set)),
            steps=(self.steps_per_epoch, self.total_steps),
            chosen=[str(choice) for choice in self.choices],
            first=self.step,
        )
        self._keeper.begin()
        self._logged_at, self._logged_step = time.perf_counter(), self.step
        self._setup_seconds = self._logged_at - self.started
        if self.step >= self.total_steps:
            self.heartbeat.enter("evaluating", self.step)
            self._evaluation = self._evaluate()
            raise NothingLeft

    def _parts(self, optimizer: Optimizer) -> LocalGradients:
        """What this rank holds of gradients and weights."""
        assert self._module is not None
        if self._engine:
            return self._engine.parts(self._module, optimizer)
        pipeline = self.config.model_parallel_size > 1  # the same stages of several pipelines hold the same
        return LocalGradients(self._module, optimizer, owns=not pipeline or self.shard == 0, differ=pipeline)

    def _before_step(self, state: TrainingState) -> bool:
        """Save where a checkpoint is due, and leave where a signal has come; whether there is a step to take."""
        sign, due = 0, False
        if self._agreement:
            sign, due = self._agreement.ask(self.step, self._keeper.is_due_by_the_clock())
        last = self.step == self.total_steps
        leaves = bool(sign) and not last
        if leaves and self.listener:
            self.listener.announce(sign)
        if (leaves or due or self._keeper.is_due(self.step, last)) and self.step > self._keeper.saved_step:
            self._save(state)
        if leaves:
            self._leave(sign)
        if not last:
            self._lr = self._next_lr()
            self._instruments.before_step(self.step + 1, self._is_logged(self.step + 1))
            self._timer.start()
        return not last

    def _after_step(self) -> bool:
        """Count and log a step that was taken; whether an evaluation is due, whose result `_evaluated` takes.

        Raises:
            UserError: the model is in evaluation mode.
        """
        if not self._instruments.profiling:
            self._timer.stop()
        self._settle_log()
        self.step += 1
        if self._module and not self._module.training:
            raise UserError(
                f"{self.recipe}: step {self.step} left the model in evaluation mode, which trains without dropout and "
                "with BatchNorm's old statistics; call model.train() after your own model.eval()"
            )
        left_out = self._scaler is not None and self._scaler.left_out
        if left_out:
            scale = self._scaling["loss_scale"]
            self.report.line(f"step {self.step} left out: gradients are not finite; the loss scale is now {scale:g}")
        self._instruments.after_step(self.step, updated=not left_out)
        if self._is_logged(self.step):
            self._log_step(left_out)
        elif left_out:
            self._log(self.step, self._scaling)
        self._loss = None
        self._paused_at = time.perf_counter()
        evaluates = self.step == self.total_steps or self._epoch_ends_with_evaluation()
        if evaluates:
            self._settle_log()
            self.heartbeat.enter("evaluating")
        return evaluates

    def pause(self, seconds: float) -> None:
        """Not to count so much time in the speed that is logged."""
        self._logged_at += seconds

    def _log_step(self, left_out: bool) -> None:
        """Begin to log a step. What has to be summed over the ranks is on its way while the next step is taken."""
        now = time.perf_counter()
        speed = (self.step - self._logged_step) * self.config.global_batch_size / (now - self._logged_at)
        self._logged_at, self._logged_step = now, self.step
        more, histograms, usage = self._instruments.read(updated=not left_out)
        scalars = {"loss": 0.0, "lr": self._lr, "images_per_second": round(speed, 1), "peak_memory_bytes": 0}
        scalars |= self._scaling | more
        summed = self._loss_and_memory()

        def finish(step: int) -> None:
            self._train_loss, scalars["peak_memory_bytes"] = summed()
            scalars["loss"] = self._train_loss
            self._log(step, scalars)
            for logger in self.loggers if histograms else ():
                logger.histograms(step, histograms)
            self.report.step(step, self._train_loss, speed, usage)

        self._unlogged = partial(finish, self.step)

    def _settle_log(self) -> None:
        """Write down the logged step that is under way, where there is one."""
        if self._unlogged:
            finish, self._unlogged = self._unlogged, None
            finish()

    def _is_logged(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step == self.total_steps

    def stop(self) -> None:
        """Bring to an end what is under way, before all ranks leave."""
        self._settle_log()
        self._keeper.wait()
        for logger in self.loggers:
            logger.close()

    def _evaluated(self, result: Evaluation) -> None:
        """Log an evaluation, and judge by it."""
        self._evaluation = result
        scalars = {"eval_loss": result.loss, "eval_accuracy": result.accuracy, "eval_f1": result.f1}
        self._log(self.step, scalars)
        self.report.evaluation(self.step, result)
        self._keeper.judge(result)
        if self._keeper.is_out_of_patience and self.step < self.total_steps:
            waited = self._keeper.waited
            self.report.line(f"stopping early: {self.config.metric} has not become better in {waited} evaluations")
            self.total_steps = self.step
        self.pause(time.perf_counter() - self._paused_at)

    @property
    def _scaling(self) -> dict[str, float]:
        """The loss scale and the steps left out so far, where there is one."""
        if self._scaler is None or not self._scaler.is_enabled():
            return {}
        return {"loss_scale": self._scaler.get_scale(), "skipped_steps": self._scaler.skipped}

    def _next_lr(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])

    def _resume(self, model: nn.Module) -> None:
        """Take up what this run directory holds, else what resume=PATH names, else start at step 0."""
        assert self._whole is not None
        facts = self._keeper.find(
            self._state,
            self.total_steps,
            whole=self._whole,
            weights=not self._backbone_only,
            before=lambda: self._settle_buckets(model),
        )
        if facts:
            self.step, self._train_loss = self._keeper.started_at, facts["train_loss"]
            if self._keeper.is_out_of_patience:
                self.total_steps = self.step

    def _settle_buckets(self, model: nn.Module) -> None:
        if self.shards > 2:
            share = math.ceil(self.config.global_batch_size / self.shards / self.config.accumulate)
            with self.autocast():
                settle_buckets(model, self.to_model(torch.zeros(share, 3, self.image_size, self.image_size)))

    def _save(self, state: TrainingState) -> None:
        """Have the checkpoint of this step written; the clock by which speed is measured stands still meanwhile."""
        self._settle_log()
        if self.quiet:
            return
        self.heartbeat.enter("saving", self.step)
        paused = time.perf_counter()
        for logger in self.loggers:
            logger.flush()
        evaluation = asdict(self._evaluation) if self._evaluation else None
        self._keeper.save(
            state, self.step, epoch=self.epoch, lr=self._next_lr(), train_loss=self._train_loss, metrics=evaluation
        )
        self.pause(time.perf_counter() - paused)

    def _leave(self, sign: int) -> None:
        """Write down how far it came, and go.

        Raises:
            Preempted: always.
        """
        self.stop()
        name = signal.Signals(sign).name
        if not self.quiet:
            step = self._keeper.newest_step
            saved = f"saved at step {step}" if step else "nothing is saved"
            self.report.line(f"preempted by {name} after step {self.step} of {self.total_steps}: {saved}")
        if self.world.rank == 0 and not self.quiet:
            write_json(self.out / "result.json", self._result("preempted", [0.0]))
        raise Preempted(name)

    def _before_update(self, module: nn.Module) -> None:
        """Keep what a proof compares: the first update's gradients, by the names of this rank's parameters."""
        if not self.first_gradients:
            named = module.named_parameters()
            self.first_gradients = {
                name: whole_tensor(p.grad.detach(), self.device).clone() for name, p in named if p.grad is not None
            }

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self.step // self.steps_per_epoch

    def _workers(self) -> int:
        """Processes that decode images; images in memory are faster without."""
        if self.config.data.workers is not None:
            return self.config.data.workers
        return max(1, self.world.threads) if self.config.data.name == "imagefolder" else 0

    def _prepare(self, batch: Batch) -> Batch:
        """To the device as bytes, then to normalised floats of the model's size and memory format."""
        images = batch.images.to(self.device, non_blocking=True)
        if not self.config.channels_last:
            images = images.contiguous()  # an image folder's are channels_last; bytes are quicker to move than floats
        images = self._normalise(images, DTYPES[self.config.precision])
        size = self.image_size
        if images.shape[-1] != size:
            images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
        return Batch(self.to_model(images), batch.labels.to(self.device, non_blocking=True))

    def _loss_and_memory(self) -> Callable[[], tuple[float, int]]:
        """Begin one all-reduce; its end: (the loss over the global batch, the largest peak of a rank's memory so far).

        The loss is the mean over the ranks that have one, whose shares are equal; of a pipeline only the last stage has
        one. Of the memory each rank writes its own number, and zeros for the others.

        Raises:
            UserError: no rank called run.record(loss=...) in this step.
        """
        total = torch.zeros(2 + self.world.world_size, dtype=torch.float64, device=self.device)
        if self._loss is not None:
            total[0], total[1] = self._loss.double().to(self.device), 1
        total[2 + self.world.rank] = peak_memory_bytes(self.device)
        work = dist.all_reduce(total, async_op=True)

        def summed() -> tuple[float, int]:
            work.wait()
            loss, count, *memory = total.tolist()
            if not count:
                raise UserError(f"{self.recipe}: no loss to log; call run.record(loss=loss) in every step")
            return loss / count, int(max(memory))

        return summed

    def _epoch_ends_with_evaluation(self) -> bool:
        every = self.config.eval_every * self.steps_per_epoch
        return every > 0 and self.step % every == 0

    def _evaluate(self) -> Evaluation:
        # The bare module: DistributedDataParallel's forward communicates, and ranks may have unequal batches here.
        assert self._whole is not None
        module = self._whole().eval()
        if self.shards > 1:
            sync_buffers(module)
        sampler = self.eval_sampler()
        if self._sharded:  # its forward talks to all ranks, and its own policy says in which precision it computes
            blank = self.to_model(torch.zeros(1, 3, self.image_size, self.image_size))
            return evaluate(module, self.eval_batches(sampler), sampler, self.device, blank)
        with self.autocast():
            return evaluate(module, self.eval_batches(sampler), sampler, self.device)

    def _log(self, step: int, scalars: dict[str, float]) -> None:
        where = {
            "step": step,
            "epoch": step // self.steps_per_epoch,
            "samples_seen": step * self.config.global_batch_size,
        }
        for logger in self.loggers:
            logger.log(where | scalars)

    def _result(self, status: str, memory: list[float]) -> dict[str, Any]:
        """The run in numbers; speeds are those of this start, null where it took no step."""
        parameters, trainable = self._parameters
        seconds = self._timer.seconds()
        median = timing.percentile(seconds, 50) if seconds else None
        return (
            {
                "recipe": self.recipe,
                "status": status,
                "world_size": self.world.world_size,
                "backend": self.world.backend,
                "device": self.device.type,
                "precision": self.config.precision,
                "channels_last": self.config.channels_last,
                "allocator": self.config.allocator,
                "steps": self.step,
                "epochs": self.epoch,
                "samples_seen": self.step * self.config.global_batch_size,
                "train_loss": self._train_loss,
                "eval_loss": self._evaluation.loss if self._evaluation else None,
                "eval_accuracy": self._evaluation.accuracy if self._evaluation else None,
                "eval_f1": self._evaluation.f1 if self._evaluation else None,
                "images_per_second": self.config.global_batch_size / median if median else None,
                "step_seconds_p50": median,
                "step_seconds_p95": timing.percentile(seconds, 95) if seconds else None,
                "peak_memory_bytes": int(max(memory)),
                "peak_memory_bytes_by_rank": [int(m) for m in memory],
                "parameters": parameters,
                "trainable_parameters": trainable,
                "setup_seconds": self._setup_seconds,
                "wall_seconds": time.perf_counter() - self.started,
            }
            | self._keeper.result()
            | self._scaling
            | self._notes
        )


def unwrap(model: nn.Module) -> nn.Module:
    """The module that a wrapper like DistributedDataParallel holds under the name `module`."""
    inner = getattr(model, "module", None)
    return inner if isinstance(inner, nn.Module) else model
