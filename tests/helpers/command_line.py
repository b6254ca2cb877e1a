"""A recipe's command line within this process, for what ends before any rank is started."""

from __future__ import annotations

import sys

import pytest


def run_main(recipe, words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:  # type: ignore[no-untyped-def]
    """The exit code of `python -m recipes.NAME WORDS`, in this process: it ends before any rank is started."""
    monkeypatch.setattr(sys, "argv", [recipe.name, *words])
    with pytest.raises(SystemExit) as leaving:
        recipe.main()
    return int(leaving.value.code)  # type: ignore[arg-type]


def assert_one_line(capfd: pytest.CaptureFixture[str], parts: list[str]) -> None:
    """What was said is an error in one line, with these parts in it."""
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1, said.err
    for part in parts:
        assert part in said.err
