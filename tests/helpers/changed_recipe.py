"""A recipe with a mistake in it, in the place of the sound one."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from tests.helpers.harness import ROOT


def put_changed_recipe(monkeypatch: pytest.MonkeyPatch, name: str, old: str, new: str, count: int = -1) -> None:
    """For this process and the ranks it forks; `count`: how many of the places are changed, -1: all."""
    path = ROOT / "recipes" / f"{name}.py"
    source = path.read_text()
    assert old in source, f"recipes/{name}.py has changed: the mutation would change nothing"
    spec = importlib.util.spec_from_file_location(f"lockstep.recipes.{name}", path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, f"lockstep.recipes.{name}", module)
    exec(compile(source.replace(old, new, count), str(path), "exec"), module.__dict__)
