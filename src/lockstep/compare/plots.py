"""A comparison's plots: throughput, scaling, a step taken apart, memory; for light paper and for dark screens.

matplotlib is imported when the first one is drawn, and draws into memory (Agg): no display, no window.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lockstep.compare.figures import ComparisonRow
from lockstep.compare.tables import percent
from lockstep.utils.text import mebibytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT_WIDTH = 6.2  # inches
MOST_BARS = 8  # of ranks; of more, the least and the most
TEXT_SIZE = 9.5


@dataclass(frozen=True)
class Theme:
    """Colours that differ in brightness too, so that they are told apart in grey and by every eye."""

    surface: str
    ink: str
    muted: str
    grid: str
    parts: dict[str, str]
    lines: tuple[str, ...]

    def style(self) -> Any:
        """matplotlib's rcParams: no frame, quiet lines, text in the theme's ink."""
        return {
            "axes.axisbelow": True,
            "axes.edgecolor": "none",
            "axes.facecolor": self.surface,
            "axes.labelcolor": self.muted,
            "axes.labelsize": TEXT_SIZE,
            "axes.titlecolor": self.ink,
            "axes.titlelocation": "left",
            "axes.titlepad": 12,
            "axes.titlesize": 11.5,
            "axes.titleweight": "bold",
            "figure.dpi": 150,
            "figure.facecolor": self.surface,
            "font.size": TEXT_SIZE,
            "grid.color": self.grid,
            "grid.linewidth": 0.9,
            "legend.frameon": False,
            "legend.handlelength": 1.1,
            "legend.labelcolor": self.ink,
            "lines.linewidth": 1.8,
            "lines.markersize": 5.5,
            "text.color": self.ink,
            "xtick.labelcolor": self.muted,
            "xtick.major.size": 0,
            "ytick.labelcolor": self.ink,
            "ytick.major.size": 0,
        }


LIGHT = Theme(
    surface="#ffffff",
    ink="#1c232b",
    muted="#5a6673",
    grid="#e2e7ec",
    parts={
        "compute": "#2d6ca8",
        "exposed communication": "#e08a2e",
        "waiting for data": "#8455a8",
        "idle": "#c3ccd5",
    },
    lines=("#2d6ca8", "#c9661a", "#1f8a6a", "#8455a8", "#b5324f", "#6b7a1d", "#0f8fa3", "#7a5230"),
)
DARK = Theme(
    surface="#171c22",
    ink="#e8ecf1",
    muted="#9fabb8",
    grid="#2e3741",
    parts={
        "compute": "#5b9bdb",
        "exposed communication": "#f2a857",
        "waiting for data": "#b48bd8",
        "idle": "#56626f",
    },
    lines=("#6aa8e6", "#f0a35a", "#58c49e", "#bd97e0", "#ef7f99", "#b9c85a", "#5fc8da", "#c79a73"),
)


@dataclass(frozen=True)
class Plot:
    """One of them.

    Attributes:
        alt: what it shows, for who cannot see it.
        draw: onto axes, in a theme's colours.
        height: in inches.
        legend: where the subfigure's stands, in matplotlib's words; None: there is none.
    """

    name: str
    title: str
    alt: str
    draw: Callable[[Axes, Theme], None]
    height: float
    legend: str | None = None

    def png(self, theme: Theme) -> bytes:
        return draw_png([self], theme, columns=1)


def make_plots(rows: list[ComparisonRow]) -> list[Plot]:
    """Those for which there are figures."""
    if not rows:
        return []
    height = 1.15 + 0.36 * len(rows)
    plots = [
        Plot(
            "throughput",
            f"Throughput: {rows[0].unit} per second",
            "Bars. " + "; ".join(f"{row.label}: {row.samples_per_second:,.0f} {row.unit}/s" for row in rows),
            lambda axes, theme: draw_throughput(axes, rows, theme),
            height,
        )
    ]
    if curves := scaling_curves(rows):
        ideal, by_recipe = curves
        points = {name: ", ".join(f"{y:.2f} × on {x}" for x, y in points) for name, points in by_recipe.items()}
        plots.append(
            Plot(
                "scaling",
                "Scaling: speedup, the same global batch",
                "Lines, beside a dashed one for the ideal. " + "; ".join(map(": ".join, points.items())),
                lambda axes, theme: draw_scaling(axes, ideal, by_recipe, theme),
                max(3.4, min(5.0, height)),
                legend="outside right center",
            )
        )
    if apart := [row for row in rows if row.parts]:
        steps = {
            row.label: ", ".join(f"{name} {1000 * part:,.1f} ms" for name, part in row.parts.items()) for row in apart
        }
        plots.append(
            Plot(
                "step",
                "A step taken apart: milliseconds",
                "Stacked bars. " + "; ".join(map(": ".join, steps.items())),
                lambda axes, theme: draw_step(axes, apart, theme),
                1.45 + 0.36 * len(apart),
                legend="outside lower left",
            )
        )
    if held := [row for row in rows if row.memory_bytes]:
        peaks = {
            row.label: ", ".join(f"{mebibytes(size, 0)} MiB" for size in bar_values(row.memory_bytes)) for row in held
        }
        lines = sum(len(bar_values(row.memory_bytes)) for row in held)
        plots.append(
            Plot(
                "memory",
                "Peak memory by rank: MiB",
                "Bars. " + "; ".join(map(": ".join, peaks.items())),
                lambda axes, theme: draw_memory(axes, held, theme),
                1.45 + 0.2 * lines + 0.16 * len(held),
                legend="outside lower left",
            )
        )
    return plots


def draw_png(plots: list[Plot], theme: Theme = LIGHT, columns: int = 2) -> bytes:
    """Plots as one PNG, so many beside each other."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    columns = min(columns, len(plots))
    heights = [max(plot.height for plot in plots[i : i + columns]) for i in range(0, len(plots), columns)]
    with matplotlib.rc_context(theme.style()):
        figure = Figure((PLOT_WIDTH * columns, sum(heights)), layout="constrained")
        panels = figure.subfigures(len(heights), columns, squeeze=False, height_ratios=heights)
        for panel, plot in zip(panels.flat, plots, strict=False):
            axes = panel.subplots()
            plot.draw(axes, theme)
            axes.set_title(plot.title)
            if plot.legend:
                panel.legend(loc=plot.legend, ncols=1 if "right" in plot.legend else 2)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    stream = io.BytesIO()
    # A third of the bytes, and nobody sees it.
    picture = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")
    picture = picture.quantize(256, Image.Quantize.MAXCOVERAGE)
    picture.save(stream, format="png", optimize=True)
    return stream.getvalue()


