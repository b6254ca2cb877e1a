"""stdin, stdout and stderr that never fail: a run is worth more than its words, which nobody may read, or only in ASCII.

A terminal window that is closed answers a write with EIO, `| head` with EPIPE, a full disk with ENOSPC; and where a
stream was closed before the start (`>&-`), the next file that a program opens gets its number and is written over.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import select
import sys
from typing import Any, TextIO

_REPLACED: list[Any] = []  # streams that are kept, for a stream that nobody holds closes its descriptor
WAIT_SECONDS = 5.0  # for a reader whose pipe is full and does not block
# What our own texts are written with, for a console whose encoding lacks it: LC_ALL=POSIX, a Latin-1 locale.
PLAIN = {"…": "...", "×": "x", "−": "-", "–": "-", "—": "-", "→": "->", "≥": ">=", "≤": "<=", "·": "*", "µ": "u"}
PLAIN |= {"▸": ">", "█": "M", "└": "+", "│": "|", "─": "-", "²": "^2", "ᵏ": "^k", "θ": "theta", "α": "alpha"}
ERASE_LINE = "\r\x1b[K"
_MEANWHILE: list[str] = []  # what `show_meanwhile` shows now
SPELLED = "lockstep.spelled"  # the name of `spell`, as an encoder's `errors`


def spell(error: UnicodeError) -> tuple[str | bytes, int]:
    """Have an encoder write what its encoding lacks in plain signs, and what has none as \\u escapes."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    spelled = (PLAIN.get(each) or each.encode("ascii", "backslashreplace").decode() for each in lacking)
    return "".join(spelled), error.end


codecs.register_error(SPELLED, spell)


class Unfailing(io.FileIO):
    """A file whose lost writes count as written."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)

    def write(self, data: Any, /) -> int:
        size = memoryview(data).nbytes
        try:
            written = super().write(data)
            if written is None and select.select([], [self], [], WAIT_SECONDS)[1]:
                written = super().write(data)
        except (OSError, ValueError):
            return size
        return size if written is None else written


def protect() -> None:
    """Make this process's standard streams unfailing, and give those that are closed a place to go.

    To be called before anything is opened. Streams that somebody has put in their place, as pytest does, stay.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(nowhere := os.open(os.devnull, os.O_RDWR), number)  # the lowest free number: often the same
            if nowhere != number:
                os.close(nowhere)
    sys.stdout = unfailing(sys.stdout, 1)
    sys.stderr = unfailing(sys.stderr, 2)


def unfailing(stream: TextIO | None, number: int) -> TextIO:
    """A stream to this descriptor, with what was set for the one that is there, which writes any text."""
    if stream is None:
        return io.TextIOWrapper(io.BufferedWriter(Unfailing(number)), "utf-8", SPELLED, line_buffering=True)
    if not isinstance(stream, io.TextIOWrapper) or isinstance(getattr(stream.buffer, "raw", None), Unfailing):
        return stream
    try:
        own = stream.fileno() == number
        stream.flush()
    except (OSError, ValueError):
        own = True
    if not own:
        return stream
    _REPLACED.append(stream)
    return io.TextIOWrapper(
        io.BufferedWriter(Unfailing(number)),
        stream.encoding,
        SPELLED,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def write_to(descriptor: int, text: str) -> None:
    """Write to a descriptor of a console, which may have gone."""
    with contextlib.suppress(OSError):
        os.write(descriptor, text.encode(errors="backslashreplace"))


def show_meanwhile(words: str) -> None:
    """Show on stderr, where it is a terminal, what is waited for; empty takes it away again.

    It has no line of its own: whatever is printed next is written over it.
    """
    if not (words or _MEANWHILE) or not sys.stderr.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        return
    sys.stderr.write(f"{ERASE_LINE}{words}\r" if words else ERASE_LINE)
    sys.stderr.flush()
    _MEANWHILE[:] = [words] if words else []
