"""Loss, speed and memory of logged steps, with what other callbacks add, to the loggers and the progress display."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.callbacks.base import Callback, CallbackContext, LogRecord
from lockstep.errors import UserError
from lockstep.loggers.base import Logger, Misclassified
from lockstep.loggers.build import build_loggers
from lockstep.memory.usage import peak_memory_bytes
from lockstep.training.evaluate import Evaluation


class MetricsLogger(Callback):
    """The last callback of a run. Loggers are opened on rank 0 alone.

    What has to be summed over the ranks is on its way while the next step is taken, and written down after it.

    Args:
        eval_images: gives images of the evaluation set by their numbers: uint8 [N, 3, H, W].
    """

    def __init__(self, eval_images: Callable[[Sequence[int]], Tensor]) -> None:
        self._eval_images = eval_images
        self._loggers: list[Logger] = []
        self._loss: Tensor | None = None
        self._pending: Callable[[], None] | None = None  # writes down the logged step that is under way

    def on_train_begin(self, context: CallbackContext) -> None:
        if context.rank == 0:
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
        self._loss = None

    def on_loss(self, context: CallbackContext, loss: Tensor, weight: float) -> None:
        """Keep it detached, because a kept loss keeps its graph; reading it would wait for the GPU."""
        part = loss.detach() if weight == 1 else loss.detach() * weight
        self._loss = part if self._loss is None else self._loss + part

    def on_step_end(self, context: CallbackContext) -> None:
        self._write_pending()
        if not context.updated and not context.is_logged(context.step):
            self._write(context, context.step, context.loss_scaling)

    def on_log(self, context: CallbackContext, record: LogRecord) -> None:
        now = self._clock(context)
        images = (context.step - self._logged_step) * context.config.global_batch_size
        speed = images / (now - self._logged_at)
        self._logged_step, self._logged_at = context.step, now
        scalars = {"loss": 0.0, "lr": context.learning_rate, "images_per_second": round(speed, 1)}
        scalars |= {"peak_memory_bytes": 0} | context.loss_scaling | record.scalars
        read = self._reduce_loss_and_memory(context)

        def write(step: int) -> None:
            context.train_loss, peak = read()
            scalars.update(loss=context.train_loss, peak_memory_bytes=peak)
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
        scalars = {"eval_loss": evaluation.loss, "eval_accuracy": evaluation.accuracy, "eval_f1": evaluation.f1}
        self._write(context, context.step, scalars)
        context.report.evaluation(context.step, evaluation)

    def on_train_end(self, context: CallbackContext, evaluation: Evaluation | None) -> None:
        """Give the loggers a few images that the trained model gets wrong; result.json says which they are."""
        wrong = evaluation.wrong[: context.config.logger.images] if evaluation else ()
        names = ("sample", "label", "predicted")
        context.note("", misclassified=[dict(zip(names, each, strict=True)) for each in wrong])
        if wrong and self._loggers and not context.quiet:
            images = self._eval_images([sample for sample, _, _ in wrong])
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

    def _reduce_loss_and_memory(self, context: CallbackContext) -> Callable[[], tuple[float, int]]:
        """Begin one all-reduce; its end: (the loss over the global batch, the largest peak of a rank's memory so far).

        The loss is the mean over the ranks that have one, whose shares are equal; of a pipeline only the last stage has
        one. Of the memory each rank writes its own number, and zeros for the others.

        Raises:
            UserError: no rank called run.record(loss=...) in this step.
        """
        total = torch.zeros(2 + context.world.world_size, dtype=torch.float64, device=context.device)
        if self._loss is not None:
            total[0], total[1] = self._loss.double().to(context.device), 1
        total[2 + context.rank] = peak_memory_bytes(context.device)
        work = dist.all_reduce(total, async_op=True)

        def read() -> tuple[float, int]:
            work.wait()
            loss, count, *memory = total.tolist()
            if not count:
                raise UserError(f"{context.recipe}: no loss to log; call run.record(loss=loss) in every step")
            return loss / count, int(max(memory))

        return read