def label_rows(axes: Any, rows: list[ComparisonRow], places: list[float]) -> None:
    """A row's name beside its bars, the first row on top, and lines to read the lengths by."""
    axes.set_yticks(places, [row.label for row in rows])
    axes.grid(axis="x")
    axes.invert_yaxis()


def draw_throughput(axes: Any, rows: list[ComparisonRow], theme: Theme) -> None:
    """Bars from 0; a whisker from the slowest round to the fastest."""
    places = list(map(float, range(len(rows))))
    speeds = [row.samples_per_second for row in rows]
    whiskers = None
    if any(row.rounds > 1 for row in rows):
        whiskers = [[row.samples_per_second - row.slowest for row in rows]]
        whiskers += [[row.fastest - row.samples_per_second for row in rows]]
    look = {"ecolor": theme.ink, "elinewidth": 1.3, "capsize": 3.5}
    bars = axes.barh(places, speeds, height=0.62, color=theme.parts["compute"], xerr=whiskers, error_kw=look)
    speedups = ["" if row.speedup is None else f"   {row.speedup:.2f} ×" for row in rows]
    axes.bar_label(bars, [f"{speed:,.0f}{more}" for speed, more in zip(speeds, speedups, strict=True)], padding=7)
    axes.set_xlim(0, max(row.fastest for row in rows) * 1.3)
    label_rows(axes, rows, places)


Points = list[tuple[int, float]]  # (ranks, speedup)


