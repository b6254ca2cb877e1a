"""Loss, speed and memory of logged steps, with what other callbacks add, to the loggers and the progress display."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.callbacks.base import Callback, CallbackContext, LogRecord
from lockstep.callbacks.model_flops import rates, work_of_a_sample
from lockstep.distributed.collectives import gather_objects, read_later
from lockstep.errors import UserError
from lockstep.loggers.base import Logger, Misclassified
from lockstep.loggers.build import build_loggers
from lockstep.memory.usage import peak_memory_bytes
from lockstep.task import option
from lockstep.training.evaluate import Evaluation


class MetricsLogger(Callback):
    """The last callback of a run. Loggers are opened on rank 0 alone.

    What has to be summed over the ranks is on its way while the next step is taken, and written down after it.

    Args:
        task: what is trained; says what a sample is called, and may show some of them.
    """

    def __init__(self, task: Any) -> None:
        self._task, self._unit = task, option(task, "unit")
        self._sums: dict[str, Tensor] = {}  # of what the recipe records in a step, by name
        self._names: list[str] = []  # of what it records in every step
        self._loggers: list[Logger] = []
        self._work: dict[str, Any] = {}  # that a sample of tokens is, on rank 0
        self._pending: Callable[[], None] | None = None  # writes down the logged step that is under way

    def on_train_begin(self, context: CallbackContext) -> None:
        if context.rank == 0:
            self._work = work_of_a_sample(context.config, self._task, context.world)
            context.note("", **self._work)
            context.columns += [name for name, rate in rates(self._work, 1.0).items() if rate is not None]
            self._loggers = build_loggers(
                context.out,
                context.config,
                name=f"{context.recipe}/{context.out.name}",
                step=context.step,
                columns=context.columns,
                say=context.say,
            )
        self._logged_step, self._logged_at = context.step, self._clock(context)

    def on_step_begin(self, context: CallbackContext) -> None:
        self._sums = {}

    def on_loss(
        self, context: CallbackContext, loss: Tensor, weight: float | Tensor, scalars: dict[str, float | Tensor]
    ) -> None:
        """Keep it detached, because a kept loss keeps its graph; reading it would wait for the GPU."""
        for name, value in {"loss": loss, **scalars}.items():
            part = torch.as_tensor(value).detach()
            if part.dim():
                raise UserError(f"run.record({name}=…): is one number, and this is {list(part.shape)}; take its mean")
            part = part if isinstance(weight, float) and weight == 1 else part * weight
            self._sums[name] = self._sums[name] + part if name in self._sums else part

    def on_step_end(self, context: CallbackContext) -> None:
        self._write_pending()
        if not context.updated and not context.is_logged(context.step):
            self._write(context, context.step, context.loss_scaling)

    def on_log(self, context: CallbackContext, record: LogRecord) -> None:
        now = self._clock(context)
        samples = (context.step - self._logged_step) * context.config.global_batch_size
        speed = samples / (now - self._logged_at)
        self._logged_step, self._logged_at = context.step, now
        scalars = {"loss": 0.0, "lr": context.learning_rate, f"{self._unit}_per_second": round(speed, 1)}
        scalars |= {"peak_memory_bytes": 0} | context.loss_scaling | record.scalars
        scalars |= {name: rate for name, rate in rates(self._work, speed).items() if rate is not None}
        read = self._reduce_loss_and_memory(context)

        def write(step: int) -> None:
            found, peak = read()
            context.train_loss, context.train_loss_step = found["loss"], step
            scalars.update(found, peak_memory_bytes=peak)
            self._write(context, step, scalars)
            for logger in self._loggers if record.histograms else ():
                logger.log_histograms(step, record.histograms)
            context.report.step(step, context.train_loss, speed, record.usage)

        self._pending = partial(write, context.step)

    def on_save(self, context: CallbackContext) -> None:
        self._write_pending()
        for logger in self._loggers:
            logger.flush()

    def on_evaluation_begin(self, context: CallbackContext) -> None:
        self._write_pending()

    def on_evaluation_end(self, context: CallbackContext, evaluation: Evaluation) -> None:
        self._write(context, context.step, evaluation.scalars)
        context.report.evaluation(context.step, evaluation)

    def on_train_end(self, context: CallbackContext, evaluation: Evaluation | None) -> None:
        """Give the loggers a few pictures of what the trained model gets wrong; result.json says which samples."""
        wrong = evaluation.wrong[: context.config.logger.images] if evaluation else ()
        if not option(self._task, "mistakes"):
            return
        names = ("sample", "label", "predicted")
        context.note("", misclassified=[dict(zip(names, each, strict=True)) for each in wrong])
        pictures = option(self._task, "pictures")
        if wrong and self._loggers and not context.quiet and pictures:
            images = pictures([sample for sample, _, _ in wrong])
            shown = [Misclassified(*each, image) for each, image in zip(wrong, images, strict=True)]
            for logger in self._loggers:
                logger.log_misclassified(context.step, shown)

    def on_exit(self, context: CallbackContext) -> None:
        self._write_pending()
        for logger in self._loggers:
            logger.close()

    @staticmethod
    def _clock(context: CallbackContext) -> float:
        """Seconds that count for the speed."""
        return time.perf_counter() - context.paused_seconds

    def _write_pending(self) -> None:
        if self._pending:
            write, self._pending = self._pending, None
            write()

    def _write(self, context: CallbackContext, step: int, scalars: dict[str, float]) -> None:
        epoch, samples = step // context.steps_per_epoch, step * context.config.global_batch_size
        for logger in self._loggers:
            logger.log({"step": step, "epoch": epoch, "samples_seen": samples} | scalars)

    def _reduce_loss_and_memory(self, context: CallbackContext) -> Callable[[], tuple[dict[str, float], int]]:
        """Begin one all-reduce; its end: (what was recorded, over the global batch, the largest peak of a rank's memory
        so far).

        Each is the mean over the ranks that have one, whose shares are equal; of a pipeline only the last stage has
        one. Of the memory each rank writes its own number, and zeros for the others.

        Raises:
            UserError: no rank called run.record(loss=...) in this step, or with other names than before.
        """
        if not self._names:  # agreed on once: of a pipeline, only the last stage has recorded any
            everyone = gather_objects(list(self._sums), context.world.control)
            self._names = list(dict.fromkeys(name for each in everyone for name in each))
        if self._sums and list(self._sums) != self._names:
            raise UserError(
                f"{context.recipe}: run.record had {', '.join(self._sums)} at step {context.step}, and at first "
                f"{', '.join(self._names)}; record the same names in every step, on every rank"
            )
        size = len(self._names)
        total = torch.zeros(1 + size + context.world.world_size, dtype=torch.float64, device=context.device)
        if self._sums:
            total[0] = 1
            total[1 : 1 + size] = torch.stack([value.double().to(context.device) for value in self._sums.values()])
        total[1 + size + context.rank] = peak_memory_bytes(context.device)
        arrived = read_later(total, dist.all_reduce(total, async_op=True))

        def read() -> tuple[dict[str, float], int]:
            count, *numbers = arrived().tolist()
            if not count:
                raise UserError(f"{context.recipe}: no loss to log; call run.record(loss=loss) in every step")
            found = {name: number / count for name, number in zip(self._names, numbers, strict=False)}
            return found, int(max(numbers[size:]))

        return read
