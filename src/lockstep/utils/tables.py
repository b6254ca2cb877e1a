"""Tables that a terminal shows whole, however narrow it is; a file or a pipe gets those of 80 columns."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

NARROWEST = 40  # columns; a terminal that says it has fewer gets lines of so many
GAP = 2  # blanks between two columns


def terminal_tables(title: str, columns: dict[str, list[str]], text: Collection[str], repeated: int = 1) -> list[Table]:
    """Columns of cells (rich's markup) as a table, or as several where together they are wider than the terminal.

    Headings may break between words, so that a column is as narrow as its cells.

    Args:
        text: headings of the columns that are aligned to the left; the others hold numbers.
        repeated: so many columns say what a row is about, and come first in each table.
    """
    width = terminal_width()
    widths = {name: min(width // 2, natural_width(name, cells)) for name, cells in columns.items()}
    first, rest = list(columns)[:repeated], list(columns)[repeated:]
    tables: list[Table] = []
    while rest:
        names = [*first, rest.pop(0)]
        while rest and sum(GAP + widths[name] for name in (*names, rest[0])) - GAP <= width:
            names.append(rest.pop(0))
        table = empty_table(None if tables else title)
        for name in names:
            table.add_column(name, justify="left" if name in text else "right", width=widths[name], overflow="fold")
        for cells in zip(*(columns[name] for name in names), strict=True):
            table.add_row(*cells)
        tables.append(table)
    return tables


def folded_table(title: str, columns: Mapping[str, Sequence[str]], text: Collection[str]) -> Table:
    """Columns of plain cells as one table: texts are folded where the terminal is narrow, numbers are not.

    Args:
        text: headings of the columns that hold texts.
    """
    table = empty_table(title)
    for name in columns:
        folds = name in text
        table.add_column(name, justify="left" if folds else "right", no_wrap=not folds, overflow="fold")
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*map(escape, cells))
    return table


def empty_table(title: str | None) -> Table:
    """A table as all of ours look."""
    return Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, GAP - 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )


def natural_width(heading: str, cells: list[str]) -> int:
    lines = [line for cell in cells for line in Text.from_markup(cell).plain.splitlines()]
    return max(map(len, [*heading.split(), *lines]))


def terminal_width() -> int:
    """Columns of the terminal, or of COLUMNS; 80 where the output goes elsewhere."""
    return max(NARROWEST, shutil.get_terminal_size((80, 24)).columns)
