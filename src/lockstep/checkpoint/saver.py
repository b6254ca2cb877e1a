"""Saving beside training: one save under way at a time, and a disk that refuses costs no run.

torch.distributed.checkpoint.async_save would save in a thread, too, but with the same right to the cores as training.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint import save as dcp_save
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.utils.serialization import config

from lockstep.checkpoint.dcp import Writer
from lockstep.checkpoint.directory import UNFINISHED, FileContents, folder_name
from lockstep.distributed.dtensor import local_shard


class CheckpointSaver:
    """Writes the checkpoints of one run; every rank has one, and all call each method together.

    Args:
        folder: the run's checkpoints/, on a file system that all ranks share.
        group: a gloo group of all ranks that nothing else uses: a background thread communicates in it.
        asynchronous: whether training continues while a copy of the state is written.
        keep: how many of the newest are kept, besides the best.
        warn: called with a line about a save that failed.
        moved: called for each tensor that is written, in the thread that writes.

    Attributes:
        stall_seconds: for how long training has waited for checkpoints.
        failed: saves that failed.
        saved_step: the step of the newest one that is on disk, 0 where none is.
        save_seconds: from the start of the last save until it was on disk.
    """

    def __init__(
        self,
        folder: Path,
        group: dist.ProcessGroup | None = None,
        *,
        asynchronous: bool,
        keep: int,
        warn: Callable[[str], None],
        moved: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.group, self.asynchronous, self.keep, self.warn = folder, group, asynchronous, keep, warn
        self.stall_seconds, self.failed, self.saved_step, self.save_seconds = 0.0, 0, 0, 0.0
        self._copy, self._moved = HostCopy(), moved
        self._thread: ThreadPoolExecutor | None = None
        self._in_flight: tuple[Future[None], int] | None = None

    def save(
        self,
        tensors: dict[str, Tensor],
        facts: dict[str, Any],
        *,
        files: Callable[[], FileContents] = dict,
        best: bool = False,
    ) -> None:
        """Save what this rank holds of the state; the tensors may change when this returns.

        At most one save is under way: a second one waits for the first, so one copy of the state is all the memory
        that checkpoints take.

        Args:
            tensors: {name: tensor}; of a tensor that several ranks hold, one rank's is written.
            facts: what goes into the manifest, JSON: `step` at least.
            files: makes this rank's further files.
            best: also the best one so far.
        """
        self.wait()
        self._began = started = time.perf_counter()
        step = facts["step"]
        if not (self.folder / folder_name(step)).exists():  # a good one is never overwritten
            held = self._copy.of(tensors) if self.asynchronous else tensors
            writer = Writer(self._temporary(step), held, files(), facts, self.keep, best, self._moved)
            if self.asynchronous:
                self._thread = self._thread or ThreadPoolExecutor(1, "checkpoint", initializer=lower_priority)
                self._in_flight = self._thread.submit(self._write, writer), step
            else:
                self._in_flight = Future(), step
                try:
                    self._write(writer)
                    self._in_flight[0].set_result(None)
                except CheckpointException as error:
                    self._in_flight[0].set_exception(error)
        self.stall_seconds += time.perf_counter() - started
        if not self.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Wait until the save that is under way, if any, is on disk.

        A disk that refuses costs a checkpoint and a warning, not the run: the checkpoint before is still there.

        Raises:
            CheckpointException: a rank failed of something else than the disk.
        """
        if self._in_flight is None:
            return
        (future, step), self._in_flight = self._in_flight, None
        started = time.perf_counter()
        error = future.exception()
        if error is None:
            self.saved_step = step
        else:
            said = disk_failure(error)
            if not said:
                raise error
            self.failed += 1
            if dist.get_rank() == 0:
                shutil.rmtree(self._temporary(step), ignore_errors=True)
            self.warn(f"checkpoint of step {step} not saved ({said}); training continues, the one before is kept")
        self.stall_seconds += time.perf_counter() - started

    def _temporary(self, step: int) -> Path:
        return self.folder / f"{UNFINISHED}{folder_name(step)}"

    def _write(self, writer: Writer) -> None:
        # The files' SHA-256 says all that torch's CRC of each tensor could; this thread alone leaves it out.
        with cast(Any, config).patch({"save.compute_crc32": False}):
            dcp_save(dict(writer.tensors), storage_writer=writer, process_group=self.group)
        self.save_seconds = time.perf_counter() - self._began


def lower_priority() -> None:
    """Put this thread behind those that train: where all cores are busy, it takes a third of what they take."""
    mine = threading.get_native_id()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, mine, min(19, os.getpriority(os.PRIO_PROCESS, mine) + 5))


class HostCopy:
    """The state in host memory, always in the same buffers, pinned where a GPU is the source."""

    def __init__(self) -> None:
        self._layout: list[Any] = []
        self._held: dict[str, Tensor] = {}

    def of(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A copy of the tensors, valid until the next call."""
        gpus = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
        cuda = bool(gpus)
        layout = [(name, t.shape, t.stride(), t.dtype, t.device) for name, t in tensors.items()]
        if layout != self._layout:  # the first copy, or the optimizer has come to hold more
            self._held = {}
            stager = DefaultStager(  # a new one, for up to torch 2.11 it closes itself when it has staged
                StagingOptions(cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda)
            )
            self._held, self._layout = cast(dict[str, Tensor], stager.stage(tensors)), layout
        else:  # one call instead of a walk over all objects, which takes as long as the copy
            with torch.no_grad():
                mine = [local_shard(tensor) for tensor in self._held.values()]
                torch._foreach_copy_(mine, [local_shard(tensor) for tensor in tensors.values()], non_blocking=cuda)
        for device in gpus:  # each copy is in its own device's stream, and torch's stager waits for one device alone
            torch.cuda.current_stream(device).synchronize()
        return self._held


def disk_failure(error: BaseException) -> str:
    """What the disk said, where a save failed of nothing else; empty: it was not the disk."""
    if not isinstance(error, CheckpointException):
        return ""
    causes = [wrapped[0] for wrapped in error.failures.values()]
    return str(causes[0]) if all(isinstance(cause, OSError) for cause in causes) else ""
