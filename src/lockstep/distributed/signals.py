"""One owner of signals: a rank that is asked to stop notes it, and all ranks stop together at a step boundary.

A scheduler that takes a machine back sends SIGTERM, SIGUSR1 or SIGUSR2 some time before it kills; a person presses
Ctrl-C, or closes the terminal (SIGHUP, which nohup has ignored). Saving inside a handler would find the ranks in the
middle of a collective, and perhaps only one of them signalled. So here a signal raises a flag, and `Agreement` makes of
one rank's flag every rank's decision.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

PREEMPTED = os.EX_TEMPFAIL  # 75, "try again later" in sysexits.h: the exit code of a run that wants to be requeued
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
AGREE_SECONDS = 0.2  # a collective between every two steps would cost a small model a tenth of its speed
AGREE_STEPS = 64  # at most so many steps without asking, should steps grow longer


class Preempted(Exception):
    """Raised out of `run.steps` on all ranks together, when what there was to save is saved."""


class Listener:
    """Notes the first signal; a second Ctrl-C ends the process at once, as does the first while nothing can be lost.

    Python's own handlers run only between two bytecodes, so not while the main thread waits in a collective. The
    interpreter's C handler writes every signal's number to a socket as it comes, and a thread reads it there.

    Args:
        say: puts a line before the user.
        launched: by a launcher, which sees a second Ctrl-C and kills. The first one reaches the ranks twice: from the
            terminal, and from the launcher however much later.

    Attributes:
        received: number of the first signal, 0 before there is one.
        training: whether training has begun, so that there is a step boundary to wait for.
    """

    def __init__(self, say: Callable[[str], None], launched: bool = False) -> None:
        self.received, self.training = 0, False
        self._say, self._launched, self._announced = say, launched, False
        self._first = 0.0
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        self._heard = [number for number in SIGNALS if number != signal.SIGHUP or not nohup]
        for number in self._heard:
            signal.signal(number, lambda *_: None)
            signal.siginterrupt(number, False)  # else a write to a full pipe, or C++ code, meets EINTR
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # a launcher may have held back those that came earlier
        os.register_at_fork(after_in_child=ignore_signals)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            for number in self._reader.recv(64):
                if number not in SIGNALS:
                    continue
                if not self.training:
                    os._exit(unsaved(number))
                if not self.received:
                    self.received, self._first = number, time.monotonic()
                    if number == signal.SIGINT:  # other signals come from launchers too, when another rank has died
                        self.announce(number)
                elif number == signal.SIGINT and not self._launched and time.monotonic() - self._first > 0.3:
                    os._exit(128 + signal.SIGINT)  # nobody types faster than that

    def announce(self, number: int) -> None:
        """Say, once, that the ranks are going to leave."""
        if not self._announced:
            self._announced = True
            self._say(f"{signal.Signals(number).name}: leaving after this step; Ctrl-C ends at once")

    def close(self) -> None:
        """Give the signals back: from here on each does what it does by default."""
        signal.set_wakeup_fd(-1)
        for number in self._heard:
            signal.signal(number, signal.SIG_DFL)


def alone_under_srun() -> bool:
    """Whether srun started this rank, and no agent of torchrun's in between."""
    return "SLURM_STEP_ID" in os.environ and "TORCHELASTIC_ERROR_FILE" not in os.environ


def unsaved(number: int) -> int:
    """The exit code of a rank that a signal ended before it could save.

    As a rule there is nothing to save, and it is PREEMPTED. But when one task fails, srun sends SIGTERM to all others
    and takes the largest exit code for its own: a 75 would hide the failure, and have the job requeued.
    """
    return 1 if number == signal.SIGTERM and alone_under_srun() else PREEMPTED


def ignore_signals(*_: object) -> None:
    """For helpers of a rank, such as DataLoader workers: a signal to the whole group is for the rank to act on."""
    signal.set_wakeup_fd(-1)  # after a fork it is still the rank's socket
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def be_a_helper(*_: object) -> None:
    """In a process that works for this rank: leave signals to it, and end with it."""
    ignore_signals()
    end_with_parent()


def end_with_parent() -> None:
    """Have the kernel kill this process when the thread that forked it ends, however that happens."""
    PR_SET_PDEATHSIG = 1  # linux/prctl.h
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))


class Agreement:
    """What all ranks decide together between two steps: whether to leave, and whether to save.

    It asks about five times a second, not in every step; the ranks take the same interval because they take it from
    numbers that all of them have.
    """

    def __init__(self, group: dist.ProcessGroup | None, listener: Listener) -> None:
        self._group, self._listener = group, listener
        self._next_step = 0
        self._asked: tuple[int, float] | None = None  # at which step and when

    def ask(self, step: int, save: bool) -> tuple[int, bool]:
        """(a signal's number or 0, whether any rank wants a checkpoint), the same on all ranks.

        Args:
            step: steps done; all ranks are at the same one.
            save: whether this rank wants a checkpoint now.
        """
        if step < self._next_step:
            return 0, False
        now, seconds = time.monotonic(), AGREE_SECONDS  # of the first step's length nothing is known
        if self._asked:
            seconds = (now - self._asked[1]) / (step - self._asked[0])
        answer = torch.tensor([self._listener.received, save, seconds], dtype=torch.float64)
        dist.all_reduce(answer, dist.ReduceOp.MAX, group=self._group)
        sign, anyone_saves, slowest = answer.tolist()
        self._asked = step, now
        self._next_step = step + min(AGREE_STEPS, max(1, int(AGREE_SECONDS / max(slowest, 1e-6))))
        return int(sign), bool(anyone_saves)
