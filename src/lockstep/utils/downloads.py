"""Downloads whose server may fall silent."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

DOWNLOAD_SECONDS = 30.0  # without an answer


@contextmanager
def answers_awaited(seconds: float = DOWNLOAD_SECONDS) -> Iterator[None]:
    """Within it a socket that is opened without a time-out of its own has this one; by itself Python waits for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
