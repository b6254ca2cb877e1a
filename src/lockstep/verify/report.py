"""recipes.verify's rows for people: a line while it works, and a table that fits 80 columns."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from lockstep.utils.tables import terminal_tables
from lockstep.utils.text import count
from lockstep.verify.rows import VerifyRow

HEADINGS = {"loss": "loss", "gradients": "grads", "weights": "weights", "buffers": "buffers", "evaluation": "eval"}
STYLES = {"equal": "green", "OFF": "red"}


def progress_line(row: VerifyRow, number: int, total: int, seconds: float) -> str:
    weights = f", weights within {row.weights:.0e}" if row.verdict == "equal" and row.weights is not None else ""
    return f"{number:{len(str(total))}} of {total}: {row.label} in {row.precision}: {row.verdict}{weights} ({seconds:.0f} s)"


def verify_tables(rows: list[VerifyRow]) -> list[Table]:
    """A line per row; why one differs or was not run is in `verdict_notes`."""
    against = " or ".join(dict.fromkeys(row.against for row in rows)) or "recipes.single"
    lines = [f"each recipe against {against}, {count(rows[0].ranks if rows else 0, 'rank')}", *allowed_lines(rows)]
    title = "\n".join(lines)
    columns = {
        "recipe": [escape("\n  ".join([row.recipe, *row.variant.split()])) for row in rows],
        "in": [row.precision for row in rows],
    }
    for name, heading in HEADINGS.items():
        columns[heading] = [figure_cell(row, name) for row in rows]
    words = [row.verdict.partition(":")[0] for row in rows]
    columns["verdict"] = [f"[{STYLES.get(word, 'yellow')}]{word}[/]" for word in words]
    return terminal_tables(title, columns, text=("recipe", "in", "verdict"))


def allowed_lines(rows: list[VerifyRow]) -> list[str]:
    """A line per precision: how large the numbers may be."""
    lines = []
    for precision in dict.fromkeys(row.precision for row in rows):
        own = [row for row in rows if row.precision == precision]
        limits = f"{own[0].tolerance:.0e}"
        if any(row.allowed for row in own):
            largest = {name: max(row.allows(name) for row in own if row.allowed) for name in HEADINGS}
            limits = ", ".join(f"{HEADINGS[name]} {limit:.0e}" for name, limit in largest.items())
            limits = f"at most {limits}" if len({str(row.allowed) for row in own}) > 1 else limits
        lines.append(f"allowed after {own[0].steps} steps in {precision}: {limits}")
    return lines


def figure_cell(row: VerifyRow, name: str) -> str:
    figure = getattr(row, name)
    if figure is None:
        return ""
    return f"[red]{figure:.0e}[/]" if row.fails and name in row.verdict else f"{figure:.0e}"


def verdict_notes(rows: list[VerifyRow]) -> list[str]:
    """What a verdict's one word leaves out, each reason once."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if ":" in row.verdict:
            first = f"; first at {row.first}" if row.fails and row.first else ""
            reasons.setdefault(row.verdict + first, []).append(f"{row.label} in {row.precision}")
    return [f"{verdict}  ({', '.join(names)})" for verdict, names in reasons.items()]
