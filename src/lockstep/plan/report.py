"""A plan as tables for a terminal of 80 columns, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from lockstep.plan.estimate import ALLOCATOR, Estimate
from lockstep.plan.memory import PARTS
from lockstep.utils.tables import terminal_tables


def ranked(rows: Sequence[Estimate]) -> list[Estimate]:
    """Those that fit, the fastest first; then the others, the one that lacks least first."""
    fitting = sorted((row for row in rows if row.fits), key=lambda row: -row.samples_per_second)
    return fitting + sorted((row for row in rows if not row.fits), key=lambda row: row.needed)


def memory_cell_of(row: Estimate) -> str:
    """What a rank needs, and by how much that is too much."""
    lines = gigabytes(row.needed) + (f"\n{row.where}" if row.where else "")
    lines += f"\n{gigabytes(row.needed - row.room)}\nover" if row.needed > row.room else ""
    lines += f"\nhost:\n{gigabytes(row.host_memory)}" if row.host_memory else ""
    return lines + (f"\n{gigabytes(row.host_over)}\nover" if row.host_over else "")


def gigabytes(size: float) -> str:
    """`12.3 GB`, `45 MB`, `8 bytes`."""
    if size < 1e4:
        return f"{size:,.0f} bytes"
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.3g} MB"


def millisecond_cell(seconds: float) -> str:
    return f"{1e3 * seconds:,.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"


def speed_table(rows: Sequence[Estimate], title: str, unit: str) -> list[Table]:
    """Memory, time and what limits, a row each."""
    tokens = rows[0].tokens_per_second is not None
    rates = [row.tokens_per_second if tokens else row.samples_per_second for row in rows]
    columns = {
        "strategy": [row.label.replace(" ", "\n  ") for row in rows],
        "memory": [memory_cell_of(row) for row in rows],
        "step ms": [millisecond_cell(row.seconds) for row in rows],
        "tokens/s" if tokens else f"{unit}/s": [f"{rate or 0:,.0f}" for rate in rates],
        "MFU": ["" if row.mfu is None else f"{row.mfu:.0%}" for row in rows],
        "effi- ciency": ["" if row.efficiency is None else f"{row.efficiency:.0%}" for row in rows],
        "limited by": [row.limit.replace(" ", "\n") for row in rows],
    }
    return terminal_tables(title, columns, ("strategy", "limited by"))


PART_HEADINGS = dict(
    zip(PARTS, ("para- meters", "gradi- ents", "opti- mizer", "collec- tives", "acti- vations"), strict=True)
)


def memory_parts_table(rows: Sequence[Estimate]) -> list[Table]:
    """Where the memory goes; one unit for all, so that the parts fit beside each other."""
    unit, name = (1e9, "GB") if max(max(row.memory.values()) for row in rows) >= 1e9 else (1e6, "MB")
    columns = {"strategy": [row.label.replace(" ", "\n  ") for row in rows]}
    for part, heading in (PART_HEADINGS | {ALLOCATOR: "slack"}).items():
        columns[heading] = [f"{row.memory[part] / unit:,.3g}" if row.memory[part] else "" for row in rows]
    return terminal_tables(f"memory of a rank at the peak of a step, by part, in {name}", columns, ("strategy",))


def traffic_table(rows: Sequence[Estimate]) -> list[Table]:
    """Bytes and seconds of communication."""
    columns = {
        "strategy": [row.label.replace(" ", "\n  ") for row in rows],
        "collectives per step": [
            "\n".join(
                [f"{kind} {gigabytes(size)} {link}" for kind, link, size in row.traffic]
                + ([f"bubble {millisecond_cell(row.bubble)} ms"] if row.bubble else [])
            )
            or "none"
            for row in rows
        ],
        "a rank sends": [gigabytes(row.sent) if row.sent else "" for row in rows],
        "not hidden ms": [millisecond_cell(row.exposed) if row.exposed else "" for row in rows],
    }
    return terminal_tables(
        "bytes per step inside a node or between nodes; time that nothing hides",
        columns,
        ("strategy", "collectives per step"),
    )


def advice(rows: Sequence[Estimate]) -> list[str]:
    """The fastest that fits, as a command, and the two that come next."""
    fitting = [row for row in rows if row.fits]
    if not fitting:
        least = rows[0]
        if least.host_over and least.host_room:
            host = f"{gigabytes(least.host_memory)} of {gigabytes(least.host_room)}"
            return [f"nothing fits: {least.label} needs {host} of the host's memory per device; set more gpus"]
        return [
            f"nothing fits: {least.label} needs {gigabytes(least.needed)} of {gigabytes(least.room)}; set more gpus, a "
            "smaller global_batch_size, accumulate, or checkpoint_activations=full"
        ]
    best = fitting[0]
    lines = [f"fastest that fits: {best.label}, {best.hours:,.3g} device-hours{cost_of(best)}", f"  {best.command}"]
    for row in fitting[1:3]:
        slower = row.seconds / row.global_batch_size / (best.seconds / best.global_batch_size) - 1
        memory = row.needed - best.needed
        trade = f"{gigabytes(abs(memory))} {'more' if memory > 0 else 'less'} memory" if memory else "as much memory"
        lines.append(f"next: {row.label}, {slower:.0%} slower, {trade}{cost_of(row)}")
    return lines


def formula_line(rows: Sequence[Estimate]) -> str:
    """Whether the bytes that were counted are those of the formulas."""
    held = [row for row in rows if row.as_formula is not None]
    wrong = [row.label for row in held if not row.as_formula]
    if wrong:
        return f"bytes counted differ from the formula for {', '.join(wrong)}"
    return f"bytes counted equal the formula in {len(held)} of {len(held)} rows that have one" if held else ""


def cost_of(row: Estimate) -> str:
    return "" if row.cost is None else f", {row.cost:,.2f} in all"


def plan_facts(rows: Sequence[Estimate], left_out: Sequence[str], about: dict[str, Any]) -> dict[str, Any]:
    """For JSON."""
    return {**about, "rows": [row.facts() for row in rows], "left_out": list(left_out)}
