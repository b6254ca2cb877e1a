"""The commands that are printed to be typed again mean the same when they are pasted into bash."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lockstep.config.compose import compose
from lockstep.config.schema import Config
from lockstep.launch.cli import again
from lockstep.loggers.console import suggested_for
from lockstep.utils.text import interpreter
from recipes import ddp

NAMES = [
    "1e3",
    "010",
    "true",
    "a=b",
    "f(x",
    "[a]",
    "a,b",
    "ünï",
    "a#b",
    "it's",
    "a\\b",
    "two words",
    "$HOME",
    "!!",
    "a;b&c",
    "*",
]


def pasted(line: str) -> list[str]:
    """The words that a command gets from bash."""
    script = f"python() {{ printf '%s\\0' \"$@\"; }}\n{line}\n"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split("\0")[:-1]


def test_the_command_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kept = ["+task.hidden=4", "data.root='a b'", "optim.milestones=[1,2]", "logger=[csv,jsonl]"]
    for name in NAMES:
        monkeypatch.setattr(sys, "argv", ["ddp", *kept, f"out={name}", "seed=7"])
        words = pasted(again(ddp.train, tmp_path / name))
        assert words == ["-m", ddp.train.target, *kept, "seed=7", f"out={name}"], name
        monkeypatch.setattr(sys, "argv", ["ddp", words[-1], "seed=7"])
        found: list[Config] = []
        compose(ddp.train, found.append)
        assert [(each.out, each.seed) for each in found] == [(name, 7)]


def test_a_program_and_an_interpreter_with_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x"])
    assert pasted(again(replace(ddp.train, target="my files/own (1).py"), tmp_path / "run")) == [
        "my files/own (1).py",
        "out=run",
    ]
    program = tmp_path / "with spaces" / "python"
    program.parent.mkdir()
    program.symlink_to(shutil.which("echo") or "/bin/echo")
    monkeypatch.setattr(sys, "executable", str(program))
    done = subprocess.run(
        ["bash", "-c", f"{interpreter()} -m recipes.compare"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "-m recipes.compare\n"


def test_what_a_run_suggests_next_trains_the_same_task() -> None:
    single, experts = (
        "python -m recipes.single     to compare",
        "python -m recipes.ddp task=language task.experts=8     why",
    )
    assert suggested_for("images", single) == single
    assert suggested_for("language", single) == "python -m recipes.single task=language     to compare"
    assert suggested_for("language", experts) == experts
    mine = str(Path("mine.py").resolve())
    assert suggested_for(f"{mine}:Task", experts) == "python -m recipes.ddp task=mine.py:Task     why"
