"""MLPerf's log of a training, `logger=mllog`: the lines that its compliance checker and its result summariser read.

Format: https://github.com/mlcommons/logging, whose library writes the lines. Rules: MLPerf's training_rules.adoc, "API
logging". It is a callback and no logger, because what it writes are moments, and not curves.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from pathlib import Path
from typing import Any

from lockstep.callbacks.base import Callback, CallbackContext
from lockstep.config.own_files import open_own
from lockstep.config.schema import Config
from lockstep.config.tasks import metric_of
from lockstep.data.batches import BatchSource
from lockstep.loggers.base import keep_lines
from lockstep.training.evaluate import Evaluation

TOKEN = ":::MLLOG "


class MlperfLog(Callback):
    """`mllog.txt`, by rank 0 alone: what is trained, when each epoch and evaluation began and ended, what it reached.

    A run that is resumed has one log: the lines of steps that are taken again are dropped, and so is the end of the start
    that was cut off. Time goes on meanwhile, as it does for who waits for the result.

    Args:
        source: what is trained on; says how many samples there are.
    """

    def __init__(self, source: BatchSource) -> None:
        self._samples = {"train_samples": source.train_size, "eval_samples": len(source.eval_set)}

    def on_train_begin(self, context: CallbackContext) -> None:
        from mlperf_logging.mllog.mllog import MLLogger  # only who asks for it imports it

        path = context.out / "mllog.txt"
        keep_lines(path, lambda line: stays(line, context))
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._last: int | None = None
        self._ended = bool(lines) and entry_of(lines[-1])["key"] == "run_stop"
        self._context, self._stream = context, open_own(path, "a", encoding="utf-8")
        logger = logging.Logger("mllog", logging.INFO)  # of this file alone: logging.getLogger() would have it inherit
        logger.addHandler(RaisingHandler(self._stream))
        # Lines name the file of the code that wrote them: from the package on, and not this machine's folders.
        package = str(Path(__file__).parents[2])
        self._mllog: Any = MLLogger(logger, default_stack_offset=2, root_dir=re.escape(package))
        if not lines:
            self._introduce(context)

    def _introduce(self, context: CallbackContext) -> None:
        """What a log begins with, up to the first touch of the training data."""
        begun = int(1000 * (time.time() - (time.perf_counter() - context.started)))
        self._write("event", "cache_clear", False, time_ms=begun)  # it is not ours to clear the system's caches
        self._write("start", "init_start", time_ms=begun)
        for name, value in (facts(context.config) | self._samples | context.config.logger.mlperf).items():
            self._write("event", name, value)
        self._write("end", "init_stop")
        self._write("start", "run_start")

    def on_step_begin(self, context: CallbackContext) -> None:
        if context.step % context.steps_per_epoch == 0:
            number = context.step // context.steps_per_epoch + 1
            self._write("start", "epoch_start", step=context.step + 1, epoch_num=number)

    def on_step_end(self, context: CallbackContext) -> None:
        if context.step % context.steps_per_epoch == 0 or context.step == context.total_steps:
            self._write("end", "epoch_stop", epoch_num=math.ceil(self._epoch))

    def on_evaluation_begin(self, context: CallbackContext) -> None:
        self._write("start", "eval_start", epoch_num=self._epoch)

    def on_evaluation_end(self, context: CallbackContext, evaluation: Evaluation) -> None:
        """MLPerf's name for what a benchmark is judged by is eval_accuracy, whatever it is: here it is `metric`."""
        metric = metric_of(context.config)
        if metric in evaluation.scalars:
            self._write("event", "eval_accuracy", evaluation.scalars[metric], epoch_num=self._epoch, metric=metric)
        self._write("end", "eval_stop", epoch_num=self._epoch)

    def on_save(self, context: CallbackContext) -> None:
        self._stream.flush()

    def on_train_end(self, context: CallbackContext, evaluation: Evaluation | None) -> None:
        """The run was over with its last step or evaluation, and not with the weights that were gathered since."""
        self._end("success", self._last)

    def on_exit(self, context: CallbackContext) -> None:
        self._end("aborted")
        self._stream.close()

    @property
    def _epoch(self) -> float:
        """Epochs done; within one, with the part of it that is done."""
        done = self._context.step / self._context.steps_per_epoch
        return int(done) if done.is_integer() else round(done, 4)

    def _end(self, status: str, time_ms: int | None = None) -> None:
        if not self._ended:
            self._write("end", "run_stop", time_ms=time_ms, status=status, epoch_num=self._epoch)
        self._ended = True

    def _write(
        self,
        kind: str,
        key: str,
        value: Any = None,
        *,
        time_ms: int | None = None,
        step: int | None = None,
        **more: Any,
    ) -> None:
        """One line; `step` is the one that it belongs to: the last that was taken, where nothing is said."""
        step = self._context.step if step is None else step
        more |= {"step_num": step, "samples_count": step * self._context.config.global_batch_size}
        self._last = int(1000 * time.time()) if time_ms is None else time_ms
        getattr(self._mllog, kind)(key, value, metadata=more, time_ms=self._last)


class RaisingHandler(logging.StreamHandler[Any]):
    """A full disk is an error of the run, as it is for the other loggers, and not a traceback beside it."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise


def entry_of(line: str) -> dict[str, Any]:
    return dict(json.loads(line.removeprefix(TOKEN)))


def stays(line: str, context: CallbackContext) -> bool:
    """Whether a line of an earlier start is still true of a run that goes on from `context.step`."""
    entry = entry_of(line)
    if entry["key"] == "run_stop":
        return entry["metadata"]["status"] == "success" and context.step >= context.total_steps
    return bool(entry["metadata"]["step_num"] <= context.step)


def facts(config: Config) -> dict[str, Any]:
    """What a config says that MLPerf has a name for."""
    optim, name = config.optim, config.optim.name.rpartition(".")[2].lower()
    found = {
        "seed": config.seed,
        "global_batch_size": config.global_batch_size,
        "gradient_accumulation_steps": config.accumulate,
        "opt_name": name,
        "opt_base_learning_rate": optim.lr,
        "opt_weight_decay": optim.weight_decay,
        "opt_learning_rate_warmup_steps": optim.warmup_steps,
        "opt_learning_rate_decay_schedule": optim.schedule,
    }
    if name == "sgd":
        found["opt_momentum"] = optim.momentum
    if config.gradients.clip_norm:
        found["opt_gradient_clip_norm"] = config.gradients.clip_norm
    return found
