"""A technique is one file: a recipe of one's own, in a folder of its own, with keys of its own and no YAML."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.harness import ROOT, command

TECHNIQUE = '''"""Gradient noise: Gaussian noise on the gradients, less of it with every step."""

from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from lockstep import Run, recipe
from lockstep.config.keys import key
from lockstep.config.schema import Config
from lockstep.models.resnet import build_model


@dataclass
class NoiseConfig(Config):
    noise: float = key(0.01, "standard deviation of the noise in the first step", minimum=0)
    decay: str = key("sqrt", "how it falls with the steps", ("none", "sqrt"))


@recipe(config=NoiseConfig, ranks=1)
def train(run: Run[NoiseConfig]) -> None:
    model = run.place(build_model(run.config.model))
    optimizer = torch.optim.SGD(model.parameters(), lr=run.config.optim.lr)
    for step, batch in enumerate(run.steps(model=model, optimizer=optimizer)):
        loss = cross_entropy(model(batch.inputs), batch.targets)
        loss.backward()
        run.record(loss=loss)
        scale = run.config.noise / (step + 1) ** (0.5 if run.config.decay == "sqrt" else 0)
        for parameter in model.parameters():
            parameter.grad += scale * torch.randn_like(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
    run.note("", noise=run.config.noise)


if __name__ == "__main__":
    train.main()
'''
SHORT = ["max_steps=2", "global_batch_size=12", "eval_every=0", "out=run"]


def test_a_technique_is_one_file(tmp_path: Path) -> None:
    (tmp_path / "gradient_noise.py").write_text(TECHNIQUE)
    said = command("gradient_noise.py", "--help", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert "Of recipes.gradient_noise alone:" in said.stdout
    assert "noise=0.01" in said.stdout
    done = command("gradient_noise.py", *SHORT, "noise=0.5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["noise"] == 0.5
    assert "noise: 0.5" in (tmp_path / "run" / "config.yaml").read_text()
    other = command("gradient_noise.py", *SHORT, "noise=0.4", cwd=tmp_path)  # another training, in the same folder
    assert other.returncode == 2
    assert "noise=0.4 (there: 0.5)" in other.stderr


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("noise=-1", "noise=-1.0: allowed are numbers from 0 up"),
        ("decay=cubic", "decay=cubic: allowed are none, sqrt"),
        ("noize=1", "unknown key noize; did you mean noise?"),
        ("noise=loud", "noise=loud: "),
    ],
)
def test_its_keys_are_checked_like_any_other(word: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "gradient_noise.py").write_text(TECHNIQUE)
    said = command("gradient_noise.py", word, cwd=tmp_path)
    assert (said.returncode, said.stderr.count("\n")) == (2, 1), said.stderr
    assert said.stderr.startswith(f"error: {line}")
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["gradient_noise.py"]


def test_a_broken_file_beside_it_does_not_replace_the_answer(tmp_path: Path) -> None:
    (tmp_path / "gradient_noise.py").write_text(TECHNIQUE)
    (tmp_path / "draft.py").write_text("def half a line")
    (tmp_path / "latin.py").write_bytes(b"name = '\xe9'")
    said = command("gradient_noise.py", "noize=1", cwd=tmp_path)
    assert said.stderr == "error: unknown key noize; did you mean noise? --help all lists all keys\n"


def test_among_the_recipes_it_is_listed_verified_and_named_as_the_owner_of_its_keys(tmp_path: Path) -> None:
    """The folder of the recipes with one file more; nothing else is touched."""
    for folder in ("recipes", "conf", "launchers", "src"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "recipes" / "gradient_noise.py").write_text(TECHNIQUE)
    here = {"PYTHONPATH": f"{tmp_path / 'src'}:{tmp_path}"}
    listed = command("-m", "recipes", cwd=tmp_path, fresh=True, **here)
    assert "gradient_noise" in listed.stdout
    refused = command("-m", "recipes.single", "noise=1", cwd=tmp_path, fresh=True, **here)
    assert refused.stderr == ("error: noise=1: recipes.single does not use it; it belongs to recipes.gradient_noise\n")
    said = command("-m", "recipes.gradient_noise", "--help", cwd=tmp_path, fresh=True, **here)
    assert "noise=0.01" in said.stdout


@pytest.mark.parametrize("word", ["--help", "globl_batch_size=3", "optim.lr=fast", "comm=bf17"])
def test_questions_and_mistakes_are_answered_without_loading_torch(word: str, tmp_path: Path) -> None:
    said = command("-X", "importtime", "-m", "recipes.ddp", word, fresh=True, PYTHONPATH=f"{ROOT / 'src'}:{ROOT}")
    assert said.returncode == (0 if word == "--help" else 2)
    loaded = {line.rpartition("|")[2].strip() for line in said.stderr.splitlines() if line.startswith("import time:")}
    assert "lockstep.launch.early" in loaded
    assert "torch" not in loaded
