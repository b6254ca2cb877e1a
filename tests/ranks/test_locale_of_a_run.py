"""A run in a locale that knows ASCII alone, in a folder whose name is no text in any."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers.harness import command

ASCII = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


@pytest.mark.slow
def test_a_run_ends_well_where_its_folder_s_name_is_no_text(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xfcn\xff")
    folder.mkdir()
    done = command("-m", "recipes.single", "max_steps=2", cwd=folder, fresh=True, **ASCII)
    assert done.returncode == 0, done.stderr
    assert "8 x 8 pixels" in done.stdout
    (log,) = folder.glob("outputs/single/*/ranks/0.log")
    assert "8 × 8 pixels" in log.read_text(encoding="utf-8")
