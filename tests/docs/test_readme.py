"""Every command that the README shows runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.harness import ROOT, clean_environment, command
from tests.ranks.test_transfer import COMMANDS


def readme_commands() -> list[str]:
    """Every command of the README's console blocks; `#` starts a comment."""
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.join(shlex.split(line[2:], comments=True)) for line in lines if line.startswith("$ ")]


TRAINS = "-m recipes."
SHORT = ["max_steps=2", "data.augment=false"]  # a README command trains for a minute; that it starts and ends is tested

REAL = "python -m recipes.ddp"  # with the network that it says; in the other commands a narrow one stands for it
# The other commands that train are `slow`: their techniques have tests of their own, and so has torchrun
# (tests/ranks/test_start_paths.py).
QUICK = {"python -m recipes.ddp", "python -m recipes.ddp +cluster=lightning"}
# What goes together, or is minutes of work: test_verify.py and test_transfer.py in tests/ranks run the very same.
ELSEWHERE = {"python -m recipes.verify"} | {shlex.join(shlex.split(line)) for line in COMMANDS}


def test_the_commands_named_here_are_in_the_readme() -> None:
    assert set(readme_commands()) >= ELSEWHERE | QUICK


def is_long(line: str) -> bool:
    """Whether it is a minute's work also with two steps: many runs, or a plan of many rows."""
    return "recipes.compare" in line or "recipes.plan" in line


def readme_cases() -> list[Any]:
    lines = [line for line in readme_commands() if not line.startswith("make ") and line not in ELSEWHERE]
    trains = [TRAINS in line and "--help" not in line and "--cfg" not in line for line in lines]
    return [
        pytest.param(
            line, marks=[] if line in QUICK or not slow else pytest.mark.soak if is_long(line) else pytest.mark.slow
        )
        for line, slow in zip(lines, trains, strict=True)
    ]


@pytest.mark.parametrize("line", readme_cases())
def test_every_command_of_the_readme_runs(line: str, tmp_path: Path) -> None:
    words = [word.replace("task=examples/", f"task={ROOT}/examples/") for word in shlex.split(line)]
    if "task=" in line:  # its data are its own
        words.append(SHORT[0])
    elif TRAINS in line and "--help" not in words and "--cfg" not in words:
        words += SHORT[1:] if "profile=" in line else SHORT  # what is profiled must be less than the run
        words += ["tune.trials=2"] if "tune.trials=" in line else []  # each is a training
    if words[0] == "python":
        if TRAINS in line and line != REAL and "--help" not in words and "--cfg" not in words:
            words[1:2] = ["-m", "tests.helpers.quick"]
        done = command(*words[1:], cwd=tmp_path, timeout=240)
    else:
        if words[0] == "slurm/box":
            words[0] = str(ROOT / words[0])
        environment = clean_environment()
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # an activated environment
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
        )
    assert done.returncode == 0, done.stderr
    if line == REAL:  # without out= the folder is named by recipe and time, and the summary says so
        (run,) = (tmp_path / "outputs" / "ddp").iterdir()
        assert f"outputs/ddp/{run.name}" in done.stdout
        assert (run / "model.pt").is_file()


def test_the_readme_s_make_targets_exist() -> None:
    makes = [line.split()[1] for line in readme_commands() if line.startswith("make ")]
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test"} <= set(makes)
    for target in makes:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target
