"""A run's checkpoints as the run needs them: found again when it starts, saved when due, the best one kept."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lockstep.checkpoint import directory
from lockstep.checkpoint.directory import FoundCheckpoint
from lockstep.checkpoint.state import TrainingState
from lockstep.checkpoint.weights import is_foreign, load_weights
from lockstep.config.keys import AUTO
from lockstep.config.run_directory import CHECKPOINTS, checkpoint_folder
from lockstep.config.schema import NO_SOURCE, Config, to_yaml
from lockstep.config.tasks import is_larger_better, metric_of
from lockstep.distributed.process_group import World, new_gloo_group
from lockstep.errors import UserError
from lockstep.training.evaluate import Evaluation
from lockstep.utils.files import save_atomically
from lockstep.utils.text import short

if TYPE_CHECKING:
    from lockstep.checkpoint.saver import CheckpointSaver

LARGEST_SHARE = 0.05  # of the time, in which a checkpoint is under way, where nobody has said how often


class CheckpointManager:
    """Keeps what a run resumes from.

    Attributes:
        resumed_from: the checkpoint, or whatever else, that this start resumed from; None: nothing.
        started_at: the step of that checkpoint.
        saved_step: steps done when the last checkpoint was taken.
        waited: evaluations since the best one.
        metric: what is best, as it is logged.
    """

    def __init__(self, recipe: str, config: Config, world: World, out: Path, say: Callable[[str], None]) -> None:
        self.metric, self._higher_is_better = metric_of(config), is_larger_better(config)
        self._recipe, self._config, self._world, self._say = recipe, config, world, say
        self._folder = out / CHECKPOINTS
        self._checkpoints: CheckpointSaver | None = None
        self._group: dist.ProcessGroup | None = None
        self.resumed_from: str | None = None
        self.started_at = self.saved_step = self.waited = 0
        self._saved_at, self._first, self._last = time.perf_counter(), 0, 0
        self.best: float | None = None  # of `metric`, so far; larger is better
        self._best_step: int | None = None  # of the checkpoint that has it, where one was saved
        self._best_is_new = False  # and a checkpoint is to keep it

    # At the start

    def find(
        self,
        state: TrainingState,
        last: int,
        *,
        whole: Callable[[], nn.Module],
        weights: bool,
        before: Callable[[], None],
    ) -> dict[str, Any]:
        """Take up what this run directory holds, else what resume=PATH names; what a checkpoint says, or nothing.

        Args:
            last: the run's last step.
            whole: gives the complete model.
            weights: whether resume=PATH is this run's to read, and not the recipe's.
            before: called before the state of a checkpoint after step 0 is restored.

        Raises:
            UserError: it does not fit this run.
        """
        found = self._newest(self._folder)
        if self._world.rank == 0 and self._folder.is_dir():
            directory.repair(self._folder, found)
        dist.barrier(self._world.control)
        source = self._config.resume
        if found.path is None and weights and source not in NO_SOURCE:
            path = Path(source).expanduser()
            if path.is_file() or is_foreign(path):
                self._load(path, state, whole)
                return {}
            folder, name = checkpoint_folder(path)
            found = self._newest(folder, only=name)
            if found.path is None:
                raise UserError(f"resume={source}: holds no intact checkpoint; name another one")
        if found.path is None:
            return {}
        self._restore(found.path, found.facts, state, last, before)
        return found.facts

    def _newest(self, folder: Path, only: str = "") -> FoundCheckpoint:
        found = directory.find_newest(folder, self._world.control, only=only)
        for line in found.skipped:
            self._say(f"skipped {line}")
        return found

    def _load(self, path: Path, state: TrainingState, whole: Callable[[], nn.Module]) -> None:
        """Start from plain weights."""
        mine = (whole() if state.engine else state.module).state_dict()
        weights, fit = load_weights(path, mine, self._config.resume_prefix)
        state.load(weights)
        self.resumed_from = self._config.resume
        self._say(f"starting from the weights in {self._config.resume}{fit.said()}")

    def _restore(
        self, path: Path, facts: dict[str, Any], state: TrainingState, last: int, before: Callable[[], None]
    ) -> None:
        batch_size = self._config.global_batch_size
        step, rest = divmod(facts["samples_seen"], batch_size)
        if rest:
            raise UserError(
                f"global_batch_size={batch_size}: {path.name} was saved after {facts['samples_seen']} samples, which is no "
                f"whole number of such batches; set global_batch_size={facts['samples_seen'] // facts['step']}"
            )
        if facts["step"]:
            before()
        state.restore(path, facts, self._world.control)
        if step > last:
            raise UserError(f"max_steps={last}: {short(path)} is at step {step}; allowed is more")
        self.waited, self.best, self._best_step = facts["waited"], facts["best"], facts["best_step"]
        self.started_at = self.saved_step = step
        self.resumed_from = os.path.relpath(path, self._folder.parent)
        end = step if self.is_out_of_patience else last
        self._say(f"resuming from {short(path)}, at step {step} of {end}")

    # Between two steps

    def connect(self) -> None:
        """Make the group in which the ranks save."""
        self._group = new_gloo_group(self._config.timeout_seconds)

    def begin(self, evaluation: int, last: int) -> None:
        """Start the clock by which checkpoints are due.

        Args:
            evaluation: the step after which the run is evaluated first, 0: after the last.
            last: the run's last step.
        """
        self._saved_at, self._last = time.perf_counter(), last
        self._first = evaluation - 1 if 0 < evaluation < last else last

    def is_due(self, step: int, last: bool) -> bool:
        """Whether the state after a step is to be saved because of its number, or because it is the best.

        By the clock, the first one comes before the first evaluation, however soon, and a run that has saved keeps its
        end, from which it can be extended: what is over in one evaluation is not worth the second that saving takes.
        """
        config = self._config.checkpoint
        if config.every is not None:
            due = last or step % config.every == 0
        else:
            due = bool(config.minutes) and (
                self.saved_step > 0 if last else self.saved_step == 0 and step >= self._first
            )
        return self._best_is_new or due

    def is_due_by_the_clock(self) -> bool:
        """Whether it is by now; rank 0's clock decides, and the others learn it with the agreement."""
        config = self._config.checkpoint
        if self._world.rank or config.every is not None or not config.minutes:
            return False
        seconds = 60.0 if config.minutes == AUTO else 60 * config.minutes
        if config.minutes == AUTO and self._checkpoints:
            seconds = max(seconds, self._checkpoints.save_seconds / LARGEST_SHARE)
        return time.perf_counter() - self._saved_at > seconds

    def save(self, state: TrainingState, step: int, **facts: Any) -> None:
        """Have the checkpoint of a step written."""
        if self._checkpoints is None:
            from lockstep.checkpoint.saver import CheckpointSaver  # a second to import, which not every run needs

            self._text = to_yaml(self._config)
            if self._world.rank == 0:
                self._folder.mkdir(exist_ok=True)
            config = self._config.checkpoint
            if self._group is None:
                self.connect()
            self._checkpoints = CheckpointSaver(
                self._folder,
                self._group,
                asynchronous=config.asynchronous,
                keep=config.keep,
                warn=self._say,
                moved=self._world.heartbeat.move,
            )
        if self._best_is_new:
            self._best_step = step
        facts |= {
            "recipe": self._recipe,
            "step": step,
            "last_step": self._last,
            "samples_seen": step * self._config.global_batch_size,
            "global_batch_size": self._config.global_batch_size,
            "world_size": self._world.world_size,
            "best": self.best,
            "best_step": self._best_step,
            "waited": self.waited,
            "config": self._text,
        }
        best, self._best_is_new = self._best_is_new, False
        tensors = state.tensors() | (state.exported() if best else {})
        self._checkpoints.save(tensors, facts | state.facts(), files=state.files, best=best)
        self._saved_at, self.saved_step = time.perf_counter(), step

    def judge(self, result: Evaluation, eligible: bool = True) -> None:
        """Keep count of what is best. All ranks hold the same evaluation to the last bit, so they judge alike.

        Args:
            eligible: whether it may be the best at all.

        Raises:
            UserError: the task has no such metric.
        """
        known = result.scalars
        if self.metric not in known:
            raise UserError(f"metric={self.metric}: the task has no such metric; allowed are {', '.join(known)}")
        value = known[self.metric] if self._higher_is_better else -known[self.metric]
        if eligible and value == value and (self.best is None or value > self.best):  # no NaN is best
            self.best, self._best_is_new, self.waited = value, self._config.checkpoint.best, 0
        else:
            self.waited += 1

    @property
    def is_out_of_patience(self) -> bool:
        return self._config.patience is not None and self.waited >= self._config.patience

    # At the end

    def wait(self) -> None:
        """Wait until what is being written has been."""
        if self._checkpoints:
            self._checkpoints.wait()

    @property
    def newest_step(self) -> int:
        """The step that a run that is cut off now would resume from."""
        return (self._checkpoints and self._checkpoints.saved_step) or self.started_at

    def result(self) -> dict[str, Any]:
        """What result.json says of checkpoints."""
        there = self._checkpoints
        best = {} if self.best is None else {f"best_{self.metric}": self.best if self._higher_is_better else -self.best}
        return best | {
            "resumed_from": self.resumed_from,
            "checkpoint_stall_seconds": there.stall_seconds if there else 0.0,
            "checkpoints_failed": there.failed if there else 0,
        }

    def export_best(self, state: TrainingState, last: Mapping[str, Tensor]) -> None:
        """Write best.pt, from the checkpoint that BEST names, on rank 0; the last weights say what it consists of."""
        best = directory.read_pointer(self._folder, "BEST")
        if best is None:
            return
        problem = directory.find_damage(best)
        if problem:
            self._say(f"best.pt not written: {best.name}: {problem}")
            return
        if best.name != directory.folder_name(self._best_step or 0):
            self._say(f"best.pt is {best.name}'s: step {self._best_step} was better and could not be saved")
        if state.engine:
            weights = state.engine.weights(best / state.engine.name)
        else:
            from lockstep.checkpoint import dcp

            weights = {name: torch.empty_like(tensor) for name, tensor in last.items()}
            own = any(name.startswith("whole.") for name in dcp.tensor_metadata(best))
            prefix = "whole" if own else "model"  # TrainingState.exported
            dcp.load_tensors(best, {f"{prefix}.{name}": tensor for name, tensor in weights.items()}, alone=True)
        export(weights, self._folder.parent / "best.pt")


def export(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write a plain state_dict on the CPU, for `load_state_dict(torch.load(path, weights_only=True))` anywhere."""
    save_atomically(path, {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()})
