"""A rank's crash shows that rank's traceback once, ends all ranks, and is the exit code; nothing hangs or is left."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from launchers.local import show
from tests.helpers.harness import clean_environment, command
from tests.helpers.narrow_resnet import NARROW
from tests.helpers.processes import TORCHRUN, as_a_shell, free_port, processes_in, read, wait_until

CRASHING = f'''
"""A recipe whose rank 1 ends in the way that the variable HOW says."""
{NARROW}
import os
import sys

from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from lockstep import Run, recipe
from lockstep.models.resnet import build_model


@recipe
def train(run: Run) -> None:
    model = DistributedDataParallel(run.place(build_model(run.config.model)))
    optimizer = SGD(model.parameters(), lr=0.01)
    for batch in run.steps(model=model, optimizer=optimizer):
        loss = cross_entropy(model(batch.inputs), batch.targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if os.environ["HOW"] == "break":
            break
        if os.environ["HOW"] != "forget":
            run.record(loss=loss)
        if run.world.rank == 1 and run.step == 1:
            if os.environ["HOW"] == "raise":
                raise KeyError("the cause")
            if os.environ["HOW"] == "stop":
                os.kill(os.getpid(), 19)
            if os.environ["HOW"] == "leave":
                sys.exit(0)
            if os.environ["HOW"] == "kill":
                os.kill(os.getpid(), 9)
            if os.environ["HOW"] == "exit":
                os._exit(7)


if __name__ == "__main__":
    train.main()
'''
WORDS = ["global_batch_size=24", "max_steps=50", "log_every=1", "out=run"]


SLOW = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "crash.py").write_text(CRASHING)
    return tmp_path


@pytest.mark.slow_except("fork")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_an_exception_is_shown_once_from_the_rank_that_raised_it(start: str, folder: Path) -> None:
    # With `first` its log is on the host, and is brought.
    done = command("crash.py", *WORDS, f"start={start}", "logs=first", cwd=folder, HOW="raise")
    assert done.returncode == 1
    assert "logs   1 rank keeps its log on its host unless it fails (logs=all: in ranks/)" in done.stdout
    assert done.stderr.startswith("rank 1 failed on ")
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.rstrip().endswith("KeyError: 'the cause'")
    assert json.loads((folder / "run" / "result.json").read_text())["status"] == "failed"
    assert "KeyError" in (folder / "run" / "ranks" / "1.log").read_text()


@pytest.mark.slow_except("kill")
@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("kill", 137, "rank 1 was killed by SIGKILL"),
        ("exit", 7, "rank 1 ended with exit code 7 on "),
        ("forget", 2, "error: crash: no loss to log; call run.record(loss=loss) in every step"),
        ("break", 2, "error: crash left run.steps after step 0 of 50; run the loop to its end"),
    ],
)
def test_a_rank_that_just_ends_is_named(how: str, code: int, words: str, folder: Path) -> None:
    done = command("crash.py", *WORDS, cwd=folder, HOW=how)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert done.stderr.startswith(words)


@pytest.mark.slow
def test_a_recipe_that_just_exits_has_failed(folder: Path) -> None:
    done = command("crash.py", *WORDS, cwd=folder, HOW="leave")
    assert done.returncode == 1
    assert "SystemExit" in done.stderr
    assert json.loads((folder / "run" / "result.json").read_text())["status"] == "failed"


@pytest.mark.slow
def test_a_stopped_rank_is_named_by_its_peer_and_does_not_outlive_it(folder: Path) -> None:
    """Torchrun's agent would give a rank that does not answer 30 s before it kills it."""
    began = time.monotonic()
    done = command("crash.py", *WORDS, "timeout_seconds=5", "start=spawn", cwd=folder, HOW="stop")
    assert done.returncode == 1
    assert re.match(r"error: rank 1 \(\S+\) is stopped in step 2 \(training\)", done.stderr), done.stderr
    assert time.monotonic() - began < 30


@pytest.mark.slow
def test_under_torchrun_its_summary_shows_the_cause(folder: Path) -> None:
    words = [*TORCHRUN, "--nproc-per-node=2", f"--master-port={free_port()}", "crash.py", *WORDS]
    done = subprocess.run(
        words, cwd=folder, env=clean_environment() | {"HOW": "raise"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.count("KeyError: 'the cause'") == 1
    assert "Connection closed by peer" not in done.stderr


@pytest.mark.slow
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
    assert said[0].startswith("error: rank 1 ("), said[0]
    assert "failed in step 2 (training): KeyError: 'the cause'" in said[0].splitlines()[0]
    assert said[1].startswith("rank 1 failed on ")


LONG = [sys.executable, "-m", "recipes.ddp", "epochs=1000", "out=run", "data.workers=1"]


def test_who_tells_of_another_is_not_shown_for_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Rank 1 was killed; the launcher was so slow to look that rank 0 has had the time to say so and to end."""
    extra = {"py_callstack": "error: rank 1 ended without an error message", "timestamp": str(int(time.time()) - 5)}
    (tmp_path / "error.json").write_text(
        json.dumps({"message": {"message": "WatchdogTimeout: rank 1", "extraInfo": extra}})
    )
    told = ProcessFailure(0, 1, 1, str(tmp_path / "error.json"))
    killed = ProcessFailure(1, 2, -signal.SIGKILL, str(tmp_path / "none"))
    assert told.timestamp < killed.timestamp
    assert show(ChildFailedError("ranks", {0: told, 1: killed})) == 137
    assert capfd.readouterr().err.startswith("rank 1 was killed by SIGKILL")
    killed.timestamp = told.timestamp + 30  # by the agent, whose SIGTERM it did not heed
    assert show(ChildFailedError("ranks", {0: told, 1: killed})) == 1
    assert capfd.readouterr().err == "error: rank 1 ended without an error message\n"


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_killed_launcher_leaves_no_process(start: str, tmp_path: Path) -> None:
    process = as_a_shell([*LONG, f"start={start}"], tmp_path, stderr=subprocess.PIPE)
    wait_until(lambda: "step" in read(tmp_path / "run" / "metrics.jsonl"), 60)
    process.kill()  # nobody is left to say anything, and no rank to go on
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == -9
    wait_until(lambda: not processes_in(tmp_path), 10)


@pytest.mark.parametrize("seconds", [0, pytest.param(0.7, marks=SLOW), 2.2, pytest.param(3.2, marks=SLOW)])
def test_ctrl_c_while_starting_shows_no_traceback(seconds: float, tmp_path: Path) -> None:
    """From the moment on when torch is being loaded: before it runs a line of ours, Python itself shows one."""
    process = as_a_shell(LONG, tmp_path, stderr=subprocess.PIPE)
    wait_until(lambda: "libtorch" in read(Path(f"/proc/{process.pid}/maps")))
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=15)[1]
    assert "Traceback" not in said, said
    assert process.returncode in (130, 75, -2), said
    wait_until(lambda: not processes_in(tmp_path), 10)


@pytest.mark.slow
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
    assert list(tmp_path.iterdir()) == [], "nothing is created for a run that cannot start"
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


@pytest.mark.slow
def test_a_port_where_something_else_listens_is_named(tmp_path: Path) -> None:
    """TCPStore itself would wait there for ever."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = command("-m", "recipes.ddp", "timeout_seconds=3", cwd=tmp_path, timeout=60, **place)
    assert done.returncode == 2
    assert f"MASTER_PORT={port}: something answers there that is no store" in done.stderr


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