def scaling_curves(rows: list[ComparisonRow]) -> tuple[Points, dict[str, Points]] | None:
    """The ideal, and each recipe that was run on several numbers of ranks against a baseline; None where none was."""
    bases = {row.against for row in rows}
    ideal = {row.ranks: 1.0 for row in rows if row.label in bases}
    found: dict[str, Points] = {name: [] for name in dict.fromkeys(row.recipe for row in rows)}
    for row in rows:
        if row.speedup is not None and row.efficiency:
            found[row.recipe].append((row.ranks, row.speedup))
            ideal[row.ranks] = max(ideal.get(row.ranks, 0.0), row.speedup / row.efficiency)
        elif row.label in bases and row.recipe != "single":
            found[row.recipe].append((row.ranks, 1.0))
    if not any(len(points) > 1 for points in found.values()):
        return None
    return sorted(ideal.items()), {name: sorted(points) for name, points in found.items() if points}


def draw_scaling(axes: Any, ideal: Points, by_recipe: dict[str, Points], theme: Theme) -> None:
    """A line per recipe, against the ideal."""
    axes.plot(*zip(*ideal, strict=True), linestyle="--", color=theme.muted, linewidth=1.2, label="ideal")
    for number, (name, points) in enumerate(by_recipe.items()):
        colour = theme.lines[number % len(theme.lines)]
        axes.plot(*zip(*points, strict=True), marker="osD^vPX*"[number % 8], color=colour, label=name)
    axes.set_xticks([ranks for ranks, _ in ideal])
    axes.set_ylim(bottom=0)
    axes.grid()
    axes.set_xlabel("ranks, or replicas")


def draw_step(axes: Any, rows: list[ComparisonRow], theme: Theme) -> None:
    """Bars of the median step's length, in pieces."""
    places = list(map(float, range(len(rows))))
    ends = [0.0] * len(rows)
    for name, colour in theme.parts.items():
        lengths = [1000 * row.parts.get(name, 0.0) for row in rows]
        if any(lengths):
            bars = axes.barh(places, lengths, height=0.62, left=ends, color=colour, label=name)
            ends = [end + length for end, length in zip(ends, lengths, strict=True)]
    texts = [f"{end:,.{0 if end >= 10 else 1}f}" for end in ends]
    for number, row in enumerate(rows):
        if len(row.parts) > 1:
            texts[number] += f"   {percent(row.parts['compute'] / row.step_seconds)} compute"
    axes.bar_label(bars, texts, padding=7)
    axes.set_xlim(0, max(ends) * 1.5)
    label_rows(axes, rows, places)


def draw_memory(axes: Any, rows: list[ComparisonRow], theme: Theme) -> None:
    """A thin bar per rank: its peak, and in it weights, gradients and optimizer."""
    middles, place, names = [], 0.0, {"state": "weights, gradients, optimizer", "peak": "all else, at the peak"}
    for row in rows:
        peaks, state = bar_values(row.memory_bytes), bar_values(row.state_bytes)
        places = [place + number * 0.5 for number in range(len(peaks))]
        middles.append(sum(places) / len(places))
        for sizes, part, kind in ((peaks, "idle", "peak"), (state, "compute", "state")):
            if len(sizes) == len(peaks):
                label, lengths = names.pop(kind, None), [size / 2**20 for size in sizes]
                axes.barh(places, lengths, height=0.44, color=theme.parts[part], label=label)
        imbalance = f"   imbalance {row.memory_imbalance:.2f}" if len(row.memory_bytes) > 1 else ""
        end = (max(peaks) / 2**20, middles[-1])
        axes.annotate(f"{mebibytes(max(peaks), 0)}{imbalance}", end, (7, 0), textcoords="offset points", va="center")
        place = places[-1] + 0.9
    axes.set_xlim(0, max(max(row.memory_bytes) for row in rows) / 2**20 * 1.6)
    label_rows(axes, rows, middles)


def bar_values(values: list[float]) -> list[float]:
    """One figure per rank; of many ranks, the least and the most."""
    return values if len(values) <= MOST_BARS else [min(values), max(values)]
