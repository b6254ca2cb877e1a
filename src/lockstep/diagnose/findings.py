"""What a look at something came to: a row of a table, with a verdict, a figure and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rich.table import Table
from rich.text import Text

Verdict = Literal["ok", "warning", "fails"]
STYLES = {"ok": "green", "warning": "yellow", "fails": "red"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: what it is about, in a word.
        verdict: ok; warning: it works, but costs time or safety; fails: a run would fail, or has.
        figure: what was measured or seen, with units.
        remedy: what to do; empty where there is nothing to do.
    """

    check: str
    verdict: Verdict
    figure: str
    remedy: str = ""


def failed(found: Iterable[Finding]) -> list[str]:
    """The checks that fail, each once."""
    return list(dict.fromkeys(each.check for each in found if each.verdict == "fails"))


def table(found: Iterable[Finding], title: str) -> Table:
    """Findings for people; of several of one check the first has its name."""
    grid = Table(title=title, title_justify="left")
    for column in ("check", "verdict", "figure", "what to do"):
        grid.add_column(column, overflow="fold")
    before = ""
    for each in found:
        name = "" if each.check == before else each.check
        before = each.check
        # Text: a path or an error may hold what looks like markup.
        grid.add_row(name, Text(each.verdict, STYLES[each.verdict]), Text(each.figure), Text(each.remedy))
    return grid
