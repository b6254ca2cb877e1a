"""Files of a run directory, written so that a reader never sees half of one; and where other files are."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
from pathlib import Path
from typing import Any


def cache_folder(name: str) -> Path:
    """Where this user keeps what can be made again: $XDG_CACHE_HOME/lockstep/name, as a rule below ~/.cache.

    Source: https://specifications.freedesktop.org/basedir/latest/
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lockstep" / name


def write_atomically(path: Path, content: str | bytes | memoryview, durable: bool = True) -> None:
    """Write beside `path`, flush to disk, then rename: after a crash there is the old file or the new, never a part.

    Args:
        durable: whether to flush; without it this holds for a crash of the process, not of the host.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)  # of a killed process of this number; or somebody has guessed the name
        with temporary.open("xb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def save_atomically(path: Path, content: Any) -> None:
    """torch.save, as write_atomically writes."""
    import torch  # launchers use the other functions, and do without it

    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer())


def append(path: Path, text: str) -> None:
    """Add to a file, where its disk lets it, and it is no link."""
    with contextlib.suppress(OSError), open(path, "ab", opener=no_link) as stream:
        stream.write(text.encode(errors="backslashreplace"))


def no_link(path: str | os.PathLike[str], flags: int) -> int:
    """An opener for `open`: where there is a link it raises OSError and does not follow it."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def sync_folder(path: Path) -> None:
    """Flush a folder's list of names to disk: without it a crash can forget a rename."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is none, or not all of it."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def modified_at(path: Path) -> float:
    """When a file was last written, in seconds since 1970; 0 where there is none."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def is_locked(path: Path) -> bool:
    """Whether another process, here or on another host, holds a POSIX lock on a file."""
    try:
        with path.open("r+", encoding="utf-8") as stream:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False
