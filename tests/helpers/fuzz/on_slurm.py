"""`python -m recipes.ddp +cluster=slurm` on two nodes of a Slurm box: ranks, jobs and nodes that are killed."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lockstep.config import run_directory
from tests.helpers.fuzz.judging import Outcome
from tests.helpers.fuzz.launched import LAUNCHED, launched_reference
from tests.helpers.fuzz.results import compare, result_of
from tests.helpers.slurm_box import ENDED, Box

CLUSTER = ("cluster.nodes=2", "+cluster=slurm", "cluster.follow=false")
JOB_SECONDS = 240  # a job that takes longer hangs, on a busy machine too
KINDS = {  # what strikes, and how often
    "SIGKILL to a rank": 3,
    "SIGKILL to all ranks": 2,
    "a node goes down": 1,
    "SIGUSR1 to the job": 1,
}


@dataclass(frozen=True)
class ClusterBlow:
    """What befalls a job; `rank` is the one that is killed, or whose node goes.

    Attributes:
        steps: logged steps of the run to wait for; 0: not even for the first one, but until the job runs.
    """

    kind: str
    rank: int
    steps: int


def draw_cluster_blows(seed: int, variant: int) -> tuple[ClusterBlow, ...]:
    dice = random.Random(f"lockstep slurm {seed} variant {variant}")
    kinds = dice.choices(list(KINDS), list(KINDS.values()), k=dice.randint(2, 3))
    steps = sorted(dice.randint(0, 13) for _ in kinds)
    return tuple(ClusterBlow(kind, dice.randrange(2), step) for kind, step in zip(kinds, steps, strict=True))


@cache
def cluster() -> Box:
    """This process's box, which ends with it."""
    return Box(nodes=2).__enter__()


def rank_of_job(job: str, rank: int) -> int:
    """The process of a rank, seen from here; 0 where there is none (yet)."""
    marks = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if (
                marks <= {*entry.read_bytes().split(b"\0")}
                and b"recipes.ddp" in (entry.parent / "cmdline").read_bytes()
            ):
                return int(entry.parent.name)
    return 0


def strike_job(box: Box, job: str, out: Path, blow: ClusterBlow) -> bool:
    """Strike when the time has come; False where the job was over before."""
    metrics, began = out / "metrics.jsonl", time.monotonic()
    while box.job(job)["JobState"] not in ENDED and time.monotonic() - began < JOB_SECONDS:
        steps = len(metrics.read_bytes().splitlines()) if metrics.exists() else 0
        process = rank_of_job(job, blow.rank)
        if not process or steps < blow.steps:
            time.sleep(0.05)
            continue
        if blow.kind == "a node goes down":
            node = f"node{blow.rank + 1}"
            box.steer("node", "down", node)
            box.steer("node", "mend", node)
        elif blow.kind == "SIGUSR1 to the job":
            box.run("scancel", "--signal=USR1", job)
        else:
            for victim in [process] if blow.kind == "SIGKILL to a rank" else [rank_of_job(job, 0), rank_of_job(job, 1)]:
                with suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL) if victim else None
        return True
    return False


def end_of_job(box: Box, job: str) -> str:
    """The state that a job ends in, after all its requeues; it is spared most of their waiting."""
    began = time.monotonic()
    while (found := box.job(job))["JobState"] not in ENDED:
        if time.monotonic() - began > JOB_SECONDS:
            box.run("scancel", job)
            return f"hung in {found['JobState']}"
        if found["JobState"] == "PENDING" and found["Restarts"] != "0":
            time.sleep(2)
            box.run("scontrol", "update", f"JobId={job}", "StartTime=now")
        time.sleep(0.2)
    return found["JobState"]


def play_on_slurm(blows: tuple[ClusterBlow, ...], folder: Path) -> Outcome:
    """As `play_launched`, on a cluster: the same command is submitted until the run has ended."""
    expected, outcome, out, box = launched_reference(), Outcome(), folder / "out", cluster()
    for blow in (*blows, None):
        done = box.run(*LAUNCHED, f"out={out}", *CLUSTER, cwd=folder)
        if done.returncode:
            outcome.wrong = f"not submitted: {done.stderr}"
            return outcome
        job = done.stdout.split()[1]
        hit = blow is not None and strike_job(box, job, out, blow)
        state = end_of_job(box, job)
        what = f"{blow.kind} (rank {blow.rank})" if blow and hit else "undisturbed"
        outcome.events.append(f"{what}, {state}")
        if blow and hit:
            if blow.kind == "SIGUSR1 to the job":
                outcome.counts["preemptions"] += 1
            else:
                outcome.counts["kills"] += 1
                outcome.places[f"on Slurm: {blow.kind}"] += 1
        if state.startswith("hung") or (state != "COMPLETED" and not hit):
            outcome.wrong = f"{what}: {state}\n" + "\n".join(log.read_text() for log in out.glob("slurm/*/*.out"))
            return outcome
        if run_directory.read_result(out).get("status") == "finished":
            break
    else:
        outcome.wrong = "the last start was undisturbed, and yet the run has not finished"
        return outcome
    said = "".join(log.read_text(errors="replace") for log in out.glob("slurm/*/*.out"))
    outcome.counts["resumes"] += said.count("resuming from ")
    outcome.wrong = compare(result_of(out), expected, best=False)
    outcome.differs = bool(outcome.wrong)
    return outcome
