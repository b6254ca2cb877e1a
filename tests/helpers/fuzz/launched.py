"""`python -m recipes.ddp` as a user starts it, struck by signals."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lockstep.config import run_directory
from lockstep.distributed.signals import PREEMPTED
from tests.helpers.fuzz import starts
from tests.helpers.fuzz.judging import Outcome
from tests.helpers.fuzz.results import Result, compare, result_of
from tests.helpers.processes import as_a_shell, children, processes_in

LAUNCHED = [sys.executable, "-m", "recipes.ddp"]
LAUNCHED += [
    "global_batch_size=32",
    "max_steps=16",
    "log_every=1",
    "optim.warmup_steps=3",
    "checkpoint.every=4",
    "threads=1",
]


@dataclass(frozen=True)
class Blow:
    """A signal to `python -m recipes.ddp`, or to one of its ranks.

    Attributes:
        rank: which of its ranks; −1: the launcher.
        steps: logged steps to wait for; −1: not even for the first one, but for `seconds`.
    """

    sign: int
    rank: int
    steps: int
    seconds: float


def draw_blows(seed: int) -> tuple[Blow, ...]:
    dice = random.Random(f"lockstep launcher {seed}")
    found = []
    for _ in range(dice.randint(1, 2)):
        sign = dice.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
        who = dice.randrange(-1, 2) if sign == signal.SIGKILL else -1
        steps = dice.randint(1, 14) if dice.random() < 0.8 else -1
        found.append(Blow(sign, who, steps, dice.uniform(0.0, 5.0)))
    return tuple(found)


def strike_launched(process: subprocess.Popen[str], out: Path, blow: Blow, logged: int) -> str:
    """Send the signal when its time has come; return what was hit, or nothing where the run was over before.

    Args:
        logged: lines in metrics.jsonl before this start.
    """
    began, metrics = time.monotonic(), out / "metrics.jsonl"

    def steps() -> int:
        return len(metrics.read_bytes().splitlines()) if metrics.exists() else 0

    def due() -> bool:
        seconds = time.monotonic() - began
        return steps() >= blow.steps > 0 and steps() != logged if blow.steps > 0 else seconds > blow.seconds

    while not due():
        if process.poll() is not None or time.monotonic() - began > starts.START_SECONDS:
            return ""
        time.sleep(0.02)
    target = process.pid
    if blow.rank >= 0:
        ranks = children(process.pid)
        if len(ranks) <= blow.rank:
            return ""
        target = ranks[blow.rank]
    with suppress(ProcessLookupError):
        os.kill(target, blow.sign)
        return f"{signal.Signals(blow.sign).name} to {'the launcher' if blow.rank < 0 else f'rank {blow.rank}'}"
    return ""


@cache
def launched_reference() -> Result:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        process = as_a_shell([*LAUNCHED, f"out={out}"], out.parent)
        said = process.communicate(timeout=starts.START_SECONDS)[0]
        assert process.returncode == 0, said
        return result_of(out)


def play_launched(blows: tuple[Blow, ...], folder: Path) -> Outcome:
    """As `play`, with the command that a user types; it may start dead ranks again by itself."""
    expected, outcome, out = launched_reference(), Outcome(), folder / "out"
    for blow in (*blows, None):
        logged = len((out / "metrics.jsonl").read_bytes().splitlines()) if (out / "metrics.jsonl").exists() else 0
        process = as_a_shell([*LAUNCHED, f"out={out}", "max_restarts=1"], out.parent)
        hit = strike_launched(process, out, blow, logged) if blow else ""
        try:
            said = process.communicate(timeout=starts.START_SECONDS)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            outcome.wrong = f"{hit or 'undisturbed'}: hung\n{process.communicate()[0]}"
            return outcome
        outcome.events.append(f"{hit or 'undisturbed'}, exit code {process.returncode}")
        outcome.counts["resumes"] += said.count("resuming from ")
        if hit and blow:
            outcome.counts["kills" if blow.sign == signal.SIGKILL else "signals"] += 1
            outcome.counts["preemptions"] += process.returncode == PREEMPTED
        deadline = time.monotonic() + 10
        while processes_in(out.parent) and time.monotonic() < deadline:
            time.sleep(0.05)
        outcome.wrong = judge_launched(hit, blow, process.returncode, said, processes_in(out.parent))
        if outcome.wrong:
            return outcome
        if run_directory.read_result(out).get("status") == "finished":
            break
    outcome.wrong = compare(result_of(out), expected, best=False)
    return outcome


def judge_launched(hit: str, blow: Blow | None, code: int, said: str, left: list[int]) -> str:
    if left:
        return f"{hit}: processes {left} are still there\n{said}"
    if blow is None or not hit:
        allowed = {0}
    elif blow.rank >= 0:
        allowed = {0}  # max_restarts=1
    elif blow.sign == signal.SIGKILL:
        allowed = {-signal.SIGKILL, 0}
    else:  # before there are ranks it ends as any process does
        allowed = {0, PREEMPTED, 128 + blow.sign, -blow.sign}
    if code not in allowed:
        return f"{hit or 'undisturbed'}: exit code {code}, not one of {sorted(allowed)}\n{said}"
    if blow and hit and blow.rank < 0 and "Traceback" in said:
        return f"{hit}: a traceback\n{said}"
    return ""
