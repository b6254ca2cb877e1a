"""DataLoader workers that cannot hand over what they have read: their error becomes the run's, with what to do.

A worker sends a batch from a thread of its own, and gets its sample numbers from one of the rank's, by shared memory, a
descriptor and a socket in TMPDIR. Where one of these cannot be had, Python prints a traceback there and drops what it had
to send, and training would wait for ever. Here the error is sent in its place: as a text, which needs none of the three.
A worker that is stopped, or whose disk no longer answers, sends nothing at all: the wait for it has an end.

A DataLoader's own time-out is for what is in its queue. But a batch there holds no data, only where to fetch the shared
memory's descriptor from: the worker, over a socket, without a time-out. So what has waited too long kills the workers.
"""

from __future__ import annotations

import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkContext
from multiprocessing.queues import Queue
from typing import Any

import torch.distributed as dist
from torch.utils.data._utils import signal_handling

from lockstep.errors import UserError
from lockstep.utils.temporary import keep_sockets

# Words of an error, and what to do against it; the first that fits.
RESOURCES = {
    "Too many open files": "allow more open files (ulimit -n 65536)",
    "ancdata": "allow more open files (ulimit -n 65536)",
    "AF_UNIX path too long": "set TMPDIR to a shorter path, such as /tmp",
    "Bus error": "give /dev/shm more room (docker run --shm-size=8g)",
    "No space left on device": "give /dev/shm more room (docker run --shm-size=8g)",
    "shared memory": "give /dev/shm more room (docker run --shm-size=8g)",
    "Resource temporarily unavailable": "allow more processes (ulimit -u)",
}


TORCH_SAYS_SILENT = "DataLoader timed out after"  # torch's words
SPARE_PATIENCE = 1.0  # that a DataLoader has for its own time-out to come first


class WorkerFailed(UserError):
    """One rank's workers failed; the others' need not have."""


class WorkersSilent(WorkerFailed):
    """They sent nothing in time. The same command may go well when what they wait for is back: the exit code is 1."""

    exit_code = 1


@dataclass
class LostBatch:
    """Stands where a batch would that its worker could not send."""

    error: str


class ReportingQueue(Queue):
    """A queue whose reader learns that something could not be sent."""

    def _on_queue_feeder_error(self, error: BaseException, item: Any) -> None:
        """Python's hook for it; `item` is a DataLoader's (number of the batch, batch)."""
        if isinstance(item, tuple) and len(item) == 2 and not isinstance(item[1], LostBatch):
            self.put((item[0], LostBatch(f"{type(error).__name__}: {error}")))


class ReportingContext(ForkContext):
    """multiprocessing's fork, with such queues."""

    def Queue(self, maxsize: int = 0) -> Any:
        return ReportingQueue(maxsize, ctx=self.get_context())


def heard(loader: Iterable[Any], workers: int, timeout_seconds: float = 0) -> Iterator[Any]:
    """What a DataLoader yields; what ends its workers for want of a resource, or stops them, is a line.

    Args:
        timeout_seconds: that the loader has.

    Raises:
        WorkerFailed: a worker could not be started, could not send what it has read, or sent nothing in time.
    """
    patience = Patience(timeout_seconds)
    try:
        keep_sockets()
        batches = iter(loader)
        while True:
            with patience.while_waiting(batches):
                batch = next(batches, None)
            if batch is None:
                return
            if isinstance(batch, LostBatch):
                raise WorkerFailed(describe_shortage(batch.error, workers))
            yield batch
    except (RuntimeError, OSError, EOFError) as error:
        words = str(error)
        if patience.lost or words.startswith(TORCH_SAYS_SILENT):
            raise WorkersSilent(describe_silence(workers, timeout_seconds)) from None
        own = "DataLoader" in words or "ancdata" in words or isinstance(error, OSError)
        if own and any(text in words for text in RESOURCES) and "in DataLoader worker process" not in words:
            raise WorkerFailed(describe_shortage(words, workers)) from None
        raise
    finally:
        patience.end()


class Patience:
    """Kills workers that are waited for longer than `seconds`, and a little: whoever waits for them sees them gone.

    Attributes:
        lost: whether that has happened.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.lost = seconds, False
        self._waiting: tuple[float, Any] | None = None  # since when, for which iterator
        self._over = threading.Event()
        if seconds:
            threading.Thread(target=self._watch, daemon=True, name="patience").start()

    @contextmanager
    def while_waiting(self, batches: Iterator[Any]) -> Iterator[None]:
        self._waiting = time.monotonic(), batches
        yield
        self._waiting = None

    def end(self) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(SPARE_PATIENCE / 2):
            waiting = self._waiting
            if waiting and time.monotonic() - waiting[0] > self.seconds + SPARE_PATIENCE:
                self.lost = True
                kill_workers(waiting[1])
                return


def kill_workers(batches: Any) -> None:
    """Kill an iterator's workers, and have nobody but whoever waits for them notice."""
    if getattr(batches, "_worker_pids_set", False):
        # torch's handler of SIGCHLD would raise anywhere, while this is told.
        batches._worker_pids_set = False
        signal_handling._remove_worker_pids(id(batches))
    shown = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        """Not what a thread of multiprocessing says that has been talking to a worker."""
        if not (
            issubclass(kind, ConnectionError | EOFError) and threading.current_thread() is not threading.main_thread()
        ):
            shown(kind, error, trace)

    sys.excepthook = show
    for worker in getattr(batches, "_workers", []):
        worker.kill()


def describe_shortage(error: str, workers: int) -> str:
    """One line: what a worker has met, and what to do."""
    remedy = next((advice for words, advice in RESOURCES.items() if words in error), "see what it says")
    if "TMPDIR" in remedy:
        remedy += f" (it is {len(tempfile.gettempdir())} characters long)"
    reason = " ".join(error.split())[:200]
    return f"data.workers={workers}: a DataLoader worker failed ({reason}); {remedy}, or set data.workers=0"


def describe_silence(workers: int, timeout_seconds: float) -> str:
    """One line: which rank waited for its workers, and what to do."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return (
        f"rank {rank} ({socket.gethostname()}): its DataLoader workers (data.workers={workers}) have sent no batch for "
        f"timeout_seconds={timeout_seconds:g}: they are stopped, or what they read from does not answer; look there, "
        "raise timeout_seconds, or set data.workers=0"
    )
