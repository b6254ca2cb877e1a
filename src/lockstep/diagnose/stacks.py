"""A rank's stack file, ranks/<rank>.stack, and where in the user's code a stack is. No torch in here: launchers use it.

faulthandler writes into the file when the process crashes, the watchdog when the rank has waited too long for others,
or is asked where it is.
"""

from __future__ import annotations

import contextlib
import linecache
import os
import re
from pathlib import Path

LOCKSTEP = str(Path(__file__).parents[1]) + os.sep
LAUNCH = os.path.join(LOCKSTEP, "launch", "")  # frames outside of its calls have only started the rank
RECIPES = os.path.join(LOCKSTEP, "recipes", "")  # where an installed wheel has them
LIBRARIES = (LOCKSTEP, "<", os.path.dirname(os.__file__) + os.sep)
VERDICT_MARK = "the verdict: "  # before it, in a stack file

Frame = tuple[str, int]  # file and line


def has_content(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.stat().st_size > 0
    return False


def keep_stack(folder: Path, rank: int) -> None:
    """Rename what an earlier attempt left in ranks/<rank>.stack to <rank>.stack.1, 2, ...: this attempt writes anew."""
    old = folder / f"{rank}.stack"
    if has_content(old):
        number = 1
        while (kept := old.with_name(f"{old.name}.{number}")).exists():
            number += 1
        old.rename(kept)


# What torch's libraries write before they abort a process, in a rank's log: what it means.
ABORTS = {
    r"op\.preamble\.length|preamble\.nbytes": "in a collective of another size than the others'",  # gloo
    r"collective operation timeout|NCCL operation timed out": "ended by NCCL, which had waited too long",
    r"Watchdog caught exception|entire process down|watchdog thread terminated": "ended by NCCL after an error",
}


def crash_place(stack: Path) -> str:
    """The place of a crash that a stack file tells of; empty where it tells of none.

    faulthandler lists the threads' frames from the innermost outwards, and the main thread last. Why a process was
    aborted stands in the rank's log beside the stack file; rank 0's is the console.
    """
    try:
        text = stack.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    cause = re.search(r"^Fatal Python error: (.+)", text, re.MULTILINE)
    blocks = re.split(r"^(?:Current thread|Thread) .*\n", text[cause.start() :] if cause else "", flags=re.MULTILINE)
    frames = re.findall(r'^  File "(.+)", line (\d+) in \S+', blocks[-1], re.MULTILINE)
    if not cause or not frames:
        return ""
    log = read_end(stack.with_suffix(".log")) if cause[1] == "Aborted" else ""
    said = next((meaning for sign, meaning in ABORTS.items() if re.search(sign, log)), cause[1])
    return f"{user_line([(file, int(line)) for file, line in reversed(frames)])}, {said}"


def read_end(path: Path, most: int = 2**16) -> str:
    """The last bytes of a file as text; nothing of one that is not there."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - most))
        return file.read().decode(errors="replace")
    return ""


def user_line(frames: list[Frame]) -> str:
    """The innermost line of the user's code in a stack, as `loss.backward() (ddp.py:50)`; else of lockstep's.

    Args:
        frames: the innermost last.
    """
    starts = [number for number, (file, _) in enumerate(frames) if file.startswith(LAUNCH)]
    inside = frames[starts[-1] + 1 :] if starts else frames
    users = [frame for frame in inside if not is_library(frame[0])]
    known = users or [frame for frame in inside if frame[0].startswith(LOCKSTEP)] or frames[-1:]
    return source_line(*known[-1]) if known else "nowhere"


def source_line(file: str, line: int) -> str:
    """`loss.backward() (ddp.py:50)`"""
    text, place = linecache.getline(file, line).strip(), f"{os.path.basename(file)}:{line}"
    return f"{text} ({place})" if text else place


def is_library(file: str) -> bool:
    """Whether a file is lockstep's, Python's or a package's, and neither a recipe nor the user's own."""
    return not file.startswith(RECIPES) and (file.startswith(LIBRARIES) or f"{os.sep}site-packages{os.sep}" in file)
