"""Promise 2: however the ranks are started on this machine, it is one run with one directory and the same weights."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from lockstep.distributed import host_memory
from recipes import ddp
from tests.helpers.examples import example
from tests.helpers.harness import ROOT, assert_equal, command, lines, train
from tests.helpers.processes import TORCHRUN, free_port, start_all

in_an_interpreter = partial(command, fresh=True)  # its start is what is tested
SMOKE = ["global_batch_size=24", "max_steps=3", "log_every=1"]


def by_python(out: Path, cwd: Path, nproc: int, *words: str) -> None:
    done = in_an_interpreter("-m", "recipes.ddp", *SMOKE, f"out={out}", f"nproc={nproc}", *words, cwd=cwd)
    assert done.returncode == 0, done.stderr


def by_interpreters(out: Path, cwd: Path, nproc: int) -> None:
    by_python(out, cwd, nproc, "start=spawn")  # what ranks on GPUs need; else they are copies of one process


def by_torchrun(out: Path, cwd: Path, nproc: int) -> None:
    words = [*TORCHRUN, f"--nproc-per-node={nproc}", f"--master-port={free_port()}"]
    start_all([[*words, "-m", "recipes.ddp", *SMOKE, f"out={out}"]], cwd)


def by_two_agents(out: Path, cwd: Path, nproc: int) -> None:
    words = [*TORCHRUN, "--nnodes=2", f"--nproc-per-node={nproc // 2}", "--rdzv-backend=c10d", "--rdzv-id=test"]
    words += [f"--rdzv-endpoint=127.0.0.1:{free_port()}", "-m", "recipes.ddp", *SMOKE, f"out={out}"]
    start_all([words, words], cwd)


def by_variables(out: Path, cwd: Path, nproc: int) -> None:
    shared = {"WORLD_SIZE": str(nproc), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = [sys.executable, "-m", "recipes.ddp", *SMOKE, f"out={out}"]
    start_all([words] * nproc, cwd, [shared | {"RANK": str(rank)} for rank in range(nproc)])


def by_mpirun(out: Path, cwd: Path, nproc: int) -> None:
    """The real one, of Open MPI."""
    words = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-np", str(nproc)]
    start_all([[*words, sys.executable, "-m", "recipes.ddp", *SMOKE, f"out={out}"]], cwd)


def by_the_old_launcher(out: Path, cwd: Path, nproc: int) -> None:
    """It adds --local-rank=N to each rank's words, as deepspeed's does."""
    words = [sys.executable, "-W", "ignore", "-m", "torch.distributed.launch", f"--nproc-per-node={nproc}"]
    start_all([[*words, f"--master-port={free_port()}", "-m", "recipes.ddp", *SMOKE, f"out={out}"]], cwd)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, torch.Tensor]]:
    """What forked ranks of the test harness make of the same config."""
    folder = tmp_path_factory.mktemp("reference")
    return {nproc: train(ddp.train, folder / str(nproc), nproc, *SMOKE) for nproc in (2, 4)}


@pytest.mark.slow_except("by_torchrun")  # `python -m` is how most other tests start theirs
@pytest.mark.soak_for("by_the_old_launcher", "by_two_agents", "by_interpreters")
@pytest.mark.parametrize(
    ("start", "nproc"),
    [
        (by_python, 2),
        (by_interpreters, 2),
        (by_torchrun, 2),
        (by_two_agents, 4),
        (by_variables, 2),
        (by_mpirun, 2),
        (by_the_old_launcher, 2),
    ],
)
def test_every_start_gives_the_same_run(start, nproc, weights, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "run"
    start(out, tmp_path, nproc)
    mine = torch.load(out / "model.pt", weights_only=True)
    assert all(torch.equal(mine[name], tensor) for name, tensor in weights[nproc].items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"], "one run directory, and nothing beside it"
    logs = {f"{rank}.log" for rank in range(nproc)}
    assert {path.name for path in (out / "ranks").iterdir()} == {"0.heartbeats", *logs}
    assert not [folder for folder in host_memory.folders(out / "ranks") if folder.exists()]
    assert json.loads((out / "result.json").read_text())["world_size"] == nproc
    share = max(1, len(os.sched_getaffinity(0)) // nproc)
    assert f"{share} thread" in (out / "ranks" / "1.log").read_text(), "no more threads than cores"


OWN = ["global_batch_size=30", "task.hidden=8", "max_steps=3", "log_every=1", "optim=adamw", "threads=1"]
FILE = "../project/tabular.py:Diabetes"  # from a folder beside it


PLAIN = """
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import TensorDataset


@dataclass
class Plain:
    hidden: int = 4

    def __post_init__(self):
        rows = torch.arange(120.0).view(60, 2) / 120
        self.train_set = TensorDataset(rows, rows.sum(1, keepdim=True))

    def build_model(self):
        return nn.Sequential(nn.Linear(2, self.hidden), nn.Linear(self.hidden, 1))

    def loss(self, outputs, targets):
        return nn.functional.mse_loss(outputs, targets)
