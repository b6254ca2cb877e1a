"""Scaling curves as a table for a terminal of 80 columns, and as a drawing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from lockstep.errors import UserError
from lockstep.plan.report import gigabytes
from lockstep.plan.scaling import ScalingCurve
from lockstep.utils.tables import terminal_tables

SHOWN_COLUMNS = 7  # numbers of devices in the table, so that it fits
PICTURES = (".png", ".svg", ".pdf")


def curve_table(curves: Sequence[ScalingCurve], scaling: str) -> list[Table]:
    """Efficiency against the fewest devices, by their number; `over` where a rank's memory is too little."""
    every = sorted({point.ranks for curve in curves for point in curve.points})
    step = -(-len(every) // SHOWN_COLUMNS)
    shown = every[::-1][::step][::-1]
    columns = {"strategy": [curve.label.replace(" ", "\n  ") for curve in curves]}
    for ranks in shown:
        cells = []
        for curve in curves:
            point = next((each for each in curve.points if each.ranks == ranks), None)
            cells.append(
                "" if point is None else "over" if point.memory > curve.room else f"{curve.efficiency(point):.0%}"
            )
        columns[f"{ranks:,}"] = cells
    title = f"{scaling} scaling: samples per second and device, against {every[0]:,} devices"
    return terminal_tables(title, columns, ("strategy",))


def check_picture(file: str) -> Path:
    """The path of a picture that can be written.

    Raises:
        UserError: the file's name does not say which kind of picture, or its folder is not there.
    """
    path = Path(file).expanduser()
    if path.suffix not in PICTURES:
        raise UserError(f"plot={file}: the name must end with {', '.join(PICTURES)}")
    if not path.parent.is_dir():
        raise UserError(f"plot={file}: there is no folder {path.parent}; make it first")
    return path


def draw_curves(curves: Sequence[ScalingCurve], path: Path) -> None:
    """Speed by devices beside the ideal, and a bar of memory per strategy on the fewest devices."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    speed, memory = figure.subplots(1, 2, width_ratios=(3, 2))
    for number, curve in enumerate(curves):
        xs = [point.ranks for point in curve.points]
        speeds = [curve.efficiency(point) * point.ranks / xs[0] for point in curve.points]
        speed.plot(xs, speeds, marker="osD^vPX*"[number % 8], markersize=4, label=curve.label)
    ends = [min(c.points[0].ranks for c in curves), max(c.points[-1].ranks for c in curves)]
    speed.plot(ends, [1, ends[1] / ends[0]], "--", color="grey", linewidth=1, label="ideal")
    speed.set(xscale="log", yscale="log", xlabel="devices", ylabel="speed, × that on the fewest")
    speed.set_xscale("log", base=2)
    speed.legend(fontsize=7)
    names = [curve.label for curve in curves]
    held = [curve.points[0].memory / 1e9 for curve in curves]
    bars = memory.barh(range(len(curves)), held)
    memory.bar_label(bars, [gigabytes(each * 1e9) for each in held], fontsize=7, padding=3)
    memory.axvline(curves[0].room / 1e9, color="grey", linestyle="--", linewidth=1)
    memory.set_yticks(range(len(curves)), names, fontsize=7)
    memory.invert_yaxis()
    memory.set_xlabel("GB of a rank on the fewest devices; dashed: what there is")
    figure.savefig(path)
