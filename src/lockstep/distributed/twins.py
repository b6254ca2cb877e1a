"""Processes that take themselves for the same rank: RANK was exported once for all of them, in a script or a shell."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from lockstep.errors import UserError
from lockstep.utils.system import stat_fields
from lockstep.utils.text import some_of

PLACE = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_RESTART_COUNT")
TOGETHER_SECONDS = 60.0  # between the starts of one command's processes; an earlier start's may still be ending
LOOK_SECONDS = 0.5  # between two looks
STAY_SECONDS = 20.0  # at most, that who has found another one waits for it to find this one
FOUND = "found a twin"  # the name that the kernel shows of such a process; at most 15 characters


@dataclass(frozen=True)
class Seen:
    """What /proc says of a process."""

    place: frozenset[bytes]  # PLACE, as its environment was when it began
    command: bytes
    parent: int
    started: float  # seconds after this machine
    name: str

    def like(self, other: Seen) -> bool:
        """Whether both were started as the same rank of one command at about the same time."""
        together = abs(self.started - other.started) <= TOGETHER_SECONDS
        return (self.place, self.command, together) == (other.place, other.command, True)


def see(process: Path) -> Seen | None:
    """What a folder of /proc says; None: nothing can be read, as of another user's process, or one that has ended."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        names = tuple(f"{name}=".encode() for name in PLACE)
        place = frozenset(each for each in (process / "environ").read_bytes().split(b"\0") if each.startswith(names))
        fields = stat_fields(process)
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        name = (process / "comm").read_text(encoding="utf-8").strip()
        if any(each.startswith(b"RANK=") for each in place):
            return Seen(place, (process / "cmdline").read_bytes(), int(fields[1]), started, name)
    return None


def twins_here(process: int | None = None, machine: Path = Path("/proc")) -> dict[int, str]:
    """Processes on this host, besides this one, that are the same rank of the same command, each with its name. Of one
    that has copies or workers, the first."""
    process = process or os.getpid()
    mine = see(machine / str(process))
    if mine is None:
        return {}
    alike = {process: mine}
    for entry in machine.glob("[0-9]*"):
        seen = see(entry)
        if seen and seen.like(mine):
            alike[int(entry.name)] = seen
    first = process
    while alike[first].parent in alike:
        first = alike[first].parent
    return {each: seen.name for each, seen in sorted(alike.items()) if seen.parent not in alike and each != first}


def exported_once(rank: int, world_size: int, processes: list[str]) -> UserError:
    """What is said of several processes, each as `host pid 7`, that are one rank."""
    what = "RANK is" if world_size > 1 else "RANK and WORLD_SIZE are"
    return UserError(
        f"{len(processes)} processes say that they are rank {rank} ({some_of(processes)}): {what} exported once for all; "
        "let the launcher set it"
    )


def named(process: int) -> str:
    return f"{socket.gethostname()} pid {process}"


class Lookout:
    """Looks on this host, now and then while this process waits, for others of its rank."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.twins: list[str] = []  # those that were found
        self._next = time.monotonic() + LOOK_SECONDS  # at once they may not have started yet, and most never wait

    def look(self, now: bool = False) -> None:
        """Raises UserError where there are others, when they have had the time to see the same."""
        if not now and time.monotonic() < self._next:
            return
        self._next = time.monotonic() + LOOK_SECONDS
        found = twins_here()
        if not found:
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/comm").write_text(FOUND, encoding="utf-8")
        deadline = time.monotonic() + STAY_SECONDS
        # One that is still being loaded would find nobody when it looks. A run of a single rank may be training.
        while self.world_size > 1 and time.monotonic() < deadline:
            now_there = twins_here()
            found |= now_there
            if all(name == FOUND for name in now_there.values()):
                break
            time.sleep(0.1)
        self.twins = [named(each) for each in found]
        raise exported_once(self.rank, self.world_size, sorted([named(os.getpid()), *self.twins]))