"""


def own_words(task: str) -> list[str]:
    return ["-m", "recipes.ddp", f"task={task}", *OWN, "out=run"]


def own_by_python(cwd: Path, task: str, *words: str, **variables: str) -> None:
    done = in_an_interpreter(*own_words(task), "nproc=2", *words, cwd=cwd, **variables)
    assert done.returncode == 0, done.stderr


def own_by_torchrun(cwd: Path, task: str) -> None:
    start_all([[*TORCHRUN, "--nproc-per-node=2", f"--master-port={free_port()}", *own_words(task)]], cwd)


def own_by_variables(cwd: Path, task: str) -> None:
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    start_all([[sys.executable, *own_words(task)]] * 2, cwd, [shared | {"RANK": str(rank)} for rank in range(2)])


def python_path(cwd: Path) -> dict[str, str]:
    """The project on PYTHONPATH, as of a package that is not installed."""
    return {"PYTHONPATH": os.pathsep.join([str(cwd.parent / "project"), os.environ.get("PYTHONPATH", "")])}


OWN_STARTS: dict[str, Callable[[Path], None]] = {
    "spawn": lambda cwd: own_by_python(cwd, FILE, "start=spawn"),
    "torchrun": lambda cwd: own_by_torchrun(cwd, FILE),
    "variables": lambda cwd: own_by_variables(cwd, FILE),
    "lightning": lambda cwd: own_by_python(cwd, FILE, "+cluster=lightning"),
    "module here": lambda cwd: own_by_python(cwd, "package.own.tabular:Diabetes"),
    "module here by torchrun": lambda cwd: own_by_torchrun(cwd, "package.own.tabular:Diabetes"),
    "module on PYTHONPATH, spawned": lambda cwd: own_by_python(
        cwd, "elsewhere.tabular:Diabetes", "start=spawn", **python_path(cwd)
    ),
}


@pytest.fixture(scope="module")
def own_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the test harness's forked ranks make of the example in its place."""
    out = tmp_path_factory.mktemp("own") / "run"
    train(ddp.train, out, 2, f"task={example('tabular.py:Diabetes')}", *OWN)
    return out


@pytest.mark.slow
@pytest.mark.soak_for(
    "lightning", "module here", "module here by torchrun", "module on PYTHONPATH, spawned", "variables"
)
@pytest.mark.parametrize("start", OWN_STARTS)
def test_an_own_task_is_the_same_run_by_every_start_from_any_folder(start: str, own_run: Path, tmp_path: Path) -> None:
    source, here = ROOT / "examples" / "tabular.py", tmp_path / "here"
    for folder in (tmp_path / "project", tmp_path / "project" / "elsewhere", here / "package" / "own"):
        folder.mkdir(parents=True)
        shutil.copy(source, folder)
    OWN_STARTS[start](here)
    assert lines(here / "run") == lines(own_run)
    assert_equal(*(torch.load(out / "model.pt", weights_only=True) for out in (here / "run", own_run)))
    assert sorted(path.name for path in here.iterdir()) == ["package", "run"]


@pytest.mark.soak
def test_an_own_task_that_starts_no_thread_is_forked(tmp_path: Path) -> None:
    """`examples/tabular.py` imports scikit-learn, whose threads no copy of the process would have."""
    (tmp_path / "plain.py").write_text(PLAIN)
    words = ["task=plain.py:Plain", *OWN, "nproc=2"]
    for start in ("fork", "spawn"):
        done = in_an_interpreter("-m", "recipes.ddp", *words, f"start={start}", f"out={start}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert lines(tmp_path / "fork") == lines(tmp_path / "spawn")
    forked, spawned = (torch.load(tmp_path / start / "model.pt", weights_only=True) for start in ("fork", "spawn"))
    assert_equal(forked, spawned)
    done = in_an_interpreter(*own_words(example("tabular.py:Diabetes")), "nproc=2", "start=fork", cwd=tmp_path)
    assert done.returncode == 2
    assert "start=fork: task=Diabetes has started threads; set start=spawn" in done.stderr


@pytest.mark.slow
def test_a_sweep_over_tasks_is_one_run_a_task(tmp_path: Path) -> None:
    """Each with its own keys, in one command."""
    tasks = f"task={example('tabular.py:Diabetes')},{example('two_optimizers.py:Digits')}"
    words = ("task.hidden=8", "max_steps=2", "eval_every=0", "out=sweep")
    done = command("-m", "recipes.single", "-m", tasks, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / "sweep" / point / "result.json").read_text()) for point in ("0", "1")]
    assert [each["task"].rpartition(":")[2] for each in found] == ["Diabetes", "Digits"]
    assert ["eval_mae" in each for each in found] == [True, False]


@pytest.mark.slow
def test_a_script_of_ones_own_runs_without_a_yaml(tmp_path: Path) -> None:
    """A recipe copied into another project, under another name.

    It has computed something before: OpenMP's threads are not in a copy of the process that has them, whose next
    product would hang, so its ranks are interpreters of their own.
    """
    work = "import torch\n\n(torch.rand(3000, 3000) * 2).sum()\n\n"
    script = (ROOT / "recipes" / "ddp.py").read_text()
    (tmp_path / "mine.py").write_text(script.replace("if __name__", work + "if __name__"))
    done = in_an_interpreter("mine.py", *SMOKE, "out=run", "threads=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["recipe"] == "mine"


def test_a_conf_folder_where_the_user_stands_does_not_hide_ours(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "ddp.yaml").write_text("nonsense: true\n")
    done = command("-m", "recipes.ddp", "--cfg", "job", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "nonsense" not in done.stdout
