"""Programs of one's own, run for a few steps each: what lockstep.verify.watch has written in them is collected here."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from lockstep.errors import CheckFailed, UserError
from lockstep.launch.recipe_process import CommandProcess
from lockstep.utils.text import count
from lockstep.verify.watching import RECORDED_STEPS, RECORDS

LINES_SHOWN = 20  # of what a program that failed has said
STOP_PROGRAM_SECONDS = 45  # torchrun waits 30 s for its ranks
LEAVE_SECONDS = 30  # for the process that has started the ranks, when these have ended
TWO_LINES = "import lockstep.verify; lockstep.verify.watch(model, optimizer)"
LAUNCHER_WARNS = re.compile(r"W\d{4} \S+ \d+ torch/distributed/")
LAUNCHER_REPORTS = re.compile(r"E\d{4} \S+ \d+ torch/distributed/elastic/.*failed \(exitcode")
FILE = re.compile(r"step(\d+)-rank(\d+)-(\d+)\.pt")


@dataclass(frozen=True)
class Program:
    """One of the two commands.

    Attributes:
        key: of the command line, program or against.
        text: its value.
        words: the command, the first word a path.
    """

    key: str
    text: str
    words: list[str]

    def __str__(self) -> str:
        return f"{self.key}={self.text}"


@dataclass(frozen=True)
class ProgramRecords:
    """What a program's ranks have written.

    Attributes:
        steps: of each step, the content of each rank's file (lockstep.verify.watching), in the order of the ranks.
        seconds: that it took.
    """

    program: Program
    steps: list[list[dict[str, Any]]]
    seconds: float

    @property
    def ranks(self) -> int:
        return len(self.steps[0])


def search_path() -> str:
    """PATH with this interpreter's folder first: `python` and `torchrun` are this environment's, also unactivated."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def find_program(key: str, text: str) -> Program:
    """A command as it can be started.

    Raises:
        UserError: it cannot be read, or there is no such command.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"{key}={text}: is not a command that can be read: {error}; set it as in a shell") from None
    if not words:
        raise UserError(f"{key}={text}: names no command; set it to what you would type, such as 'python train.py'")
    path = shutil.which(words[0], path=search_path())
    if path is None:
        raise UserError(f"{key}={text}: there is no command {words[0]}; set it to what you would type in a shell")
    return Program(key, text, [os.path.abspath(path), *words[1:]])


def run_program(program: Program, folder: Path, steps: int, limit: float, console: Console) -> ProgramRecords:
    """Run a program until each of its ranks has written its steps.

    Args:
        folder: a new one, for what it writes and says.
        limit: seconds that it may take.
        console: where a terminal shows how far it is.

    Raises:
        UserError: it has failed, took too long, or did not write what was asked for.
        CheckFailed: several of its processes are the same rank.
    """
    records = folder / "records"
    records.mkdir(parents=True)
    variables = {RECORDS: str(records), RECORDED_STEPS: str(steps), "PATH": search_path(), "PYTHONUNBUFFERED": "1"}
    began = time.monotonic()
    process = CommandProcess(program.words, folder / "said.log", os.getcwd(), variables)
    try:
        with live_line(console) as show:
            complete_since = None
            while process.process.poll() is None:
                found, now = steps_written(records), time.monotonic()
                show(f"{program.key}: step {min(len(found) + 1, steps)} of {steps}, {now - began:.0f} s")
                if complete_since is None and is_complete(records, steps):
                    complete_since = now
                if complete_since and now > complete_since + LEAVE_SECONDS:
                    break
                if not complete_since and now > began + limit:
                    show_last_lines(program, process)
                    raise UserError(
                        f"{program}: took longer than limit_seconds={limit:.0f}, and was ended in step {len(found) + 1} of "
                        f"{steps}; set limit_seconds larger"
                    )
                time.sleep(0.1)
    finally:
        process.stop(STOP_PROGRAM_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.process.pid, signal.SIGKILL)  # what it has started and left behind
    if not is_complete(records, steps):
        raise UserError(what_is_missing(program, process, records, steps))
    ranks = [match[2] for match in map(FILE.fullmatch, os.listdir(records)) if match and int(match[1]) == steps]
    twice = [int(rank) for rank in ranks if ranks.count(rank) > 1]
    if twice:
        raise CheckFailed(
            f"{program}: {ranks.count(f'{twice[0]:05d}')} processes each are rank {twice[0]}: they train alone, and not together; "
            "join them by torch.distributed.init_process_group"
        )
    return ProgramRecords(
        program, [load_files(records, step) for step in range(1, steps + 1)], time.monotonic() - began
    )


@contextmanager
def live_line(console: Console) -> Iterator[Any]:
    """A function that shows a text in a line that is overwritten; nothing where the console is no terminal."""
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("") as status:
        yield lambda text: status.update(Text(text, no_wrap=True, overflow="ellipsis"))


def steps_written(records: Path) -> set[int]:
    """The steps that a rank has written."""
    return {int(match[1]) for match in map(FILE.fullmatch, os.listdir(records)) if match}


def load_files(records: Path, step: int) -> list[dict[str, Any]]:
    """What each rank has written of a step; tensors stay on disk until they are looked at."""
    files = sorted(records.glob(f"step{step:06d}-*.pt"))
    return [torch.load(file, weights_only=True, mmap=True) for file in files]


def is_complete(records: Path, steps: int) -> bool:
    """Whether every rank has written its last step."""
    last = sorted(records.glob(f"step{steps:06d}-*.pt"))
    if not last:
        return False
    return len(last) >= torch.load(last[0], weights_only=True, mmap=True)["world_size"]


def what_is_missing(program: Program, process: CommandProcess, records: Path, steps: int) -> str:
    """Why a program that has ended has not written what it was to, in words."""
    code, done = process.process.returncode, len(steps_written(records))
    if code:
        end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
        show_last_lines(program, process)
        return f"{program}: {end} after {done} of {count(steps, 'step')}; mend it, or set another"
    if done == steps:
        found = load_files(records, steps)
        there = ", ".join(str(each["rank"]) for each in found)
        return (
            f"{program}: of {found[0]['world_size']} ranks only {there} wrote step {steps}; set TMPDIR to a folder that "
            "all nodes see, and see that no rank ends early"
        )
    if done:
        return f"{program}: ended after {count(done, 'step')}; set steps={done}, or let it train longer"
    if list(records.glob("watched-*")):
        return (
            f"{program}: called lockstep.verify.watch, and then no step of an optimizer that updates its model; name the "
            "model and the optimizer that are trained, before training"
        )
    return f"{program}: never called lockstep.verify.watch; write before its training: {TWO_LINES}"


def show_last_lines(program: Program, process: CommandProcess) -> None:
    """Show what a program has said last: itself, and not torchrun, which adds a page of its own about a rank that failed."""
    said = [line for line in process.said() if not LAUNCHER_WARNS.match(line)]
    said = list(itertools.takewhile(lambda line: not LAUNCHER_REPORTS.match(line), said)) or said
    more = f"the last {LINES_SHOWN} of {len(said)} lines" if len(said) > LINES_SHOWN else "what it said"
    if said:
        print(f"{program.key}, {more}:", *said[-LINES_SHOWN:], sep="\n  ", file=sys.stderr)
    else:
        print(f"{program.key} said nothing", file=sys.stderr)
