"""A task of one's own and a recipe of one's own in the tools, as files in a folder that is no part of lockstep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recipes import verify
from tests.helpers.harness import command, execute

TASK = '''
"""A line to be fitted, and a recipe that trains it."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from lockstep import recipe
from lockstep.training.optim import build_optimizer, build_scheduler


@dataclass
class Line:
    hidden: int = 8
    norm: bool = False
    lower_is_better = ("mae",)

    def __post_init__(self):
        x = torch.randn(203, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        y = x.sum(1) + x[:, 0] * x[:, 1]
        self.train_set, self.eval_set = TensorDataset(x[:150], y[:150]), TensorDataset(x[150:], y[150:])

    def build_model(self):
        norm = [nn.BatchNorm1d(self.hidden)] if self.norm else []
        return nn.Sequential(nn.Linear(4, self.hidden), *norm, nn.Tanh(), nn.Linear(self.hidden, 1), nn.Flatten(0))

    def loss(self, outputs, targets):
        return mse_loss(outputs, targets)

    def metrics(self, outputs, targets):
        return {"mae": ((outputs - targets).abs().sum(), len(targets))}


@recipe(task=Line)
def train(run):
    model = DistributedDataParallel(run.place(run.task.build_model()))
    optimizer = build_optimizer(run.config.optim, model)
    scheduler = build_scheduler(run.config.optim, optimizer, run.scheduled_steps)
    for batch in run.steps(model=model, optimizer=optimizer, scheduler=scheduler):
        loss = run.task.loss(model(batch.inputs), batch.targets)
        loss.backward()
        run.record(loss=loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    train.main()
'''
ALONE = TASK.replace("DistributedDataParallel(run.place(run.task.build_model()))", "run.place(run.task.build_model())")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The task's file, which is a recipe as well."""
    file = tmp_path / "line.py"
    file.write_text(TASK)
    return file


def rows_of(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "verify.json").read_text())
    return found


def test_every_strategy_trains_a_task_of_ones_own_as_one_process_does(own: Path, tmp_path: Path) -> None:
    words = (f"task={own}:Line", "precision=fp64", "max_steps=3", "eval_batch_size=20")
    execute(verify.train, tmp_path / "run", 2, "recipes=[data_parallel,ddp,fsdp,pipeline_parallel]", *words)
    rows = rows_of(tmp_path / "run")
    assert [(row["recipe"], row["verdict"]) for row in rows] == [
        (name, "equal") for name in ("data_parallel", "ddp", "fsdp", "pipeline_parallel")
    ]
    assert all(row["weights"] <= 1e-10 and row["gradients"] <= 1e-10 for row in rows)


@pytest.mark.slow
def test_every_recipe_is_proven_or_says_why_not(own: Path, tmp_path: Path) -> None:
    done = command("-m", "recipes.verify", f"task={own}:Line", "out=run", cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rows of Line (hidden=8, norm=False) on TensorDataset" in done.stdout
    rows = rows_of(tmp_path / "run")
    assert {row["verdict"].partition(":")[0] for row in rows} == {"equal", "not run"}
    unable = [row for row in rows if row["verdict"] != "equal"]
    assert all("holds no BatchNorm" in row["verdict"] for row in unable)
    assert {row["recipe"] for row in unable} == {"lightning_fabric", "lightning_trainer", "sync_batchnorm"}


@pytest.mark.slow
def test_a_task_with_batch_norm_is_equal_where_it_is_synchronised_and_measured_elsewhere(
    own: Path, tmp_path: Path
) -> None:
    words = (f"task={own}:Line", "task.norm=true", "precision=fp64", "max_steps=3")
    execute(verify.train, tmp_path / "run", 2, "recipes=[ddp,sync_batchnorm]", *words)
    ddp, synchronised = rows_of(tmp_path / "run")
    assert ddp["verdict"] == "differs: BatchNorm normalises by each rank's share"
    assert ddp["loss"] > 1e-5
    assert synchronised["verdict"] == "equal"


def test_a_recipe_of_ones_own_is_proven_and_a_broken_one_named(own: Path, tmp_path: Path) -> None:
    (tmp_path / "alone.py").write_text(ALONE)
    words = (f"task={own}:Line", "precision=fp64", "max_steps=3")
    with pytest.raises(AssertionError, match=r"alone in fp64 \(step 1: the gradient of \S+, off by"):
        execute(verify.train, tmp_path / "run", 2, f"recipes=[{own},{tmp_path / 'alone.py'}]", *words)
    rows = rows_of(tmp_path / "run")
    assert [(row["recipe"], row["verdict"]) for row in rows] == [
        ("line", "equal"),
        ("alone", "OFF: loss, gradients, weights, evaluation"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "code"), [(TASK, 0), (ALONE, 1)])
def test_held_to_itself_on_one_rank(source: str, code: int, tmp_path: Path) -> None:
    """By its file's name alone: its task comes with it."""
    (tmp_path / "mine.py").write_text(source)
    words = ("recipes=[mine.py]", "against=self", "precision=fp64", "out=run")
    done = command("-m", "recipes.verify", *words, cwd=tmp_path, timeout=200)
    assert done.returncode == code, done.stdout + done.stderr
    assert "against itself on one rank" in done.stdout
    if code:
        assert "first at step 2: the loss" in done.stdout
        assert "mine in fp64 (step 2" in done.stderr


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("recipes=[none.py]", "none.py]: no such file"),
        ("recipes=[empty.py]", "the file holds 0 recipes; write @recipe above one function"),
        ("against=all", "against=all: allowed are single, self, and the FILE.py of a recipe"),
    ],
)
def test_what_is_no_recipe_is_said_in_a_line(word: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("nothing = 1\n")
    done = command("-m", "recipes.verify", word, "out=run", cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
