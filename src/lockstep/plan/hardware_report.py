"""A measured profile as a file, as tables, and as the command that plans with it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from lockstep.plan.hardware import ACROSS, MEASURED_KINDS, PROFILE, Hardware
from lockstep.plan.report import gigabytes, millisecond_cell
from lockstep.run import Run
from lockstep.utils.files import write_atomically
from lockstep.utils.tables import terminal_tables
from lockstep.utils.text import count, short


def hardware_tables(hardware: Hardware) -> list[Table]:
    """What a rank achieves while all are at work, and its collectives inside a node and between nodes."""
    # On a CPU those of 16 bits are taken as fp32.
    own = [dtype for dtype in hardware.flops if hardware.device == "cuda" or dtype not in ("bf16", "fp16")]
    rates = {f"matrix products, {dtype}": f"{hardware.flops[dtype] / 1e12:,.3g} TFLOP/s" for dtype in own}
    rates["copies, read and written"] = f"{gigabytes(hardware.memory_bandwidth)}/s"
    rates["free memory"] = gigabytes(hardware.memory)
    columns = {"a rank's": list(rates), "measured": list(rates.values())}
    tables = terminal_tables("rates while all ranks are at work", columns, ("a rank's",))
    found = [(kind, place) for kind in MEASURED_KINDS for place in ("", ACROSS) if kind + place in hardware.measured]
    if not found:
        return tables
    curves = [hardware.measured[kind + place] for kind, place in found]
    sizes = [int(size) for size, _ in curves[0]]
    links = {
        "collective": [
            "" if number and found[number - 1][0] == kind else kind for number, (kind, _) in enumerate(found)
        ],
        "ranks of": ["all nodes" if place else "a node" for _, place in found],
    }
    for number in (0, len(sizes) // 2, len(sizes) - 1):
        links[f"{gigabytes(sizes[number])}, ms"] = [millisecond_cell(curve[number][1]) for curve in curves]
    return tables + terminal_tables("collectives by size", links, ("collective", "ranks of"))


def planning_command(hardware: Hardware, file: Path, words: Sequence[str] = ()) -> str:
    """What to type to plan with a profile.

    Args:
        words: further ones.
    """
    ranks = max(1, hardware.nodes) * hardware.per_node
    sized = [] if any(word.startswith("gpus=") for word in words) else [f"gpus={ranks}"]
    return f"python -m recipes.plan {shlex.join([*words, *sized, f'hardware={short(file)}'])}"


def make_profile(run: Run[Any], words: Sequence[str] = ()) -> None:
    """Measure the hardware, write its profile into the run's folder, and show it; all ranks call it together.

    Args:
        words: of the plan that is to be made with it.

    Raises:
        UserError: as `measure_hardware`.
    """
    from lockstep.plan.here import measure_hardware  # which loads all that ranks do

    hardware = measure_hardware(run.world, run.report.line)
    if run.world.rank == 0:
        write_atomically(run.out / PROFILE, hardware.as_yaml())
        run.report.console.print(*hardware_tables(hardware), sep="\n")
    where = f"{count(hardware.nodes, 'node')} of {count(hardware.per_node, 'rank')}"
    run.report.line(f"{hardware.name}, {where}: {short(run.out / PROFILE)}")
    run.report.line(f"to plan with it, anywhere:\n  {planning_command(hardware, run.out / PROFILE, words)}")
