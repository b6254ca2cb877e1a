"""A rank that sends itself a signal at its n-th file-system call of a save."""

from __future__ import annotations

import builtins
import io
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.fuzz.plans import Fault


def strike_at_call(fault: Fault, below: Path, hit: Any) -> None:
    """Have this process send itself the signal at its n-th file-system call that changes something below a folder."""
    numbers = itertools.count(1)

    def strike(what: str) -> None:
        hit.value = what.encode()[:511]
        os.kill(os.getpid(), fault.sign)

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            path = where(args[0], options.get("dir_fd"))
            reads = name == "open" and not set("wax") & set(args[1] if len(args) > 1 else options.get("mode", "r"))
            if reads or not path.is_relative_to(below):
                return function(*args, **options)
            what = f"{name} {path.relative_to(below)}"
            if fault.at not in what or next(numbers) != fault.call:
                return function(*args, **options)
            what = f"{'after' if fault.after else 'before'} {what}"
            if not fault.after:
                strike(what)
            try:
                result = function(*args, **options)
            except FileNotFoundError:  # what was to be removed is not there
                if fault.after:
                    strike(what)
                raise
            if fault.after and name == "open":
                return Torn(result, lambda: strike(f"within {path.relative_to(below)}"))
            if fault.after:
                strike(what)
            return result

        return call

    for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
        setattr(os, name, watched(name, getattr(os, name)))
    # What Path.open calls, and what own_files does: two names of one function.
    io.open = builtins.open = watched("open", io.open)  # type: ignore[assignment]


def where(target: Any, folder: int | None) -> Path:
    """The path that a call is about: given as one, as a descriptor, or as a name within an open folder."""
    if isinstance(target, int):
        return Path(os.readlink(f"/proc/self/fd/{target}"))
    if folder is not None:
        return Path(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(target))
    return Path(os.path.abspath(target))


class Torn:
    """A file of which half of the first thing that is written reaches the disk."""

    def __init__(self, stream: Any, strike: Callable[[], None]) -> None:
        self.stream, self.strike = stream, strike

    def write(self, content: Any) -> int:
        strike, self.strike = self.strike, lambda: None
        half = len(content) // 2
        self.stream.write(content[:half])
        self.stream.flush()
        strike()
        self.stream.write(content[half:])  # the signal was one that can be survived
        return len(content)

    def __enter__(self) -> Torn:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
