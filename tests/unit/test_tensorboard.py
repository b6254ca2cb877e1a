"""TensorBoard's curves of a run that was started several times, as TensorBoard itself reads them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch.utils import tensorboard  # noqa: F401  once here, not once in every process

from lockstep.config.schema import Config
from lockstep.loggers.tensorboard import TensorBoardLogger, read_before

Start = tuple[
    int, range, str, float
]  # the step it starts at, the steps it logs, on which host, whose clock is so far off


def started(out: Path, number: int, start: Start) -> None:
    """In a process that is killed; the loss of a step is 100 × the number of the start + the step."""
    step, logged, host, ahead = start

    def child() -> None:
        clock = time.time
        time.time, socket.gethostname = lambda: clock() + ahead, lambda: host
        logger = TensorBoardLogger(out, step, Config())
        for each in logged:
            logger.log({"step": each, "loss": float(100 * number + each)})
        logger.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def curve(out: Path) -> list[float]:
    found = EventAccumulator(str(out / "tensorboard"))
    found.Reload()
    assert [event.step for event in found.Scalars("loss")] == list(range(1, 1 + len(found.Scalars("loss"))))
    return [event.value for event in found.Scalars("loss")]


@pytest.mark.parametrize("ahead", [0, 100, -100])
def test_a_curve_survives_starts_that_die_before_they_log(ahead: float, tmp_path: Path) -> None:
    """Also where the clock of the earlier starts' node is ahead of, or behind, that of the later ones'."""
    first = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    started(tmp_path, 0, (0, range(1, 9), "zeta", ahead))
    assert curve(tmp_path) == first
    started(tmp_path, 1, (8, range(0), "zeta", ahead))  # resumes at the last step
    assert curve(tmp_path) == first
    started(tmp_path, 2, (4, range(0), "alpha", 0))  # at an earlier one
    assert curve(tmp_path) == first[:4]
    started(tmp_path, 3, (4, range(5, 7), "alpha", 0))
    assert curve(tmp_path) == [*first[:4], 305, 306]
    started(tmp_path, 4, (6, range(7, 9), "zeta", ahead))
    started(tmp_path, 5, (7, range(8, 10), "alpha", 0))
    assert curve(tmp_path) == [*first[:4], 305, 306, 407, 508, 509]


def test_files_keep_their_order_and_their_names_where_they_can(tmp_path: Path) -> None:
    names = [f"events.out.tfevents.{second}.b.{pid}.0" for second, pid in ((1000000001, 10), (1000000005, 9))]
    for name in names:
        (tmp_path / name).write_text(name)
    read_before(tmp_path, 1000000006.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    read_before(tmp_path, 1000000005.5)
    there = sorted(tmp_path.iterdir())
    assert [path.name for path in there] == [
        f"events.out.tfevents.000000000{n}.b.{pid}.0" for n, pid in ((1, 10), (2, 9))
    ]
    assert [path.read_text() for path in there] == names
