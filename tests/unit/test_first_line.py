"""A first line is on the screen soon: what takes seconds to load is loaded after it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lockstep.utils.standard_streams import ERASE_LINE
from tests.helpers.harness import ROOT, clean_environment, command

TOOLS = ("compare", "diff", "doctor", "plan", "tune", "verify")
SLOW_TO_LOAD = (
    *("torch._dynamo", "torch._inductor.compile_fx", "torch.distributed.tensor", "torch.distributed.fsdp"),
    *("torch.distributed.pipelining", "torchvision", "sklearn", "matplotlib", "lightning", "deepspeed", "transformers"),
)


def test_a_tool_does_not_load_what_only_its_ranks_need() -> None:
    loads = f"import {', '.join(f'recipes.{tool}' for tool in TOOLS)}, sys\nprint(*sys.modules)"
    done = command("-c", loads, fresh=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert {f"recipes.{tool}" for tool in TOOLS} <= loaded
    assert not loaded & set(SLOW_TO_LOAD)


def on_a_terminal(*words: str, path: str = "", **variables: str) -> str:
    """What a command writes to a terminal until it has ended."""
    screen, terminal = os.openpty()
    environment = clean_environment() | {"PYTHONPATH": f"{path}{ROOT}/src:{ROOT}", "TERM": "xterm", **variables}
    process = subprocess.Popen(
        [sys.executable, *words], stdin=terminal, stdout=terminal, stderr=terminal, cwd=ROOT, env=environment
    )
    os.close(terminal)
    shown = b""
    try:
        while data := os.read(screen, 65536):
            shown += data
    except OSError:  # the other end is closed
        pass
    finally:
        os.close(screen)
        process.wait(100)
    return shown.decode()


@pytest.mark.parametrize("name", [*TOOLS, "ddp"])
def test_a_terminal_shows_something_before_torch_is_loaded(name: str, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("import os\nprint('torch begins', flush=True)\nos._exit(3)\n")
    words = ["single", "ddp"] if name == "diff" else []
    shown = on_a_terminal("-m", f"recipes.{name}", *words, path=f"{tmp_path}:")
    assert shown == f"{ERASE_LINE}{name}: loading torch …\rtorch begins\r\n"
    if name == TOOLS[0]:
        plain = on_a_terminal("-m", f"recipes.{name}", *words, path=f"{tmp_path}:", TERM="dumb")
        assert plain == "torch begins\r\n"


def test_what_was_waited_for_is_taken_away_again(tmp_path: Path) -> None:
    shown = on_a_terminal("-m", "recipes.ddp", "max_steps=1", "data=synthetic", "nproc=2", f"out={tmp_path / 'run'}")
    before, banner, _ = shown.partition("ddp: 2 ranks on 1 host")
    assert banner
    assert before.split(ERASE_LINE) == ["", "ddp: loading torch …\r", "", "ddp: starting 2 ranks …\r", ""]
    assert shown.count(ERASE_LINE) == before.count(ERASE_LINE)
