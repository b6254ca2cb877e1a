"""A docstring of ours for a terminal: no line is longer than the terminal is wide, and nothing is left out."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator

OWN_LINE = ("Expect:", "Source:", "How:")  # they begin a paragraph of their own
HANGING = 32  # columns: what stands further to the right is put below what it is about


def reflow(text: str, width: int) -> str:
    """Paragraphs, lists (`- `) and indented entries (`    term   what it is`) in lines of so many columns.

    A block whose lines are short enough stays as it is, so a small table does. A command that is longer is continued behind
    a backslash, as a shell takes it.
    """
    return "\n\n".join("\n".join(reflowed(block.splitlines(), width)) for block in re.split(r"\n{2,}", text))


def reflowed(lines: list[str], width: int) -> Iterator[str]:
    """The lines of a block, none longer than `width` unless it is one word."""
    if all(len(line) <= width for line in lines):
        yield from lines
        return
    for piece in joined_pieces(lines):
        indent = len(piece) - len(piece.lstrip())
        if not indent:
            yield from filled_lines(piece, width, "", "  " if piece.startswith("- ") else "")
            continue
        term, gap, told = re.fullmatch(r"(\s*\S.*?)(?:(\s{2,})(\S.*))?", piece).groups(default="")  # type: ignore[union-attr]
        column = len(term) + len(gap)
        if told and column <= HANGING:
            yield from filled_lines(told, width, term + gap, " " * column)
            continue
        yield from continued_command(term, width, indent)
        if told:
            yield from filled_lines(told, width, *[" " * (indent + 4)] * 2)


def joined_pieces(lines: list[str]) -> Iterator[str]:
    """A block's paragraphs, list items and entries, each as one line; an entry's goes on further to the right."""
    piece = ""
    for line in lines:
        indent, before = len(line) - len(line.lstrip()), len(piece) - len(piece.lstrip())
        begins = line.startswith(("- ", *OWN_LINE)) or (indent <= before if before else indent > 2)
        if piece and (begins or (piece.startswith("- ") and not indent)):
            yield piece
            piece = ""
        joint = "   " if before and not has_gap(piece) else " "
        piece = f"{piece}{joint}{line.strip()}" if piece else line
    yield piece


def has_gap(piece: str) -> bool:
    """Whether an entry has a term and what it is, and not one of them alone."""
    return re.search(r"\S\s{2,}\S", piece) is not None


def filled_lines(text: str, width: int, first: str = "", others: str = "") -> list[str]:
    """Lines of so many columns; a fraction such as 1 / t is not broken."""
    lines = textwrap.wrap(
        text.replace(" / ", "\0/\0"),
        width,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace("\0", " ") for line in lines]


def continued_command(line: str, width: int, indent: int) -> Iterator[str]:
    """A command in lines that a shell takes for one; what is quoted stays in one piece."""
    words, made = re.findall(r"(?:'[^']*'|\S)+", line), " " * indent
    for number, word in enumerate(words):
        joint = " " if made.strip() else ""
        end = 0 if number == len(words) - 1 else 2  # room for the backslash
        if made.strip() and len(made + joint + word) > width - end:
            yield f"{made} \\"
            made, joint = " " * (indent + 8), ""
        made += joint + word
    yield made
