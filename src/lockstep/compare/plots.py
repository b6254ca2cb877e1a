"""A comparison's plots: throughput, scaling, a step taken apart, memory; for light paper and for dark screens.

matplotlib is imported when the first one is drawn, and draws into memory (Agg): no display, no window.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lockstep.compare.figures import Row, percent
from lockstep.utils.text import mebibytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


WIDTH = 6.2  # inches, at DOTS an inch
DOTS = 150
MOST_BARS = 8  # of ranks; of more, the least and the most


@dataclass(frozen=True)
class Theme:
    """Colours that differ in brightness too, so that they are told apart in grey and by every eye."""

    surface: str
    ink: str
    muted: str
    grid: str
    parts: dict[str, str]
    lines: tuple[str, ...]


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
    """

    name: str
    title: str
    alt: str
    draw: Callable[[Axes, Theme], None]
    height: float

    def png(self, theme: Theme) -> bytes:
        return paint([self], theme, columns=1)


def plots(rows: list[Row]) -> list[Plot]:
    """Those for which there are figures."""
    bars = 1.15 + 0.36 * len(rows)
    found = [
        Plot(
            "throughput",
            "Throughput: images a second",
            "Bars. " + "; ".join(f"{row.label}: {row.images_per_second:,.0f} images/s" for row in rows),
            lambda axes, theme: throughput(axes, rows, theme),
            bars,
        )
    ]
    curves = scaled(rows)
    if curves:
        found.append(
            Plot(
                "scaling",
                "Scaling: speedup, the same global batch",
                "Lines, beside a dashed one for the ideal. "
                + "; ".join(
                    f"{name}: " + ", ".join(f"{speedup:.2f} × on {ranks}" for ranks, speedup in points)
                    for name, points in curves.recipes.items()
                ),
                lambda axes, theme: scaling(axes, curves, theme),
                max(3.4, min(5.0, bars)),
            )
        )
    if apart := [row for row in rows if row.parts]:
        found.append(
            Plot(
                "step",
                "A step taken apart: milliseconds",
                "Stacked bars. "
                + "; ".join(
                    f"{row.label}: " + ", ".join(f"{name} {1000 * part:,.1f} ms" for name, part in row.parts.items())
                    for row in apart
                ),
                lambda axes, theme: step(axes, apart, theme),
                1.45 + 0.36 * len(apart),
            )
        )
    if held := [row for row in rows if row.memory_bytes]:
        lines = sum(len(ends(row.memory_bytes)) for row in held)
        found.append(
            Plot(
                "memory",
                "Peak memory by rank: MiB",
                "Bars. "
                + "; ".join(
                    f"{row.label}: " + ", ".join(f"{mebibytes(size, 0)} MiB" for size in ends(row.memory_bytes))
                    for row in held
                ),
                lambda axes, theme: memory(axes, held, theme),
                1.45 + 0.2 * lines + 0.16 * len(held),
            )
        )
    return found


def overview(found: list[Plot], theme: Theme = LIGHT) -> bytes:
    """All of them in one picture, two beside each other."""
    return paint(found, theme, columns=min(2, len(found)))


def paint(found: list[Plot], theme: Theme, columns: int) -> bytes:
    """Plots as one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    lines = [found[first : first + columns] for first in range(0, len(found), columns)]
    heights = [max(plot.height for plot in line) for line in lines]
    figure = Figure((WIDTH * columns, sum(heights)), dpi=DOTS, facecolor=theme.surface, layout="constrained")
    grid = figure.add_gridspec(len(lines), columns, height_ratios=heights)
    for number, line in enumerate(lines):
        for place, plot in enumerate(line):
            axes = figure.add_subplot(grid[number, place])
            dress(axes, theme)
            plot.draw(axes, theme)
            axes.set_title(plot.title, loc="left", color=theme.ink, fontsize=11.5, fontweight="bold", pad=12)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    stream = io.BytesIO()
    picture.quantize(256, Image.Quantize.MAXCOVERAGE).save(
        stream, format="png", optimize=True
    )  # a third of the bytes, and nobody sees it
    return stream.getvalue()


def dress(axes: Any, theme: Theme) -> None:
    """What all have in common: no frame, quiet lines, text in the theme's ink."""
    axes.set_facecolor(theme.surface)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(colors=theme.muted, labelcolor=theme.ink, length=0, labelsize=9.5)
    axes.set_axisbelow(True)


def labelled(axes: Any, rows: list[Row], places: list[float], theme: Theme) -> None:
    """A row's name beside its bars, the first row on top, and lines to read the lengths by."""
    axes.set_yticks(places, [row.label for row in rows])
    axes.grid(axis="x", color=theme.grid, linewidth=0.9)
    axes.tick_params(axis="x", labelcolor=theme.muted)
    axes.invert_yaxis()


def throughput(axes: Any, rows: list[Row], theme: Theme) -> None:
    """Bars from 0; a whisker from the slowest round to the fastest."""
    places = list(map(float, range(len(rows))))
    speeds = [row.images_per_second for row in rows]
    axes.barh(places, speeds, height=0.62, color=theme.parts["compute"])
    several = any(row.rounds > 1 for row in rows)
    if several:
        whiskers = [[row.images_per_second - row.slowest for row in rows]]
        whiskers += [[row.fastest - row.images_per_second for row in rows]]
        axes.errorbar(speeds, places, xerr=whiskers, fmt="none", ecolor=theme.ink, elinewidth=1.3, capsize=3.5)
    for place, row in zip(places, rows, strict=True):
        words = f"{row.images_per_second:,.0f}" + (f"   {row.speedup:.2f} ×" if row.speedup is not None else "")
        at = max(row.images_per_second, row.fastest if several else 0)
        axes.annotate(
            words, (at, place), (7, 0), textcoords="offset points", va="center", color=theme.ink, fontsize=9.5
        )
    axes.set_xlim(0, max(row.fastest for row in rows) * 1.3)
    labelled(axes, rows, places, theme)


