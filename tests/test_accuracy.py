"""Every recipe learns: its documented command, as it stands, ends with 96 % of the digits or more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.harness import command

RECIPES = ["data_parallel", "deepspeed_zero", "fsdp", "grad_accumulation", "lightning_fabric", "lightning_trainer"]
RECIPES += ["model_parallel", "pipeline_parallel", "single", "sync_batchnorm"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_s_command_learns_the_digits(name: str, tmp_path: Path) -> None:
    done = command("-m", f"recipes.{name}", "out=run", cwd=tmp_path, timeout=580)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["eval_accuracy"] >= 0.96


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_main_job_learns_the_digits(tmp_path: Path) -> None:
    done = command("-m", "recipes.ddp", "out=run", cwd=tmp_path, timeout=580)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["eval_accuracy"] >= 0.97


def test_a_fifth_of_the_main_job_has_learned_most_of_it(tmp_path: Path) -> None:
    done = command("-m", "recipes.ddp", "epochs=3", "out=run", cwd=tmp_path, timeout=280)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["eval_accuracy"] >= 0.8
