"""`python -m tests.helpers.killed STEP recipes.NAME WORDS`: `tests.helpers.quick`'s command, which dies by `kill -9`.

When so many steps have been taken and the first checkpoint is complete, rank 0 kills every process that works in this
folder, itself last: the command, and all its ranks, which are copies of it. Nobody has the time to save or to say a word.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from pathlib import Path

from lockstep.loop.training_loop import TrainingLoop
from tests.helpers.processes import processes_in

BEFORE_STEP = TrainingLoop.before_step


def dies(loop: TrainingLoop) -> bool:
    if loop.context.step == STEP:
        while not (loop.context.out / "checkpoints" / "LATEST").exists():
            time.sleep(0.01)
        while True:  # the other ranks wait for their end
            if loop.context.rank == 0:
                for pid in sorted(processes_in(Path.cwd()), key=lambda pid: pid == os.getpid()):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(1)
    return BEFORE_STEP(loop)


if __name__ == "__main__":
    STEP = int(sys.argv[1])
    TrainingLoop.before_step = dies  # type: ignore[method-assign]
    sys.argv = sys.argv[1:]
    runpy.run_module("tests.helpers.quick", run_name="__main__")
