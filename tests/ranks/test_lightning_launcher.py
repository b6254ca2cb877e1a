"""`+cluster=lightning`: ranks that Lightning starts are those that torchrun starts, to the last bit and exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recipes import ddp
from tests.helpers import harness
from tests.helpers.command_line import run_main
from tests.helpers.harness import command, train
from tests.helpers.processes import as_a_shell, free_port, read, start_all, wait_until
from tests.ranks.test_failures import CRASHING, WORDS

TINY = ["data=synthetic", "data.size=48", "data.image_size=8", "global_batch_size=12", "log_every=1", "eval_every=0"]
LIGHTNING = ["-m", "recipes.ddp", "+cluster=lightning"]
FORK = [*LIGHTNING, "start=fork"]
SMOKE = [*TINY, "max_steps=2"]


def assert_equal(out: Path, theirs: dict[str, torch.Tensor]) -> None:
    harness.assert_equal(torch.load(out / "model.pt", weights_only=True), theirs)


def session(process: subprocess.Popen[str]) -> list[int]:
    """What is left of a process that leads a session, and of all that it has started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, leader = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(leader) == process.pid and state != "Z":
            found.append(int(entry.name))
    return found


# One command, one result ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_is_the_run_that_torchrun_starts(tmp_path: Path) -> None:
    words = [*LIGHTNING, "start=spawn", *SMOKE, "out=run"]
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"], "one run directory, and nothing beside it"
    out = tmp_path / "run"
    assert "cluster: null" in (out / "config.yaml").read_text(), "it can be continued anywhere"
    assert sorted(path.name for path in (out / "ranks").glob("*.log")) == [f"{rank}.log" for rank in range(2)]
    assert_equal(out, train(ddp.train, tmp_path / "reference", 2, *SMOKE))
    assert done.stdout.index("ddp: ") < done.stdout.index("ddp finished")


@pytest.mark.slow
def test_a_sweep_runs_once_a_point(tmp_path: Path) -> None:
    """Lightning's own launcher starts ranks by the words that were typed: each of them would sweep."""
    done = command(*FORK[:2], "-m", *FORK[2:], "optim.lr=0.01,0.02", *SMOKE, "out=sweep", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ddp finished") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"], "nothing of Hydra's beside it"
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["0", "1"]
    for point, rate in (("0", "lr: 0.01"), ("1", "lr: 0.02")):
        assert rate in (tmp_path / "sweep" / point / "config.yaml").read_text()
        assert json.loads((tmp_path / "sweep" / point / "result.json").read_text())["world_size"] == 2


@pytest.mark.soak
def test_several_machines_by_hand(tmp_path: Path) -> None:
    words = [sys.executable, *FORK, "cluster.nodes=2", "cluster.tasks_per_node=2", *SMOKE, "out=run"]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    start_all([words] * 2, tmp_path, [shared | {"NODE_RANK": node} for node in "01"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert_equal(tmp_path / "run", train(ddp.train, tmp_path / "reference", 4, *SMOKE))


# What breaks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "crash.py").write_text(CRASHING)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("raise", 1, "rank 1 failed on "),
        ("kill", 137, "rank 1 was killed by SIGKILL on "),
        ("forget", 2, "error: crash: no loss to log; call run.record(loss=loss) in every step"),
    ],
)
def test_the_rank_that_broke_is_shown_once(how: str, code: int, words: str, folder: Path) -> None:
    done = command("crash.py", *WORDS, "+cluster=lightning", "start=fork", cwd=folder, HOW=how)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(words)
    assert done.stderr.count("Traceback") == done.stderr.count("KeyError: 'the cause'") == (how == "raise")
    assert how == "raise" or done.stderr.count("\n") == 1, done.stderr
    assert json.loads((folder / "run" / "result.json").read_text())["status"] == "failed"


@pytest.mark.slow
def test_a_killed_rank_comes_back_as_often_as_asked(folder: Path) -> None:
    words = ["crash.py", *WORDS, "+cluster=lightning", "start=fork", "max_restarts=1"]
    done = command(*words, cwd=folder, HOW="exit")
    assert done.returncode == 7
    assert done.stderr.startswith("rank 1 ended with exit code 7")
    assert done.stderr.splitlines()[1::2] == ["restart 1 of max_restarts=1, from the newest checkpoint"], done.stderr


# Asked to leave ---------------------------------------------------------------------------------------------------


def begin(folder: Path, start: str) -> subprocess.Popen[str]:
    """A run that would take hours, with DataLoader workers."""
    words = [sys.executable, *LIGHTNING, f"start={start}", *TINY, "epochs=100000", "out=run", "data.workers=1"]
    return as_a_shell(words, folder, stderr=subprocess.PIPE)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["terminated", "Ctrl-C"])
@pytest.mark.slow
def test_asked_to_leave_the_ranks_save_and_leave(number: signal.Signals, tmp_path: Path) -> None:
    process = begin(tmp_path, "fork")
    wait_until(lambda: "step" in read(tmp_path / "run" / "metrics.jsonl"), 60)
    # Ctrl-C reaches all processes of a terminal at once.
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75, said
    assert said.startswith(f"{number.name}: leaving after this step")
    assert "to resume: python -m recipes.ddp +cluster=lightning" in said
    assert "Traceback" not in said
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "preempted"
    assert (tmp_path / "run" / "checkpoints" / "LATEST").is_file()
    wait_until(lambda: not session(process), 10)


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_process(tmp_path: Path) -> None:
    process = begin(tmp_path, "fork")
    wait_until(lambda: "step" in read(tmp_path / "run" / "metrics.jsonl"), 60)
    process.kill()
    process.communicate(timeout=10)
    wait_until(lambda: not session(process), 10)


@pytest.mark.slow
def test_ctrl_c_while_the_ranks_import_shows_no_traceback(tmp_path: Path) -> None:
    process = begin(tmp_path, "spawn")
    wait_until(lambda: len(session(process)) == 4, 60)  # the two ranks, and multiprocessing's resource tracker
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert "Traceback" not in said, said
    assert process.returncode in (75, 130), said
    wait_until(lambda: not session(process), 10)


# Refused ----------------------------------------------------------------------------------------------------------


def test_without_the_package_it_says_how_to_get_it(tmp_path: Path, monkeypatch, capfd) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.chdir(tmp_path)
    assert run_main(ddp.train, ["+cluster=lightning"], monkeypatch) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert all(part in said for part in ("needs the package lightning", "pip install '.[lightning]'")), said
    assert list(tmp_path.iterdir()) == [], "nothing may be created"
