"""`--help` fits a terminal of 80 columns, and leaves nothing out."""

from __future__ import annotations

import ast
import shlex

import pytest

from lockstep.utils.places import sources
from lockstep.utils.reflow import reflow

DOCS = {name: ast.get_docstring(tree) or "" for name, tree in sources("recipes").items()}


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("name", DOCS)
def test_a_recipe_s_text_fits_and_is_whole(name: str, width: int) -> None:
    shown = reflow(DOCS[name], width)
    wide = [line for line in shown.splitlines() if len(line) > width]
    assert all(len(line.split()) == 1 or "'" in line for line in wide), "an address, or what is quoted, is one word"
    assert " ".join(shown.replace(" \\\n", " ").split()) == " ".join(DOCS[name].split())


def test_a_command_is_one_for_the_shell_and_what_it_does_stands_below() -> None:
    typed = (
        "    python -m recipes.verify program='torchrun --nproc-per-node=2 train.py' against='python train.py'    yours"
    )
    shown = reflow(typed, 80).splitlines()
    assert shown[0].endswith(" \\")
    assert shown[-1] == " " * 8 + "yours"
    assert shlex.split("\n".join(shown[:-1]).replace("\\\n", "")) == shlex.split(typed)[:-1]


def test_lists_entries_and_paragraphs_keep_their_shape() -> None:
    told = "one two three " * 9
    shown = reflow(
        f"{told}\nSource: a\n\n- {told}\n  more\n- b\n\n    term     {told}\n    other    b\n\n    a   b\n    c   d", 60
    )
    paragraph, items, entries, table = (block.splitlines() for block in shown.split("\n\n"))
    assert paragraph[-1] == "Source: a"
    assert [line[:2] for line in items] == ["- ", "  ", "  ", "- "]
    assert [line.startswith(" " * 13) for line in entries] == [False, True, True, False]
    assert table == ["    a   b", "    c   d"], "what is short enough stays as it is"
