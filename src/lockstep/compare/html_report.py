"""A comparison as one HTML file that needs nothing else: pictures inside, no script, no font, no address of any host.

It opens from a file or an e-mail, follows the reader's light or dark scheme, prints on white, and on a telephone shows each
row of a table as a list. What it looks like is in report.html, a Jinja template; whatever comes from a config, a path
or an error is escaped.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from lockstep.compare.figures import ComparisonRow
from lockstep.compare.plots import DARK, LIGHT, Plot
from lockstep.compare.report import ComparisonReport
from lockstep.compare.tables import COLUMN_GROUPS, MEANINGS, heading, percent, text_columns, verify_columns
from lockstep.compare.verdicts import verdicts
from lockstep.utils.text import count, mebibytes


def html_report(report: ComparisonReport, plots: list[Plot]) -> str:
    """The whole file."""
    tables = {group: text_columns(columns, report.rows) for group, columns in COLUMN_GROUPS.items()}
    shown = {name for columns in tables.values() for name in columns}
    off = sum(row["verdict"].startswith("OFF") for row in report.verified)
    jinja = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    jinja.filters |= {
        "base64": lambda picture: base64.b64encode(picture).decode(),
        "transposed": lambda columns: zip(*columns, strict=True),
    }
    return jinja.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8")).render(
        report=report,
        verdicts=verdicts(report.rows),
        tiles=key_figures(report.rows),
        plots=plots,
        light=LIGHT,
        dark=DARK,
        tables={group: columns for group, columns in tables.items() if columns},
        meanings={known: said for name, said in MEANINGS.items() if (known := heading(name, report.rows)) in shown},
        verify_columns=verify_columns(report.verified),
        verify_caption=f"Relative differences from recipes.single: {count(off, 'row') if off else 'no row is'} off.",
        measured=method(report.rows),
        machine=machine(report.environment),
    )


def key_figures(rows: list[ComparisonRow]) -> list[tuple[str, str, str]]:
    """The few numbers that everyone asks for first: (what it is, number, whose)."""
    if not rows:
        return []
    best = max(rows, key=lambda row: row.samples_per_second)
    found = [("Fastest", f"{best.samples_per_second:,.0f} {best.unit}/s", best.label)]
    if against := [row for row in rows if row.speedup is not None]:
        top = max(against, key=lambda row: row.speedup or 0)
        found.append(
            (
                "Best speedup" if (top.speedup or 0) > 1 else "Best ratio",
                f"{top.speedup:.2f} ×",
                f"{top.label}, against {top.against}",
            )
        )
    if exposed := [row for row in rows if row.exposed_share and not row.idle_shares]:
        least = min(exposed, key=lambda row: row.exposed_share or 0)
        found.append(("Least exposed communication", f"{percent(least.exposed_share)} of a step", least.label))
    held = [row for row in rows if row.memory_bytes]
    if len(held) > 1:
        small = min(held, key=lambda row: max(row.memory_bytes))
        found.append(("Least memory per rank", f"{mebibytes(max(small.memory_bytes), 0)} MiB", small.label))
    return found


def method(rows: list[ComparisonRow]) -> list[str]:
    """How the figures were measured."""
    rounds = max((row.rounds for row in rows), default=0)
    bases = sorted({row.against for row in rows if row.against})
    return [
        f"Every recipe was started as a person would, {count(rounds, 'time')}, in turn with the others (one round after "
        "the other), with the same config.",
        f"Speedups are against {' and '.join(bases)}, by ratios within a round, so that drift meets both sides."
        if bases
        else "There is no row that the others could be set against: add single, or another nproc.",
        "Strong scaling: the global batch is the same whatever the number of ranks, so an efficiency of 100 % means that "
        "twice the devices train twice as fast.",
        "Speeds are global batch over the median step, without the warm-up; evaluations and checkpoints are no part of "
        "them. Communication is taken from a profile of a few steps of each run.",
        "A step taken apart: waiting for data, parts of a cut model that wait for each other (idle), exposed "
        "communication, and the rest, which is compute; means over the ranks.",
    ]


def machine(found: dict[str, Any]) -> dict[str, str]:
    """Hosts, processors and versions, as environment.json has them."""
    gpus = found.get("devices") or []
    memory, packages = found.get("memory_bytes"), found.get("versions", {})
    facts = {
        "host": ", ".join(dict.fromkeys(found.get("hosts", []))),
        "processor": f"{found.get('cpu', '')}, {count(found.get('cores', 0), 'core')} to use",
        "memory": f"{memory / 2**30:,.1f} GiB" if memory else "",
        "GPUs": ", ".join(f"{gpus.count(name)} × {name}" for name in dict.fromkeys(gpus)) or "none",
        "device": f"{found.get('device', '')}, {found.get('backend', '')}",
        "system": found.get("platform", ""),
        "python": found.get("python", ""),
        "packages": ", ".join(f"{name} {version}" for name, version in packages.items() if version != "not installed"),
        "CUDA": found.get("cuda") if gpus else "",
        "commit": found.get("git_commit") or "",
        "variables": ", ".join(f"{name}={value}" for name, value in found.get("environment", {}).items()),
    }
    return {name: str(value) for name, value in facts.items() if value}
