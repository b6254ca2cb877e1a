"""Tables that a terminal of 80 columns shows whole."""

from __future__ import annotations

from collections.abc import Collection

from rich import box
from rich.table import Table
from rich.text import Text

TERMINAL_WIDTH = 80
GAP = 2  # blanks between two columns


def terminal_tables(
    title: str, columns: dict[str, list[str]], text: Collection[str], repeated: int = 1, width: int = TERMINAL_WIDTH
) -> list[Table]:
    """Columns of cells (rich's markup) as a table, or as several where together they are wider than `width`.

    Headings may break between words, so that a column is as narrow as its cells.

    Args:
        text: headings of the columns that are aligned to the left; the others hold numbers.
        repeated: so many columns say what a row is about, and come first in each table.
    """
    widths = {name: column_width(name, cells) for name, cells in columns.items()}
    first, rest = list(columns)[:repeated], list(columns)[repeated:]
    tables: list[Table] = []
    while rest:
        names = [*first, rest.pop(0)]
        while rest and sum(GAP + widths[name] for name in (*names, rest[0])) - GAP <= width:
            names.append(rest.pop(0))
        table = Table(
            title=None if tables else title,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, GAP - 1, 0, 0),
            pad_edge=False,
            show_edge=False,
        )
        for name in names:
            table.add_column(name, justify="left" if name in text else "right", width=widths[name], overflow="fold")
        for cells in zip(*(columns[name] for name in names), strict=True):
            table.add_row(*cells)
        tables.append(table)
    return tables


def column_width(heading: str, cells: list[str]) -> int:
    lines = [line for cell in cells for line in Text.from_markup(cell).plain.splitlines()]
    return min(TERMINAL_WIDTH // 2, max(map(len, [*heading.split(), *lines])))
