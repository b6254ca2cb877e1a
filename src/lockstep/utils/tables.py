"""Tables for a terminal of 80 columns: no frame, two blanks between columns."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from rich import box
from rich.table import Table


def terminal_table(title: str, headings: Iterable[str], left: Collection[str] = ()) -> Table:
    """An empty table; headings may break between words, so that a column is as narrow as its cells.

    Args:
        left: headings of the columns that hold text; the others are aligned to the right.
    """
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False
    )
    for heading in headings:
        text = heading in left
        options: dict[str, Any] = {"justify": "left" if text else "right", "overflow": "fold"}
        table.add_column(heading, min_width=None if text else max(map(len, heading.split())), **options)
    return table
