"""A job in Slurm's queue, seen from outside: asked for, followed to its end, taken out again. Loads nothing of ours."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

DETACHED = 128 + signal.SIGINT  # Ctrl-C while following: how the job will end is not known
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "OUT_OF_MEMORY", "REVOKED", "TIMEOUT"}
MAYBE = {"NODE_FAIL", "PREEMPTED"}  # the end, or the moment before Slurm requeues the job
FORGOTTEN = "FORGOTTEN"  # no state of Slurm's: it knows the job no more
RUNNING = {"RUNNING", "STAGE_OUT", "SIGNALING", "STOPPED", "SUSPENDED"}
# What slurmd writes into the log of a job that comes back: the log has said so already, and the state says it too.
COMES_BACK = re.compile(rb"slurmstepd.*: error: \*\*\* JOB \S+ ON \S+ CANCELLED AT \S+ DUE TO JOB REQUEUE \*\*\*")


@dataclass
class Job:
    """A job in the queue, or one of an array.

    Attributes:
        id: what scancel and scontrol know it by.
        log: what the job's first process and rank 0 say; it may not exist yet.
        out: its run directory.
        point: of a sweep, what is its own, as `optim.lr=0.1`.
    """

    id: str
    log: Path
    out: Path
    point: str = ""
    offset: int = 0  # bytes of the log that were shown
    shown: str = ""  # the last state that was
    code: int | None = None
    since: float = field(default_factory=time.monotonic)  # of the last change


def cancel(jobs: Sequence[Job]) -> None:
    """Take jobs out of the queue again."""
    subprocess.run(["scancel", *(job.id for job in jobs)])


def follow(jobs: Sequence[Job]) -> int:
    """Show the jobs' states and logs until all have ended; return the worst exit code.

    Ctrl-C leaves the jobs running and returns DETACHED.
    """
    asked = float("-inf")
    try:
        while any(job.code is None for job in jobs):
            now = time.monotonic()
            # slurmctld is everyone's: the longer nothing has changed, the less often it is asked, up to every 10 s.
            if now - asked >= min(10.0, 1.0 + (now - max(job.since for job in jobs)) / 30):
                asked = now
                for job in jobs:
                    if job.code is None:
                        look(job)
            for job in jobs:
                show_log(job, len(jobs) > 1)
            time.sleep(0.25)
        time.sleep(0.5)  # the log's last lines, where they come over a network
        for job in jobs:
            show_log(job, len(jobs) > 1)
            print(f"job {job.id}: {job.shown}{f' · {job.point}' if job.point else ''}", flush=True)
    except KeyboardInterrupt:
        from lockstep.utils.text import short

        ids = " ".join(job.id for job in jobs if job.code is None)
        logs = shlex.join(short(job.log) for job in jobs if job.code is None)
        print(f"\nno longer following; the job goes on. Follow again: tail -F {logs}; cancel: scancel {ids}")
        return DETACHED
    return max(job.code or 0 for job in jobs)


def look(job: Job) -> None:
    """Ask for a job's state and say it if it is new. Sets job.code when the job has ended."""
    facts = ask(job.id)
    state = facts.get("JobState", "")
    nodes, again = facts.get("NodeList", ""), int(facts.get("Restarts", "0"))
    life = f" (requeue {again})" if again else ""
    if state == FORGOTTEN:  # there is no accounting; but the run has written down how it ended
        finished = False
        with contextlib.suppress(OSError, ValueError):
            finished = json.loads((job.out / "result.json").read_text(encoding="utf-8"))["status"] == "finished"
        state = "COMPLETED" if finished else "FAILED"
    if state in ENDED or (state in MAYBE and job.shown == state and time.monotonic() - job.since > 30):
        job.code = exit_code(state, facts.get("ExitCode", ""))
        job.shown = ending(state, job.code) + life
        return
    if state == "PENDING":
        reason = facts.get("Reason", "")
        shown = "queued" + (f" ({reason})" if reason not in ("", "None") else "") + life
    elif state == "COMPLETING":
        shown = job.shown  # it ends, or comes back
    elif state in RUNNING:
        shown = f"running on {nodes}{life}"
    else:
        shown = state or job.shown  # no answer: slurmctld is away
    if shown != job.shown:
        job.shown, job.since = shown, time.monotonic()
        print(f"job {job.id}: {shown}", flush=True)


def ending(state: str, code: int) -> str:
    """How a job ended, in words."""
    if state == "COMPLETED":
        return "finished"
    words = {"CANCELLED": "cancelled", "TIMEOUT": "ended by its time limit", "FAILED": "failed"}
    return f"{words.get(state, state)}, exit code {code}"


def exit_code(state: str, told: str) -> int:
    """The job's exit code as a shell would have it; never 0 for a job that was not completed."""
    if state == "COMPLETED":
        return 0
    code, _, number = told.partition(":")
    if number not in ("", "0"):
        return 128 + int(number)
    return int(code or 0) or 1


def ask(job_id: str) -> dict[str, str]:
    """What Slurm knows of a job: JobState, Reason, NodeList, ExitCode, Restarts, …; nothing where it does not answer.

    slurmctld forgets a job some minutes after its end; then it is the accounting that knows, where there is one.
    """
    done = subprocess.run(
        ["scontrol", "--oneliner", "show", "job", job_id], capture_output=True, text=True, env=plain_environment()
    )
    if done.returncode == 0:
        return dict(re.findall(r"(\w+)=(\S*)", done.stdout))
    if "Invalid job id" not in done.stderr:
        return {}
    lines = output("sacct", "-X", "-n", "-P", "-j", job_id, "-o", "State,ExitCode").splitlines()
    if not lines:
        return {"JobState": FORGOTTEN}
    state, _, code = lines[-1].partition("|")
    return {"JobState": state.split(" ")[0], "ExitCode": code}


def plain_environment() -> dict[str, str]:
    """English words and Slurm's own formats, whatever the user has set."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("SQUEUE_", "SINFO_"))}


def output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=plain_environment())
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def show_log(job: Job, several: bool) -> None:
    """Print the whole lines that were added to a job's log."""
    try:
        with job.log.open("rb") as stream:
            stream.seek(job.offset)
            added = stream.read()
    except OSError:
        return  # it has not begun
    if job.code is None:
        added = added[: added.rfind(b"\n") + 1]
    job.offset += len(added)
    before = f"[{job.id}] " if several else ""
    for line in added.splitlines():
        if not COMES_BACK.match(line):
            print(before + line.decode(errors="replace"), flush=True)
