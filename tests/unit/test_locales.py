"""A console or a locale whose encoding lacks signs of ours: it gets others, and no run ends for them."""

from __future__ import annotations

import ast
import io
import os
import sys
from pathlib import Path

import pytest

from lockstep.utils.places import folder
from lockstep.utils.standard_streams import PLAIN, unfailing
from recipes import ddp
from tests.helpers.command_line import run_main
from tests.helpers.harness import command

ASCII = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_a_stream_writes_what_its_encoding_lacks_in_plain_signs() -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as read, os.fdopen(writer, "wb", closefd=False) as raw:
        stream = unfailing(io.TextIOWrapper(io.BufferedWriter(raw), encoding="latin-1"), writer)
        stream.write("8 × 8 → 1…5 ünï 字 \udcff\n")
        stream.flush()
        os.close(writer)
        assert read.readline() == "8 × 8 -> 1...5 ünï \\u5b57 \\udcff\n".encode("latin-1")


@pytest.mark.parametrize("module", ["recipes", "recipes.ddp", "recipes.compare", "lockstep"])
def test_help_is_shown_in_any_locale(module: str, tmp_path: Path) -> None:
    done = command("-m", module, "--help", cwd=tmp_path, fresh=True, **ASCII)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    assert "\\u" not in done.stdout


def test_every_sign_that_is_printed_has_a_plain_one() -> None:
    """Of the texts in the code; of its docstrings a recipe's alone is shown."""
    lacking = {}
    recipes = folder("recipes")
    for file in [*recipes.parent.glob("src/**/*.py"), *recipes.glob("*.py"), *folder("launchers").glob("*.py")]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        shown = ast.get_docstring(tree) or "" if file.parent == recipes else ""
        for node in ast.walk(tree):  # docstrings are expressions
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = ""
        texts = [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        signs = {sign for sign in "".join([*texts, shown]) if not sign.isascii() and not "\ud800" <= sign <= "\udfff"}
        lacking |= dict.fromkeys(signs - set(PLAIN), file.name)
    assert not lacking


def test_a_word_that_is_no_text_gets_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_main(ddp.train, ["out=a\udcff"], monkeypatch) == 2
    encoding = sys.getfilesystemencoding()
    assert capfd.readouterr().err.startswith(rf"error: out=a\xff: is no text in this locale's encoding, {encoding}; ")
    assert list(tmp_path.iterdir()) == []