@dataclass(frozen=True)
class Curves:
    """By recipe, and for the ideal: (ranks, speedup)."""

    ideal: list[tuple[int, float]]
    recipes: dict[str, list[tuple[int, float]]]


def scaled(rows: list[Row]) -> Curves | None:
    """What was run on several numbers of ranks against a baseline; None where nothing was."""
    bases = {row.against for row in rows}
    ideal = {row.ranks: 1.0 for row in rows if row.label in bases}
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in dict.fromkeys(row.recipe for row in rows)}
    for row in rows:
        if row.speedup is not None and row.efficiency:
            found[row.recipe].append((row.ranks, row.speedup))
            ideal[row.ranks] = max(ideal.get(row.ranks, 0.0), row.speedup / row.efficiency)
        elif row.label in bases and row.recipe != "single":
            found[row.recipe].append((row.ranks, 1.0))
    if not any(len(points) > 1 for points in found.values()):
        return None
    return Curves(sorted(ideal.items()), {name: sorted(points) for name, points in found.items() if points})


def scaling(axes: Any, curves: Curves, theme: Theme) -> None:
    """A line a recipe, against the ideal."""
    axes.plot(*zip(*curves.ideal, strict=True), linestyle="--", color=theme.muted, linewidth=1.2, label="ideal")
    for number, (name, points) in enumerate(curves.recipes.items()):
        axes.plot(
            *zip(*points, strict=True),
            marker="osD^vPX*"[number % 8],
            markersize=5.5,
            linewidth=1.8,
            color=theme.lines[number % len(theme.lines)],
            label=name,
        )
    every = [ranks for ranks, _ in curves.ideal]
    axes.set_xticks(every, list(map(str, every)))
    axes.set_ylim(bottom=0)
    axes.grid(color=theme.grid, linewidth=0.9)
    axes.set_xlabel("ranks, or replicas", color=theme.muted, fontsize=9.5)
    legend = axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9.5)
    for text in legend.get_texts():
        text.set_color(theme.ink)


def step(axes: Any, rows: list[Row], theme: Theme) -> None:
    """Bars of the median step's length, in pieces."""
    places = list(map(float, range(len(rows))))
    ends = [0.0] * len(rows)
    for name, colour in theme.parts.items():
        lengths = [1000 * row.parts.get(name, 0.0) for row in rows]
        if any(lengths):
            axes.barh(places, lengths, height=0.62, left=ends, color=colour, label=name)
            ends = [end + length for end, length in zip(ends, lengths, strict=True)]
    for place, end, row in zip(places, ends, rows, strict=True):
        words = f"{end:,.0f}" if end >= 10 else f"{end:,.1f}"
        if len(row.parts) > 1:
            words += f"   {percent(row.parts['compute'] / row.step_seconds)} compute"
        axes.annotate(
            words,
            (end, place),
            (7, 0),
            textcoords="offset points",
            va="center",
            color=theme.ink,
            fontsize=9.5,
        )
    axes.set_xlim(0, max(ends) * 1.5)
    labelled(axes, rows, places, theme)
    below(axes, theme)


def memory(axes: Any, rows: list[Row], theme: Theme) -> None:
    """A thin bar a rank: its peak, and in it weights, gradients and optimizer."""
    middles, place = [], 0.0
    for row in rows:
        peaks, state = ends(row.memory_bytes), ends(row.state_bytes)
        places = [place + number * 0.5 for number in range(len(peaks))]
        axes.barh(places, [peak / 2**20 for peak in peaks], height=0.44, color=theme.parts["idle"])
        if len(state) == len(peaks):
            axes.barh(places, [size / 2**20 for size in state], height=0.44, color=theme.parts["compute"])
        words = f"{mebibytes(max(peaks), 0)}"
        if len(row.memory_bytes) > 1:
            words += f"   imbalance {row.memory_imbalance:.2f}"
        middles.append(sum(places) / len(places))
        axes.annotate(
            words,
            (max(peaks) / 2**20, middles[-1]),
            (7, 0),
            textcoords="offset points",
            va="center",
            color=theme.ink,
            fontsize=9.5,
        )
        place = places[-1] + 0.9
    axes.set_xlim(0, max(max(row.memory_bytes) for row in rows) / 2**20 * 1.6)
    labelled(axes, rows, middles, theme)
    axes.barh([middles[0]], [0], color=theme.parts["compute"], label="weights, gradients, optimizer")
    axes.barh([middles[0]], [0], color=theme.parts["idle"], label="all else, at the peak")
    below(axes, theme)


def ends(values: list[float]) -> list[float]:
    """One figure a rank; of many ranks, the least and the most."""
    return values if len(values) <= MOST_BARS else [min(values), max(values)]


def below(axes: Any, theme: Theme) -> None:
    """The legend, in a line below the bars."""
    from matplotlib.transforms import ScaledTranslation

    legend = axes.legend(
        loc="upper left",
        bbox_to_anchor=(0, 0),
        bbox_transform=axes.transAxes + ScaledTranslation(0, -0.36, axes.figure.dpi_scale_trans),
        ncols=2,
        frameon=False,
        fontsize=9.5,
        borderaxespad=0,
        borderpad=0,
        handlelength=1.1,
        columnspacing=1.4,
    )
    for text in legend.get_texts():
        text.set_color(theme.ink)
