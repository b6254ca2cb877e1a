"""Trainings on a box's cluster: short and long ones, submitted, followed and ended as a person would."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from recipes import ddp
from tests.helpers.harness import train
from tests.helpers.slurm_box import Box, Command

DIGITS = ["global_batch_size=24", "max_steps=2", "log_every=1", "threads=1"]
TINY = ["global_batch_size=12", "data=synthetic", "data.size=48", "data.image_size=8", "epochs=100", "eval_every=0"]
TINY += ["log_every=1", "threads=1"]
SHORT = [*TINY, "max_steps=2"]
LONG = [*TINY, "max_steps=14"]  # with HOW=slow its first life is never over by itself
LATER = "+cluster.sbatch.begin=now+1hour"  # the job waits in the queue
HOOK = """
import os, time

def hook(run):
    how = os.environ.get("HOW", "")
    if how == "slow" and run.step >= 4 and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        time.sleep(1)
        until = time.monotonic() + 60
        while run.step == 12 and not run.listener.received and time.monotonic() < until:
            time.sleep(0.1)
    if run.world.rank == 1 and run.step == 1:
        if how == "raise":
            raise KeyError("the cause")
        if how == "kill":
            os.kill(os.getpid(), 9)
        if how == "sleep":
            time.sleep(600)
"""


def on_this_machine(tmp_path: Path, ranks: int, *words: str) -> dict[str, torch.Tensor]:
    return train(ddp.train, tmp_path / "reference", ranks, *words)


def start(box: Box, folder: Path, *words: str, how: str = "") -> Command:
    """Submit and follow, as a person would; what is said can be read from `stdout`."""
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return box.popen(sys.executable, *words, "+cluster=slurm", cwd=folder, env={"HOW": how}, **pipes)


def submit(box: Box, folder: Path, *words: str, how: str = "") -> str:
    """Submit, do not follow; return the job's id."""
    done = box.run(sys.executable, *words, "+cluster=slurm", "cluster.follow=false", cwd=folder, env={"HOW": how})
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[1]


def end(process: Command, seconds: float = 200) -> tuple[int, str]:
    """(exit code, what was said) of a followed job."""
    said, _ = process.communicate(timeout=seconds)
    return process.returncode, said


def until(process: Command, words: str) -> str:
    """Read what is said up to a line with these words."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if words in line:
            return said
    raise AssertionError(f"{words!r} was never said:\n{said}")


def wait_for_steps(out: Path, steps: int, seconds: float = 120) -> None:
    deadline, path = time.monotonic() + seconds, out / "metrics.jsonl"
    while not path.is_file() or len(path.read_text().splitlines()) < steps:
        logs = "\n".join(log.read_text() for log in out.glob("slurm/*/*.out"))
        assert time.monotonic() < deadline, f"no step {steps} in {path}\n{logs}"
        time.sleep(0.1)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "model.pt", weights_only=True)


def log_of(folder: Path, job: str) -> str:
    return next(folder.rglob(f"{job}_0_log.out")).read_text()
