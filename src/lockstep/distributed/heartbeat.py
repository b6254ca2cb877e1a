"""Where every rank is, readable from outside whatever becomes of it: a line of JSON in the host's memory.

    {"step": 8, "phase": "training", "at": 1795285031.284, "spent": {"waiting for data": 0.031, "training": 1.204},
     "taken": 7, "busy": 0.967, "rank": 1, "host": "node1", "pid": 4711, "born": 81}

`spent` holds the seconds of this start in each phase, `taken` its steps, and `busy` those seconds of the steps in which
the process computed, or waited for a core: a rank that waits for another rank does neither, so the slowest rank has the
largest value. It is summed up once per step, because asking the kernel takes as long as all the rest.

A rank rewrites its line at each change of phase, by one write: the kernel keeps it however the process ends. A rank that
is asked where it is adds `call` and `collectives`, and one that ends, `end`. Where the lines are, and how other hosts
see them: lockstep.distributed.host_memory. No torch in here.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lockstep.distributed.host_memory import LINE_BYTES, SUMMARY_SECONDS, Beat, Line, publish
from lockstep.utils import temporary
from lockstep.utils.system import stat_fields

TRAINING, WAITING = STEP_PHASES = "training", "waiting for data"
DATA_WAIT_SHARE = 0.05  # share of its steps from which a rank's wait for data is mentioned
FAILED = "failed"
Clocks = tuple[float, float, float]  # seconds: computed by this process, by its main thread, kept from a core
NO_TIME: Clocks = (0.0, 0.0, 0.0)


class Heartbeat:
    """This rank's line.

    Args:
        folder: the run's ranks/; None: nothing is written, as for a tool's ranks.

    Attributes:
        moves: changes of phase, and what `move` has counted within one.
    """

    def __init__(self, folder: Path | None = None, rank: int = 0) -> None:
        self.facts: Beat = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid()}
        self.facts["born"] = process_state(os.getpid())[1]  # a process number alone may be given to another one
        self._telling = threading.Lock()
        self._rest = json.dumps(self.facts)[1:]  # the end of the line: all that no change of phase changes
        self._spent: dict[str, float] = {}  # seconds passed
        self._seconds: dict[str, str] = {}  # the same, as it stands in the line
        self._taken, self._since, self.moves = 0, 0.0, 0
        self._used = self._used_before = NO_TIME  # in steps; by the last time that the clocks were read
        self._line: Line | None = None
        self._closed = threading.Event()
        self._schedule: int | None = None
        with contextlib.suppress(OSError):
            self._schedule = os.open("/proc/self/schedstat", os.O_RDONLY)  # the main thread's
        if folder is not None:
            with contextlib.suppress(OSError):  # no room costs the heartbeat, not the run
                self._line = Line(folder, rank)
        self.enter("starting", 0)
        if self._line is not None:
            publish(self._line.folder, self._line.ranks)  # in place of what an earlier attempt has left there
            threading.Thread(target=self._sum_up, args=(self._line,), daemon=True, name="heartbeats").start()
            temporary.do_at_the_end(self.close)

    def close(self) -> None:
        """Leave: from here on nothing is written."""
        line, self._line = self._line, None
        self._closed.set()
        if line is not None and os.getpid() == self.facts["pid"]:  # a copy of this process is no rank
            line.leave()

    def _sum_up(self, line: Line) -> None:
        """In a thread: write the summary of this host when it is due, unless another rank has."""
        while not self._closed.wait(SUMMARY_SECONDS):
            publish(line.folder, line.ranks, unless_within=SUMMARY_SECONDS)

    def enter(self, phase: str, step: int | None = None) -> None:
        """Begin a phase; `step`: the one that is being taken, else as before."""
        if step is not None:
            self.facts["step"] = step
        self.move()
        now, before = time.perf_counter(), self.facts.get("phase")
        if before is not None:
            self._spent[before] = spent = self._spent.get(before, 0.0) + now - self._since
            self._seconds[before] = f'"{before}": {spent:.3f}'
        if before == TRAINING:
            self._taken += 1
        if phase == WAITING or not (before in STEP_PHASES and phase in STEP_PHASES):
            clocks = self._clocks()
            self._used, self._used_before = self._used_by(clocks), clocks
        self._since = now
        self.facts["phase"], self.facts["at"] = phase, time.time()
        self._write()

    def move(self) -> None:
        """Say, from any thread, that a long phase moves on: another batch is evaluated, another tensor written."""
        self.moves += 1

    def of_steps(self) -> tuple[float, float, float, float]:
        """Seconds of this start's steps so far: all, computed by the process, by its main thread, waiting for data."""
        spent, running = dict(self._spent), self.facts["phase"]
        spent[running] = spent.get(running, 0.0) + time.perf_counter() - self._since
        process, main, _ = self._used_by(self._clocks())
        return sum(spent.get(phase, 0.0) for phase in STEP_PHASES), process, main, spent.get(WAITING, 0.0)

    def _used_by(self, clocks: Clocks) -> Clocks:
        """What the steps have used when the clocks stand so."""
        if self.facts.get("phase") not in STEP_PHASES:
            return self._used
        process, main, kept = (
            used + now - before for used, now, before in zip(self._used, clocks, self._used_before, strict=True)
        )
        return process, main, kept

    def _clocks(self) -> Clocks:
        return time.process_time(), time.thread_time(), self._delayed()

    def _delayed(self) -> float:
        """Seconds that the main thread has waited for a core."""
        if self._schedule is not None:
            with contextlib.suppress(OSError, IndexError, ValueError):
                return int(os.pread(self._schedule, 100, 0).split()[1]) / 1e9
        return 0.0

    def update(self, **facts: Any) -> None:
        """Add to what is known of this rank, and have all hosts see it; from any thread."""
        with self._telling:
            self.facts |= facts
            rest = {name: value for name, value in self.facts.items() if name not in ("step", "phase", "at")}
            text = json.dumps(rest)[1:]
            if (
                len(text) > LINE_BYTES // 2
            ):  # very many groups; in the store, where the others look first, there is room
                text = json.dumps(rest | {"collectives": {}, "last": ""})[1:]
            self._rest = text
            self._write()
            if (line := self._line) is not None:
                publish(line.folder, line.ranks)

    def _write(self) -> None:
        """Put the line together by hand: json.dumps would take as long as all the rest of a change of phase."""
        if (place := self._line) is None:
            return
        facts, spent = self.facts, ", ".join(self._seconds.values())
        line = (
            f'{{"step": {facts["step"]}, "phase": "{facts["phase"]}", "at": {facts["at"]:.3f}, "spent": {{{spent}}}, '
            f'"taken": {self._taken}, "busy": {self._used[0] + self._used[2]:.3f}, {self._rest}'
        )
        with contextlib.suppress(OSError):
            place.write(line)


def wait_share(spent: Mapping[str, float]) -> float:
    """Of the seconds that a rank has spent in steps, by phase, the share in which it waited for data."""
    whole = sum(spent.get(phase, 0.0) for phase in STEP_PHASES)
    return spent.get(WAITING, 0.0) / whole if whole else 0.0


def process_state(pid: int) -> tuple[str, int | None]:
    """(letter of its state, its start in ticks since boot) of a process of this machine; ("", None): there is none."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        words = stat_fields(pid)
        return words[0], int(words[19])
    return "", None
