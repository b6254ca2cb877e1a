"""A rank that sleeps, stops, dies or does something else than the others: the run ends with one message that says who."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launchers import torchrun
from lockstep import pulse, rank
from lockstep.checks import complete
from lockstep.rundir import freeze
from lockstep.world import Place
from tests import hanging
from tests.harness import compose_config, renew_threads
from tests.test_start_paths import free_port

HERE = socket.gethostname()
LIMIT = 6
WORDS = ("batch_size=24", "max_steps=6", "log_every=1", "model.image_size=8", "eval_batch_size=360")
CASES: dict[str, tuple[str, ...]] = {
    "sleep": (),
    "exit": (),
    "raise": (),
    "stop": (),
    "skip": (),
    "other": (),
    "group": (),
    "one step less": (),
    "one batch less": (),
    "shape": (),
    "slow everywhere": (),
    "disk": ("checkpoint.every=3",),
    "worker dies": ("data.workers=1", "max_steps=30"),
    "worker hangs": ("data.workers=1", "max_steps=30"),
}


@dataclass
class Ended:
    code: int
    said: str  # on stderr
    seconds: float
    ranks: Path


def begin(folder: Path, how: str, who: int, words: tuple[str, ...], start: Any) -> Any:
    """`start(out)`, in a process of its own, for a fresh run of the recipe; what it says goes to `said`."""
    config = compose_config(hanging.train, f"out={folder / 'run'}", f"timeout_seconds={LIMIT}", *WORDS, *words)
    complete(config, hanging.train, 2)
    out = freeze(config, hanging.train.name)
    assert out is not None

    def child() -> None:
        renew_threads()
        os.setsid()
        for number, name in ((1, "printed"), (2, "said")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        os.environ |= {"HOW": how, "WHO": str(who), "LIMIT": str(LIMIT), rank.RUN_DIRECTORY: str(out)}
        code = start(out)
        sys.stderr.flush()
        (folder / "ended").write_text(str(time.time()))
        os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def launched(out: Path) -> int:
    variables = {rank.RUN_DIRECTORY: str(out), rank.LAUNCHER: str(os.getpid())}
    return torchrun.launch("tests.hanging", variables, nproc=2, start="fork")


def ended(process: Any, folder: Path, began: float) -> Ended:
    process.join(60)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    assert process.exitcode is not None, f"still running: {(folder / 'said').read_text()}"
    seconds = float((folder / "ended").read_text()) - began
    said = re.sub(r"^\[rank0\]:\[W.*\n", "", (folder / "said").read_text(), flags=re.MULTILINE)  # c10d's own log
    return Ended(process.exitcode, said, seconds, folder / "run" / "ranks")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Ended]]:
    """Of all cases, started together: most of the time each only waits."""
    folders = {how: tmp_path_factory.mktemp("hang") for how in CASES}
    began = time.time()
    running = {how: begin(folders[how], how, 1, words, launched) for how, words in CASES.items()}
    yield {how: ended(process, folders[how], began) for how, process in running.items()}


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (
            "sleep",
            f"error: rank 1 ({HERE}) has not come to all_reduce no. N of [490], in which rank 0 ({HERE}) waited for "
            f"timeout_seconds={LIMIT}\n"
            f"  rank 0 ({HERE}): step 3, training, loss.backward() (hanging.py:N), last collective all_reduce no. N of "
            "[490]\n"
            f"  rank 1 ({HERE}): step 3, training, time.sleep(600) (hanging.py:N), last collective all_reduce no. N of "
            "[4]\n"
            "stack traces: ranks/0.stack, 1.stack\n",
        ),
        (
            "exit",
            f"error: rank 1 ({HERE}) ended without a word in step 3 (training)\n"
            f"  rank 0 ({HERE}): step 3, training, loss.backward() (hanging.py:N), last collective all_reduce no. N of "
            "[490]\n"
            f"  rank 1 ({HERE}): step 3, training, gone\n"
            "stack traces: ranks/0.stack\n",
        ),
        (
            "stop",
            f"error: rank 1 ({HERE}) stands still in step 3 (training): stopped by SIGSTOP, Ctrl-Z or a debugger\n",
        ),
        (
            "skip",
            f"rank 1 was killed by SIGABRT on {HERE} in step 3 (after the update); its last words are in ranks/1.log\n"
            f"  rank 0 ({HERE}): step 3, training, loss.backward() (hanging.py:N), last collective all_reduce no. N of "
            "[490]\n"
            f"  rank 1 ({HERE}): step 3, after the update, for batch in run.steps(model=model, optimizer=optimizer): "
            "(hanging.py:N), in a collective of another size than the others'\n",
        ),
        (
            "other",
            f"error: the ranks are in different collectives (timeout_seconds={LIMIT}): rank 0 ({HERE}) in all_reduce "
            f"no. N of [490], rank 1 ({HERE}) in broadcast no. N of [500]\n",
        ),
        ("group", f"error: rank 0 ({HERE}) waited in vain for ranks that are elsewhere (timeout_seconds={LIMIT})\n"),
        ("one step less", f"rank 1 was killed by SIGABRT on {HERE} in step 5 (evaluating); its last words"),
        ("one batch less", f"rank 1 failed on {HERE} in step 6 (waiting for data)\nTraceback"),
        ("shape", f"rank 1 failed on {HERE} in step 0 (starting)\nTraceback"),
        ("raise", f"rank 1 failed on {HERE} in step 3 (training)\nTraceback"),
        ("worker dies", f"rank 1 failed on {HERE} in step N (waiting for data)\nTraceback"),
        ("worker hangs", f"error: rank 1 ({HERE}) has not come to all_reduce no. N of [490], in which rank 0"),
        ("disk", f"error: "),
    ],
)
def test_one_message_says_who_and_where(how: str, words: str, outcomes: dict[str, Ended]) -> None:
    found = outcomes[how]
    pattern = re.escape(words).replace("N", r"\d+")
    assert re.match(pattern, found.said), found.said
    assert found.code == (134 if "SIGABRT" in words else 1)
    assert found.said.count("error: ") + found.said.count("rank 1 failed") + found.said.count("was killed") == 1
    assert ("Traceback" in found.said) == ("Traceback" in words)
    assert found.seconds < LIMIT + 12


def test_stacks_are_left_of_ranks_that_hung(outcomes: dict[str, Ended]) -> None:
    ranks = outcomes["sleep"].ranks
    assert "Timed out waiting" in (ranks / "0.stack").read_text()
    assert "in go_wrong" in (ranks / "1.stack").read_text()
    assert re.search(r"all_reduce no\. \d+ of \[490\]", (ranks / "0.stack").read_text())


def test_ranks_that_are_slow_all_alike_are_left_alone(outcomes: dict[str, Ended]) -> None:
    found = outcomes["slow everywhere"]
    assert (found.code, found.said) == (0, "")
    assert found.seconds > 2 * LIMIT
    assert [pulse.read(found.ranks, rank)["end"] for rank in range(2)] == [pulse.FINISHED] * 2
    assert not list(found.ranks.glob("*.stack"))
