"""Files that would run code when they are read: refused in one line, and nothing is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lockstep.checkpoint.dcp import read_metadata
from lockstep.checkpoint.directory import (
    fingerprint,
    folder_name,
    seal_manifest,
)
from lockstep.errors import UserError
from recipes import single
from tests.helpers.checkpointed_run import (
    RUN,
)
from tests.helpers.fuzz.starts import start


class Runs:
    """An object whose pickle runs a shell command when it is loaded."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def by_name(module: str, name: str, argument: str) -> bytes:
    """A protocol-4 pickle that calls `module.name(argument)`; there a name may have dots, which reach into modules."""

    def text(value: str) -> bytes:
        return pickle.SHORT_BINUNICODE + bytes([len(value.encode())]) + value.encode()

    return (
        pickle.PROTO
        + b"\x04"
        + text(module)
        + text(name)
        + pickle.STACK_GLOBAL
        + text(argument)
        + pickle.TUPLE1
        + pickle.REDUCE
        + pickle.STOP
    )


def with_payload(metadata: bytes, payload: Any) -> bytes:
    """The real description of the tensors, which has something else in its planner's data."""
    real = pickle.loads(metadata)
    real.planner_data = payload
    return pickle.dumps(real)


HOSTILE: dict[str, Callable[[bytes, str], bytes]] = {
    "a reduce": lambda _, command: pickle.dumps(Runs(command)),
    "within real metadata": lambda real, command: with_payload(real, Runs(command)),
    "os in torch's metadata module": lambda _, command: by_name(
        "torch.distributed.checkpoint.metadata", "os.system", command
    ),
    "os in torch": lambda _, command: by_name("torch.distributed.checkpoint.metadata", "torch.os.system", command),
    "a dtype's neighbour": lambda _, command: by_name("torch", "os.system", command),
    "eval": lambda _, command: by_name("builtins", "eval", f"__import__('os').system({command!r})"),
}


def rewrite(checkpoint: Path, content: bytes) -> None:
    """Put a .metadata into a checkpoint, and its hash into the manifest: nothing looks damaged."""
    (checkpoint / ".metadata").write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][".metadata"] = fingerprint(checkpoint / ".metadata")
    del manifest["seal"]
    (checkpoint / "manifest.json").write_text(seal_manifest(manifest))


@pytest.mark.parametrize("how", HOSTILE)
def test_metadata_that_would_run_code_does_not(how: str, finished: Path, tmp_path: Path) -> None:
    checkpoint, mark = tmp_path / folder_name(16), tmp_path / "mark"
    shutil.copytree(finished / "checkpoints" / folder_name(16), checkpoint)
    content = HOSTILE[how]((checkpoint / ".metadata").read_bytes(), f"touch {mark}")
    rewrite(checkpoint, content)
    with pytest.raises(UserError, match="refused"):
        read_metadata(checkpoint)
    assert not mark.exists()
    if how != "a dtype's neighbour":  # torch has no such name, so this one is harmless anywhere
        pickle.loads(content)
        assert mark.exists(), "or this would not have been a danger"


def test_a_run_whose_metadata_would_run_code_is_refused_in_one_line(cut_off: Path, tmp_path: Path) -> None:
    newest_one, mark = cut_off / "checkpoints" / folder_name(16), tmp_path / "mark"
    rewrite(newest_one, HOSTILE["within real metadata"]((newest_one / ".metadata").read_bytes(), f"touch {mark}"))
    ended = start(RUN, cut_off)
    assert ended.codes == [2, 2], ended.said
    errors = [line for line in ended.said.splitlines() if line]
    assert all(line.startswith("error: ") and "refused" in line and folder_name(16) in line for line in errors), errors
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["pickle", "zip", "whole model", "list", "text"])
def test_weights_that_would_run_code_are_refused_before_anything_starts(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """resume=FILE; a whole model's pickle is no attack, but to load it is to run what it names."""
    file, mark = tmp_path / "weights.pt", tmp_path / "mark"
    runs = Runs(f"touch {mark}")
    if kind == "pickle":
        file.write_bytes(pickle.dumps({"fc.weight": runs}))
    elif kind == "text":
        file.write_text("these are no weights")
    else:
        torch.save({"zip": {"fc.weight": runs}, "whole model": nn.Linear(2, 2), "list": [torch.zeros(1)]}[kind], file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["single", f"resume={file}", "out=run"])
    with pytest.raises(SystemExit) as leaving:
        single.train.main()
    said = capfd.readouterr()
    assert leaving.value.code == 2
    assert said.err.startswith(f"error: resume={file}: ")
    assert said.err.count("\n") == 1, said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["weights.pt"], (
        "nothing is created, least of all the mark"
    )
