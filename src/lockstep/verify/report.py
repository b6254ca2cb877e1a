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
    allowed = {row.precision: (row.steps, row.tolerance) for row in rows}
    limits = "; ".join(f"{limit:.0e} after {steps} steps in {name}" for name, (steps, limit) in allowed.items())
    against = " or ".join(dict.fromkeys(row.against for row in rows)) or "recipes.single"
    title = f"each recipe against {against}, {count(rows[0].ranks if rows else 0, 'rank')}\nallowed: {limits}"
    columns = {
        "recipe": [escape("\n  ".join([row.recipe, *row.variant.split()])) for row in rows],
        "in": [row.precision for row in rows],
    }
    for name, heading in HEADINGS.items():
        columns[heading] = [figure_cell(row, name) for row in rows]
    words = [row.verdict.partition(":")[0] for row in rows]
    columns["verdict"] = [f"[{STYLES.get(word, 'yellow')}]{word}[/]" for word in words]
    return terminal_tables(title, columns, text=("recipe", "in", "verdict"))


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
