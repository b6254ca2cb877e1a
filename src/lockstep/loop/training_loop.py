"""What happens around the steps of a training: before the first one, between two of them, after the last one.

`Run.steps` drives it, and so does a trainer from elsewhere that has a loop of its own, such as Lightning's, through the
same public methods, in this order:

    loop.restore(model, optimizer)      take up an earlier start's state
    loop.begin(optimizer, model)        raises NothingLeft where the last step has been taken
    while loop.before_step():           saves, and leaves where a signal has come
        ...                             one step
        if loop.after_step():           counts and logs it
            loop.evaluate()             or loop.evaluated(evaluation), where the trainer evaluates by itself
    loop.finish()                       exports the weights, writes result.json
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict

from torch import nn
from torch.optim import Optimizer

from lockstep.callbacks.base import CallbackContext, CallbackList, LogRecord
from lockstep.checkpoint.manager import CheckpointManager, export
from lockstep.checkpoint.state import TrainingState
from lockstep.checkpoint.types import Engine, Stateful
from lockstep.data.batch import Batch
from lockstep.data.batches import BatchSource
from lockstep.distributed.collectives import gather_numbers
from lockstep.distributed.consistency import check_consistency
from lockstep.distributed.dtensor import full_state_dict, is_sharded
from lockstep.distributed.heartbeat import TRAINING, WAITING
from lockstep.distributed.parallel_dims import ParallelDims
from lockstep.distributed.signals import Agreement, Listener, Preempted
from lockstep.distributed.store import await_everyone
from lockstep.errors import CheckFailed, UserError
from lockstep.loop.finite import FiniteCheck
from lockstep.loop.result import result_fields
from lockstep.loop.show import show
from lockstep.memory.tracker import gathered_state_bytes
from lockstep.memory.usage import peak_memory_bytes
from lockstep.models.parameters import count_parameters, unwrap
from lockstep.task import option
from lockstep.training.ddp_buckets import restore_bucket_order
from lockstep.training.evaluate import Evaluation, Evaluator
from lockstep.training.local_gradients import LocalGradients
from lockstep.training.optim import JointOptimizer, Schedule, go_to_step, scheduler_states
from lockstep.training.precision import autocast
from lockstep.training.random_state import seed_generators
from lockstep.training.timing import Stopwatch
from lockstep.utils.files import write_json


class NothingLeft(Exception):
    """Raised where a resumed run had taken its last step already."""


class TrainingLoop:
    """One rank's, for one start of a run. All ranks call each method together.

    Args:
        context: what callbacks see; this keeps it up to date.
        chosen: what was chosen for the hardware, in words, for the start-up summary.
        listener: where signals arrive; None: nobody listens.

    Attributes:
        module: what is trained, without its wrapper; None until `restore`.
        timer: of the steps, by which result.json states the speed.
        evaluation: the last one.
    """

    def __init__(
        self,
        context: CallbackContext,
        dims: ParallelDims,
        source: BatchSource,
        checkpoints: CheckpointManager,
        callbacks: CallbackList,
        *,
        chosen: list[str],
        listener: Listener | None,
    ) -> None:
        self.context, self.callbacks, self.checkpoints = context, callbacks, checkpoints
        self.timer = Stopwatch(context.device)
        self.module: nn.Module | None = None
        self.evaluation: Evaluation | None = None
        self.backbone_only = False  # resume=PATH names what the recipe itself takes a part of
        self._dims, self._source, self._chosen, self._listener = dims, source, chosen, listener
        self._heartbeat = context.world.heartbeat
        self.evaluator = Evaluator(context.config, source, context.device, dims, context.world.control)
        self._agreement: Agreement | None = None
        self._whole: Callable[[], nn.Module]  # once there is a module

    # Before the first step --------------------------------------------------------------------------------------

    def restore(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        scheduler: Schedule = None,
        whole: Callable[[], nn.Module] | None = None,
        evaluated: nn.Module | None = None,
        keep: Mapping[str, Stateful] | None = None,
        engine: Engine | None = None,
    ) -> None:
        """Take up what this run directory holds, else what resume=PATH names, else start at step 0.

        Args:
            optimizer: None where an engine makes it later.
            scheduler, whole, evaluated, keep, engine: as `Run.steps` has them.
        """
        context = self.context
        self.module, self._engine, self._evaluated = unwrap(model), engine, evaluated
        self._whole = whole or (lambda: unwrap(model))
        self._sharded = any(is_sharded(parameter) for parameter in model.parameters())
        # All ranks have drawn the same weights; dropout and the like differ between those with different samples.
        seed_generators(context.config.seed * 1_000_003 + self._dims.random_stream)
        own: dict[str, Stateful] = {}
        if context.scaler and context.scaler.is_enabled():
            own["scaler"] = context.scaler
        if self._source.stream:
            own["stream"] = self._source.stream
        self._state = TrainingState(
            self.module,
            optimizer,
            own | scheduler_states(scheduler) | dict(keep or {}),
            rank=context.rank,
            device=context.device,
            owns_buffers=self._dims.owns_buffers,
            engine=engine,
            whole=None if evaluated else whole,  # which is the state's own model
        )
        if context.saves:
            self._heartbeat.enter("resuming")
            self._resume(model)
        go_to_step(scheduler, context.step)

    def _resume(self, model: nn.Module) -> None:
        context = self.context
        facts = self.checkpoints.find(
            self._state,
            context.total_steps,
            whole=self._whole,
            weights=not self.backbone_only,
            before=lambda: self.restore_bucket_order(model),
        )
        if facts:
            context.step, context.train_loss = self.checkpoints.started_at, facts["train_loss"]
            if self.checkpoints.is_out_of_patience:
                context.total_steps = context.step

    def restore_bucket_order(self, model: nn.Module) -> None:
        """Give DDP back the order in which it had come to send gradients, in a run that is resumed after a step."""
        dims, config = self._dims, self.context.config
        if dims.shards > 2 - self._state.by_place:  # the sum of two numbers is the same in any order
            example = self._source.example(math.ceil(config.global_batch_size / dims.shards / config.accumulate))
            with autocast(config.precision, self.context.device):
                restore_bucket_order(model, example.inputs, self.context.device)

    def begin(self, optimizer: Optimizer, model: nn.Module) -> None:
        """Start to listen, to log and to keep time, when the state to start from is in place; `model` may be wrapped.

        Raises:
            NothingLeft: it is that of the last step.
            UserError: the ranks do not have the same data.
        """
        context, source = self.context, self._source
        assert self.module is not None
        self._optimizer = optimizer
        check_consistency(source.facts() | {"steps to take": context.total_steps}, source.where, context.world)
        if self._listener:
            if context.saves:
                # Whose peer has died waits in here until its time is over, or until a signal ends it: as long as there
                # is nothing to save, the first one does.
                self.checkpoints.connect()
            self._agreement, self._listener.training = Agreement(context.world.control, self._listener), True
        complete = self._whole()
        self._parameters = count_parameters(complete)
        context.parameter_names = [name for name, _ in complete.named_parameters()]
        context.module, context.model, context.optimizer = self.module, model, optimizer
        context.gradients = self._local_gradients(optimizer)
        self.callbacks.on_train_begin(context)
        self._finite = FiniteCheck(context, self._stop)
        context.report.start(
            parameters=self._parameters,
            task=source.task,
            samples=(source.train_size, len(source.eval_set)),
            shards=self._dims.shards,
            steps=(context.steps_per_epoch, context.total_steps),
            chosen=self._chosen,
            first=context.step,
        )
        self.checkpoints.begin(context.config.eval_every * context.steps_per_epoch, context.total_steps)
        self._setup_seconds = time.perf_counter() - context.started
        if context.step >= context.total_steps:
            self._heartbeat.enter("evaluating", context.step)
            if self.evaluator.has_data:
                self.evaluation = self._evaluate()
            raise NothingLeft

    def _local_gradients(self, optimizer: Optimizer) -> LocalGradients:
        """What this rank holds of gradients and weights."""
        assert self.module is not None
        if self._engine:
            return self._engine.parts(self.module, optimizer)
        cut, among = self._dims.cuts_the_model, self.context.world.world_size // self._dims.stages
        return LocalGradients(self.module, optimizer, owns=not cut or self._dims.shard == 0, differ=cut, among=among)

    # Between two steps ------------------------------------------------------------------------------------------

    def before_step(self) -> bool:
        """Save where a checkpoint is due, and leave where a signal has come; whether there is a step to take.

        Raises:
            Preempted: a signal has come to any of the ranks, and the state is saved.
        """
        context = self.context
        sign, due = 0, False
        if self._agreement:
            sign, due = self._agreement.ask(context.step, self.checkpoints.is_due_by_the_clock())
        last = context.step == context.total_steps
        leaves = bool(sign) and not last
        if leaves and self._listener:
            self._listener.announce(sign)
        due = due or leaves or self.checkpoints.is_due(context.step, last)
        if due and context.step > self.checkpoints.saved_step and context.saves and self._finite.check_weights():
            self._save()
        if leaves:
            self._leave(sign)
        if not last:
            context.learning_rate = self._next_learning_rate()
            self.callbacks.on_step_begin(context)
            self.timer.start()
        return not last

    def fetched(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the wait for each is accounted for."""
        while True:
            self._heartbeat.enter(WAITING, self.context.step + 1)
            self.callbacks.on_fetch_begin(self.context)
            batch = next(batches, None)
            self.callbacks.on_fetch_end(self.context)
            if batch is None:
                return
            self._heartbeat.enter(TRAINING)
            yield batch

    def after_step(self) -> bool:
        """Count and log a step that was taken; whether an evaluation is due, before the next `before_step`.

        Raises:
            UserError: the model is in evaluation mode.
            CheckFailed: a callback has found something wrong.
        """
        context = self.context
        if isinstance(self._optimizer, JointOptimizer):
            self._optimizer.end_step()
        if not self.callbacks.distorts_time:
            self.timer.stop()
        context.step += 1
        if self.module and not self.module.training:
            raise UserError(
                f"{context.recipe}: step {context.step} left the model in evaluation mode, which trains without dropout "
                "and with BatchNorm's old statistics; call model.train() after your own model.eval()"
            )
        context.updated = context.scaler is None or not context.scaler.left_out
        if not context.updated:
            scale = context.loss_scaling["loss_scale"]
            context.say(f"step {context.step} left out: gradients are not finite; the loss scale is now {scale:g}")
        try:
            self.callbacks.on_step_end(context)
        except CheckFailed:
            self._stop()
            raise
        self._finite.check_loss()
        if context.is_logged(context.step):
            self.callbacks.on_log(context, LogRecord())
        self._stepped_at = time.perf_counter()
        every = context.config.eval_every * context.steps_per_epoch
        due = context.step == context.total_steps or (every > 0 and context.step % every == 0)
        if evaluates := due and self.evaluator.has_data:
            self.callbacks.on_evaluation_begin(context)
            self._heartbeat.enter("evaluating")
        return evaluates

    def evaluate(self) -> None:
        """Evaluate the model, and judge by the result. Training mode is on again afterwards."""
        self.context.model.eval()
        evaluation = self._evaluate()
        self.context.model.train()  # BatchNorm and dropout were off: on again before the next batch
        self.evaluated(evaluation)

    def evaluated(self, evaluation: Evaluation) -> None:
        """Log an evaluation, and judge by it; `evaluate` does, or a trainer that evaluates by itself."""
        context = self.context
        self.evaluation = evaluation
        self.callbacks.on_evaluation_end(context, evaluation)
        self.checkpoints.judge(evaluation, eligible=self._finite.check_weights())
        if self.checkpoints.is_out_of_patience and context.step < context.total_steps:
            waited = self.checkpoints.waited
            context.say(f"stopping early: {self.checkpoints.metric} has not become better in {waited} evaluations")
            context.total_steps = context.step
        context.pause(time.perf_counter() - self._stepped_at)

    def _evaluate(self) -> Evaluation:
        return self.evaluator.evaluate(self._evaluated or self._whole(), sharded=self._sharded)

    def _save(self) -> None:
        """Have the checkpoint of this step written; the clock by which speed is measured stands still meanwhile."""
        context, began = self.context, time.perf_counter()
        self._heartbeat.enter("saving", context.step)
        self.callbacks.on_save(context)
        self.checkpoints.save(
            self._state,
            context.step,
            epoch=context.step // context.steps_per_epoch,
            lr=self._next_learning_rate(),
            train_loss=context.train_loss,
            metrics=asdict(self.evaluation) if self.evaluation else None,
        )
        context.pause(time.perf_counter() - began)

    def _next_learning_rate(self) -> float:
        """The first parameter group's."""
        return float(self._optimizer.param_groups[0]["lr"])

    # The end ----------------------------------------------------------------------------------------------------

    def _stop(self) -> None:
        """Bring to an end what is under way, before all ranks leave."""
        self.checkpoints.wait()
        self.callbacks.on_exit(self.context)

    def _leave(self, sign: int) -> None:
        """Write down how far it came, and go.

        Raises:
            Preempted: always.
        """
        self._stop()
        context, name = self.context, signal.Signals(sign).name
        if not context.quiet:
            step = self.checkpoints.newest_step
            saved = f"saved at step {step}" if step else "nothing is saved"
            context.say(f"preempted by {name} after step {context.step} of {context.total_steps}: {saved}")
            if context.rank == 0:
                self._write_result("preempted", [0.0])
        raise Preempted(name)

    def finish(self) -> None:
        """Export the weights and write result.json, when the last step has been taken; a tool has nothing to finish.

        Raises:
            UserError: there are steps left.
        """
        context, device = self.context, self.context.device
        if self.module is None:
            return
        if context.step < context.total_steps:
            raise UserError(
                f"{context.recipe} left run.steps after step {context.step} of {context.total_steps}; "
                "run the loop to its end, or set max_steps"
            )
        self._finite.check_weights()
        self._heartbeat.enter("finishing")
        self.checkpoints.wait()
        whole = self._whole()
        show(self._source.task, whole, context)
        weights = full_state_dict(whole, device, keep=context.rank == 0)
        memory = gather_numbers(peak_memory_bytes(device), device)
        state, total = gathered_state_bytes(self._optimizer, self._dims, device)
        context.notes = {"state_bytes_by_rank": state, "state_bytes_unsharded": total} | context.notes
        self.callbacks.on_train_end(context, self.evaluation)
        self.callbacks.on_exit(context)
        if context.world.store:
            await_everyone(context.world.store, ascii(f"finished {context.out}"), context.world.world_size)
        if context.rank == 0:
            export(weights, context.out / "model.pt")
            self.checkpoints.export_best(self._state, weights)
            context.report.finish(self._write_result("finished", memory))

    def _write_result(self, status: str, memory: list[float]) -> dict[str, object]:
        result = result_fields(
            self.context,
            status,
            evaluation=self.evaluation,
            step_seconds=self.timer.seconds(),
            memory=memory,
            parameters=self._parameters,
            setup_seconds=self._setup_seconds,
            unit=option(self._source.task, "unit"),
        )
        result |= self.checkpoints.result() | self.context.loss_scaling | self.context.notes
        write_json(self.context.out / "result.json", result)
        return result
