"""The checkpoints of one run: one save under way at a time, beside training; a disk that refuses costs no run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lockstep.checkpoint.dcp import Saver, disk_failure
from lockstep.checkpoint.layout import UNFINISHED, Files, folder_name


class CheckpointDirectory:
    """The checkpoints of one run; every rank has one, and all call each method together.

    Args:
        folder: the run's checkpoints/, on a file system that all ranks share.
        saver: what writes the tensors.
        keep: how many of the newest are kept, besides the best.
        warn: called with a line about a save that failed.

    Attributes:
        stall_seconds: for how long training has waited for checkpoints.
        failed: saves that failed.
        saved_step: the step of the newest one that is on disk, 0 where none is.
    """

    def __init__(self, folder: Path, saver: Saver, *, keep: int, warn: Callable[[str], None]) -> None:
        self.folder, self.saver, self.keep, self.warn = folder, saver, keep, warn
        self.stall_seconds, self.failed, self.saved_step = 0.0, 0, 0
        self._flight: tuple[Future[Any], int] | None = None

    def save(
        self,
        tensors: dict[str, Tensor],
        facts: dict[str, Any],
        *,
        files: Callable[[], Files] = dict,
        best: bool = False,
    ) -> None:
        """Save what this rank holds of the state; the ranks' parts make up the whole.

        At most one save is under way: a second one waits for the first, so one copy of the state is all the memory
        that checkpoints take.

        Args:
            tensors: {name: tensor}; of a tensor that several ranks hold, one rank's is written.
            facts: what goes into the manifest, JSON: `step` at least.
            files: makes this rank's further files.
            best: also the best one so far.
        """
        self.wait()
        started = time.perf_counter()
        step = facts["step"]
        if not (self.folder / folder_name(step)).exists():  # a good one is never overwritten
            self._flight = self.saver.start(tensors, files(), self._temporary(step), facts, self.keep, best), step
        self.stall_seconds += time.perf_counter() - started
        if not self.saver.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Wait until the save that is under way, if any, is on disk.

        A disk that refuses costs a checkpoint and a warning, not the run: the checkpoint before is still there.

        Raises:
            CheckpointException: a rank failed of something else than the disk.
        """
        if self._flight is None:
            return
        (flight, step), self._flight = self._flight, None
        started = time.perf_counter()
        error = flight.exception()
        if error is None:
            self.saved_step = step
        else:
            said = disk_failure(error)
            if not said:
                raise error
            self.failed += 1
            if dist.get_rank() == 0:
                shutil.rmtree(self._temporary(step), ignore_errors=True)
            self.warn(f"checkpoint of step {step} not saved ({said}); training goes on, the one before is kept")
        self.stall_seconds += time.perf_counter() - started

    def _temporary(self, step: int) -> Path:
        return self.folder / f"{UNFINISHED}{folder_name(step)}"
