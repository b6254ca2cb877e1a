"""A rank's crash shows that rank's traceback once, ends all ranks, and is the exit code; nothing hangs or is left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.harness import clean_environment, command
from tests.test_start_paths import TORCHRUN, free_port

CRASHING = '''
"""A recipe whose rank 1 ends in the way that the variable HOW says."""
import os
import time

from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from lockstep import Run, recipe
from lockstep.models import build_model


@recipe
def train(run: Run) -> None:
    model = DistributedDataParallel(run.place(build_model(run.config.model)))
    optimizer = SGD(model.parameters(), lr=0.01)
    for batch in run.steps(model=model, optimizer=optimizer):
        loss = cross_entropy(model(batch.images), batch.labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if os.environ["HOW"] != "forget":
            run.record(loss=loss)
        if run.world.rank == 1 and run.step == 1:
            if os.environ["HOW"] == "raise":
                raise KeyError("the cause")
            if os.environ["HOW"] == "kill":
                os.kill(os.getpid(), 9)
            if os.environ["HOW"] == "exit":
                os._exit(7)


if __name__ == "__main__":
    train.main()
'''
WORDS = ["batch_size=24", "max_steps=50", "log_every=1", "out=run"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "crash.py").write_text(CRASHING)
    return tmp_path


def test_an_exception_is_shown_once_from_the_rank_that_raised_it(folder: Path) -> None:
    done = command("crash.py", *WORDS, cwd=folder, HOW="raise")
    assert done.returncode == 1
    assert done.stderr.startswith("rank 1 failed\n")
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.rstrip().endswith("KeyError: 'the cause'")
    assert json.loads((folder / "run" / "result.json").read_text())["status"] == "failed"
    assert "KeyError" in (folder / "run" / "ranks" / "1.log").read_text()


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("kill", 137, "rank 1 was killed by SIGKILL"),
        ("exit", 7, "rank 1 ended with exit code 7"),
        ("forget", 2, "error: crash: no loss to log; call run.record(loss=loss) in every step"),
    ],
)
def test_a_rank_that_just_ends_is_named(how: str, code: int, words: str, folder: Path) -> None:
    done = command("crash.py", *WORDS, cwd=folder, HOW=how)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert done.stderr.startswith(words)


def test_under_torchrun_its_summary_shows_the_cause(folder: Path) -> None:
    words = [*TORCHRUN, "--nproc-per-node=2", f"--master-port={free_port()}", "crash.py", *WORDS]
    done = subprocess.run(
        words, cwd=folder, env=clean_environment() | {"HOW": "raise"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.count("KeyError: 'the cause'") == 1
    assert "Connection closed by peer" not in done.stderr


def test_ranks_started_by_hand_say_it_themselves(folder: Path) -> None:
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "HOW": "raise"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "crash.py", *WORDS],
            cwd=folder,
            env=clean_environment() | shared | {"RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert said[0].startswith("rank 0 stopped because another rank did")
    assert said[1].startswith("rank 1 failed\nTraceback")


def test_ctrl_c_ends_all_ranks_and_leaves_no_process(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "recipes.ddp", "epochs=1000", "out=run", "data.workers=1"]
    process = subprocess.Popen(
        words, cwd=tmp_path, env=clean_environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_until(lambda: "step" in read(tmp_path / "run" / "metrics.jsonl"), 60)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to the whole foreground group
    assert process.communicate(timeout=10)[1] == "stopped by SIGINT: all ranks have ended\n"
    assert process.returncode == 130
    wait_until(lambda: not processes_of(tmp_path / "run"), 10)


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def wait_until(holds, seconds: float) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def processes_of(run: Path) -> list[str]:
    """The processes, DataLoader workers among them, whose environment names the run directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"LOCKSTEP_RUN_DIR={run}\0".encode() in entry.read_bytes():
                found.append(entry.parent.name)
        except OSError:
            continue  # it ended while we looked
    return found


def test_ranks_that_never_join_are_named(tmp_path: Path) -> None:
    shared = {"WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = [sys.executable, "-m", "recipes.ddp", "timeout_seconds=15", "out=run"]
    ranks = [
        subprocess.Popen(
            words, cwd=tmp_path, env=clean_environment() | shared | {"RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in ("0", "2")
    ]
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    for text in said:
        assert text.startswith("error: ranks 1, 3 of 4 did not join within timeout_seconds=15"), text
        assert text.count("\n") == 1


def test_a_rank_alone_says_whom_it_could_not_reach(tmp_path: Path) -> None:
    port = str(free_port())
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    done = command("-m", "recipes.ddp", "timeout_seconds=2", cwd=tmp_path, **place)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: rank 1 could not reach rank 0 at MASTER_ADDR=127.0.0.1 MASTER_PORT={port}")
    assert done.stderr.count("\n") == 1


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = str(other.getsockname()[1])
        place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = command("-m", "recipes.ddp", "out=run", cwd=tmp_path, **place)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: MASTER_ADDR=127.0.0.1 MASTER_PORT={port}: the port is in use")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
