"""recipes.verify's rows for people: a line while it works, and a table that fits 80 columns."""

from __future__ import annotations

from rich.table import Table

from lockstep.utils.tables import terminal_table
from lockstep.utils.text import count
from lockstep.verify.rows import COMPARED, VerifyRow

HEADINGS = {"loss": "loss", "gradients": "grads", "weights": "weights", "buffers": "buffers", "evaluation": "eval"}
STYLES = {"equal": "green", "OFF": "red"}


def progress_line(row: VerifyRow, number: int, total: int, seconds: float) -> str:
    weights = f", weights within {row.weights:.0e}" if row.verdict == "equal" and row.weights is not None else ""
    return f"{number:{len(str(total))}} of {total}: {row.label} in {row.precision}: {row.verdict}{weights} ({seconds:.0f} s)"


def verify_table(rows: list[VerifyRow]) -> Table:
    """A line per row; why one differs or was not run is in `verdict_notes`."""
    allowed = {row.precision: (row.steps, row.tolerance) for row in rows}
    limits = "; ".join(f"{limit:.0e} after {steps} steps in {name}" for name, (steps, limit) in allowed.items())
    title = f"each recipe against recipes.single, {count(rows[0].ranks, 'rank')}\nallowed: {limits}"
    table = terminal_table(title, ["recipe", "in", *HEADINGS.values(), "verdict"], left=("recipe", "in", "verdict"))
    for row in rows:
        figures = [(name, getattr(row, name)) for name in COMPARED]
        cells = [
            "" if figure is None else f"[red]{figure:.0e}[/]" if row.fails and name in row.verdict else f"{figure:.0e}"
            for name, figure in figures
        ]
        verdict = row.verdict.partition(":")[0]
        name = "\n  ".join([row.recipe, *row.variant.split()])
        table.add_row(name, row.precision, *cells, f"[{STYLES.get(verdict, 'yellow')}]{verdict}[/]")
    return table


def verdict_notes(rows: list[VerifyRow]) -> list[str]:
    """What a verdict's one word leaves out, each reason once."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if ":" in row.verdict:
            reasons.setdefault(row.verdict, []).append(f"{row.label} in {row.precision}")
    return [f"{verdict}  ({', '.join(names)})" for verdict, names in reasons.items()]
