"""What has changed between two runs of recipes.verify: the machine, verdicts, differences and times."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from lockstep.utils.tables import folded_table
from lockstep.verify.archive import facts_of, rows_of
from lockstep.verify.report import HEADINGS
from lockstep.verify.rows import COMPARED, VerifyRow


@dataclass
class Changes:
    """Attributes:
    facts: (what, then, now) of the machine and of what was trained.
    rows: a line for each row whose verdict or largest difference changed, or that only one run has.
    seconds: (row, precision, then, now) of each row that both ran.
    """

    facts: list[tuple[str, str, str]] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    seconds: list[tuple[str, str, float, float]] = field(default_factory=list)


def changes_between(before: dict[str, Any], now: dict[str, Any]) -> Changes:
    """What is not in `now` as it was in `before`, two records of archive.py."""
    then, today = facts_of(before), facts_of(now)
    found = Changes()
    for name in dict.fromkeys([*then, *today]):
        if then.get(name) != today.get(name):
            found.facts.append((name, then.get(name, "none"), today.get(name, "none")))
    old, new = ({row.key: row for row in rows_of(record)} for record in (before, now))
    # Another training's differences are other ones.
    same = all(then.get(name) == today.get(name) for name in ("model", "data", "global_batch_size", "ranks"))
    for key, row in new.items():
        if key not in old:
            found.rows.append(f"new: {spelled_row(row)}: {row.verdict}")
            continue
        earlier = old[key]
        if (word := row.verdict.partition(":")[0]) != (past := earlier.verdict.partition(":")[0]):
            found.rows.append(f"was {past}, is {word}: {spelled_row(row)}" + f": {row.verdict}" * (word != row.verdict))
        elif same and row.steps == earlier.steps and word == "equal":
            found.rows += growth_lines(earlier, row)
        if row.seconds and earlier.seconds:
            found.seconds.append((row.label, row.precision, earlier.seconds, row.seconds))
    found.rows += [
        f"missing: {spelled_row(row)}, which was {row.verdict}" for key, row in old.items() if key not in new
    ]
    return found


def spelled_row(row: VerifyRow) -> str:
    return f"{row.label} in {row.precision}" + f" ({row.settings})" * bool(row.settings)


def growth_lines(before: VerifyRow, now: VerifyRow) -> list[str]:
    """A line where the number that grew most, against what rounding explains, grew by more than that."""
    growth = {
        name: (getattr(now, name) - getattr(before, name)) / now.rounding(name)
        for name in COMPARED
        if getattr(now, name) is not None and getattr(before, name) is not None
    }
    name = max(growth, key=lambda each: growth[each], default="")
    if not name or growth[name] <= 1:
        return []
    then, today = getattr(before, name), getattr(now, name)
    return [
        f"grown: {spelled_row(now)}: {HEADINGS[name]} {then:.0e}, is {today:.0e}; rounding explains {now.rounding(name):.0e} more"
    ]


def change_parts(changes: Changes, file: str, date: str) -> list[str | Table]:
    """Lines and tables for people."""
    title = f"against {file} of {date}"
    parts: list[str | Table] = []
    if changes.facts:
        columns = zip(*changes.facts, strict=True)
        parts.append(
            folded_table(title, dict(zip(("what", "then", "now"), columns, strict=True)), ("what", "then", "now"))
        )
    else:
        parts.append(f"{title}: the machine, its versions and what is trained are the same")
    parts += changes.rows or ["no row is new, missing, off since, or further from its reference than rounding explains"]
    if changes.seconds:
        recipes, precisions, before, now = zip(*changes.seconds, strict=True)
        times = {
            "recipe": recipes,
            "in": precisions,
            "then (s)": [f"{value:.1f}" for value in before],
            "now (s)": [f"{value:.1f}" for value in now],
            "ratio": [f"{b / a:.2f}" for a, b in zip(before, now, strict=True)],
        }
        parts.append(folded_table("time per row", times, ("recipe", "in")))
    return parts
