"""Tab completes recipes and their keys in bash, before torch is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.harness import ROOT, clean_environment

ASKS = """
eval "$(python -m lockstep completion)"
complete -p python
COMP_LINE=$1
_lockstep_complete
printf '%s\\n' "${COMPREPLY[@]}"
"""


def completions(line: str) -> list[str]:
    """What bash is offered after Tab."""
    place = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}/src:{ROOT}",
    }
    done = subprocess.run(
        ["bash", "-c", ASKS, "bash", line], capture_output=True, text=True, timeout=100, env=clean_environment() | place
    )
    first, *found = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert "_lockstep_complete python" in first, "bash calls it after the word python"
    return found


@pytest.mark.parametrize(
    ("line", "some"),
    [
        ("python -m recipes.dd", ["recipes.ddp"]),
        ("python -m recipes.ddp optim=", ["optim=adamw", "optim=sgd"]),
        ("python -m recipes.fsdp epochs=3 repl", ["replicate="]),
        ("python -m recipes.ddp epochs=3 +cluster=s", ["+cluster=slurm"]),
        ("python train.py epo", []),
    ],
)
def test_words_are_completed(line: str, some: list[str]) -> None:
    found = [each for each in completions(line) if each]
    assert set(some) <= set(found)
    assert all(each.startswith(line.rpartition(" ")[2]) for each in found)
    assert bool(some) == bool(found)


def test_torch_is_not_loaded_for_it() -> None:
    looks = (
        "import runpy, sys; sys.argv = ['-m', '-sc', 'query=bash']; sys.orig_argv = ['python', '-m', 'recipes.ddp'];"
        "import os; leave = os._exit; os._exit = lambda code: leave(7 if 'torch' in sys.modules else code); import recipes"
    )
    done = subprocess.run(
        [sys.executable, "-c", looks],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        env=clean_environment() | {"COMP_LINE": "lockstep epo", "PYTHONPATH": f"{ROOT}/src:{ROOT}"},
    )
    assert (done.returncode, done.stdout.split()) == (0, ["epochs="]), done.stderr
