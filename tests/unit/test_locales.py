"""A console or a locale whose encoding lacks signs of ours: it gets others, and no run ends for them."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from lockstep.utils.standard_streams import unfailing
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


def test_a_word_that_is_no_text_gets_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_main(ddp.train, ["out=a\udcff"], monkeypatch) == 2
    encoding = sys.getfilesystemencoding()
    assert capfd.readouterr().err.startswith(rf"error: out=a\xff: is no text in this locale's encoding, {encoding}; ")
    assert list(tmp_path.iterdir()) == []
