"""What a check has found: a row of a table, with a verdict, a figure and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from lockstep.utils.places import as_installed
from lockstep.utils.tables import empty_table

Verdict = Literal["ok", "warning", "fails"]
Facts = dict[str, Any]  # what a probe has found, or a run has left: plain values, as JSON has them
ALIKE_SHOWN = 4  # findings that differ in what they tell of alone
VERDICT_STYLES = {"ok": "green", "warning": "yellow", "fails": "red"}


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


def warning_if(check: str, bad: bool, figure: str, remedy: str) -> Finding:
    """A warning with its remedy, or else ok."""
    return Finding(check, "warning", figure, remedy) if bad else Finding(check, "ok", figure)


class Findings(list[Finding]):
    """Those of one check."""

    def __init__(self, check: str) -> None:
        super().__init__()
        self.check = check

    def ok(self, figure: str, remedy: str = "") -> None:
        self.append(Finding(self.check, "ok", figure, remedy))

    def warning(self, figure: str, remedy: str = "") -> None:
        self.append(Finding(self.check, "warning", figure, remedy))

    def fails(self, figure: str, remedy: str = "") -> None:
        self.append(Finding(self.check, "fails", figure, remedy))


def failed_checks(found: Iterable[Finding]) -> list[str]:
    """Each once."""
    return list(dict.fromkeys(each.check for each in found if each.verdict == "fails"))


def summarized(found: Iterable[Finding], file: str) -> list[Finding]:
    """The first few of those that only tell of another rank or host: a thousand ranks do not get a line each.

    Args:
        file: what has them all.
    """
    alike: dict[tuple[str, str, str], list[Finding]] = {}
    for each in found:
        alike.setdefault((each.check, each.verdict, each.remedy), []).append(each)
    few: list[Finding] = []
    for some in alike.values():
        few += some[:ALIKE_SHOWN]
        if len(some) > ALIKE_SHOWN:
            few.append(
                replace(some[0], figure=f"and {len(some) - ALIKE_SHOWN} more like it; {file} has all", remedy="")
            )
    order = list(dict.fromkeys(each.check for each in few))
    return sorted(few, key=lambda each: order.index(each.check))


def findings_table(found: Iterable[Finding], title: str) -> Table:
    """Findings for people; of several findings of one check the first shows its name."""
    table = empty_table(title)
    table.add_column("check", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("what was found, and what to do", overflow="fold")
    before = ""
    for each in found:
        name = "" if each.check == before else each.check
        before = each.check
        # Text: a path or an error may hold what looks like markup.
        told = Text(each.figure)
        if each.remedy:
            told.append(f"\n→ {as_installed(each.remedy)}", "bold")
        table.add_row(name, Text(each.verdict, VERDICT_STYLES[each.verdict]), told)
    return table
