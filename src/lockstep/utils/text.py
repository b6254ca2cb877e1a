"""How numbers, paths and commands are put before a person."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

RANKS_LISTED = 8  # up to which each rank's number is written


def count(number: int, noun: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def interpreter() -> str:
    """What to type in a shell for `python`: this interpreter's path where the plain name is another one's."""
    return "python" if shutil.which("python") == sys.executable else shlex.quote(short(Path(sys.executable)))


def short(path: Path) -> str:
    """A path as a person would type it: relative to the working directory where it lies below it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def mebibytes(size: float, digits: int = 1) -> str:
    """Bytes in MiB, without the unit."""
    return f"{size / 2**20:,.{digits}f}"


def by_rank(sizes: list[int]) -> str:
    """Bytes as MiB, one number per rank; of many ranks the least and the most."""
    if len(sizes) > RANKS_LISTED and min(sizes) < max(sizes):
        return f"{mebibytes(min(sizes))} to {mebibytes(max(sizes))} on {len(sizes)} ranks"
    if len(sizes) > RANKS_LISTED:
        return f"{mebibytes(sizes[0])} on each of {len(sizes)} ranks"
    return ", ".join(map(mebibytes, sizes))


def divisors(number: int) -> str:
    """`1, 2, 3, 6`: what divides it, for a message that lists what is allowed."""
    return ", ".join(str(each) for each in range(1, number + 1) if number % each == 0)


def some_of(names: list[str], shown: int = 5, between: str = ", ") -> str:
    """`a, b`, or the first few and how many more."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return between.join(names[:shown]) + more


def worded(name: str, value: float) -> str:
    """A metric in words: `accuracy 98.89%`, `F1 0.9881`, `bits per token 1.214`."""
    label = name.replace("_", " ")
    if "accuracy" in name:
        return f"{label} {value:.2%}"
    return f"F1 {value:.4f}" if name == "f1" else f"{label} {value:.4g}"
