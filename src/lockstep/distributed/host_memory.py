"""The heartbeats of a run: in the memory of each host, and summed up in the run directory, where other hosts see them.

    /dev/shm/lockstep-UID-…/<rank>       a rank's line, rewritten at each change of phase; in TMPDIR where there is no room
    ranks/<first rank>.heartbeats        the lines of a host, every few seconds, and whenever a rank has something to say

A thousand ranks that write twice per step would be too many for a shared file system. What was written to memory stays
there however a process ends, and is summed up by the ranks that are left, by the launcher, or by the next start here.
So are the logs that are on the host (lockstep.distributed.host_logs): those of ranks that did not end well are brought.

Each rank holds a lock (flock) on the folder in memory. The last one that leaves removes it; where none came to that,
whoever finds the lock free does. A folder's name is made of the host's name and of the number that the file system
gives to the run's ranks/, so runs do not meet in one, nor do emulated hosts. No torch in here.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lockstep.utils import temporary
from lockstep.utils.files import modified_at, no_link, write_atomically

SHARED_MEMORY = "/dev/shm"
LINE_BYTES = 8192  # of a line in memory, more than it ever needs
SUMMARY_SECONDS = 3.0  # between two summaries of a host
LOCK_SECONDS = 1.0  # for a lock that a process may hold which is stopped
FINISHED = "finished"  # how a rank that has nothing to tell says that it ended
PUBLISHED = ".published"  # a copy of the last summary
Beat = dict[str, Any]  # what a line says


class Line:
    """A rank's line.

    Args:
        ranks: the run's ranks/.

    Raises:
        OSError: no place on this host has room for it.
    """

    def __init__(self, ranks: Path, rank: int) -> None:
        collect_ended()
        self.ranks, failed = ranks, OSError(f"{ranks} is not there")
        for self.folder in folders(ranks):
            try:
                self._lock = enter(self.folder, ranks)
                (self.folder / PUBLISHED).touch()  # here alone: nobody makes it again while the folder is removed
                self._file = os.open(self.folder / str(rank), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                self.write("")  # from here on no write can fail for want of room
                return
            except OSError as error:
                failed = error
        raise failed

    def write(self, text: str) -> None:
        """Replace the line."""
        os.pwrite(self._file, text.encode().ljust(LINE_BYTES - 1) + b"\n", 0)

    def leave(self) -> None:
        """Sum up; as the last rank on this host, remove the folder."""
        publish(self.folder, self.ranks)  # after one that is under way in another thread
        remove_if_left(self.folder, self._lock, self.ranks)  # the file stays open: another thread may be writing


def folders(ranks: Path) -> list[Path]:
    """Where a run's lines may be on this host; the first that has room is taken."""
    try:
        facts = ranks.stat()
    except OSError:
        return []
    identity = hashlib.sha256(f"{socket.gethostname()} {facts.st_dev} {facts.st_ino}".encode()).hexdigest()[:16]
    return [parent / f"{prefix()}{identity}" for parent in places_for_lines()]


def places_for_lines() -> list[Path]:
    return [Path(SHARED_MEMORY), Path(tempfile.gettempdir())]


def prefix() -> str:
    return f"{temporary.PREFIX}{os.geteuid()}-"


def is_own(folder: Path) -> bool:
    """Whether a folder is there into which only this user can look."""
    return temporary.is_own_folder(folder, closed=stat.S_IRWXG | stat.S_IRWXO)


def enter(folder: Path, ranks: Path) -> int:
    """Make the folder, or find it made; return the descriptor of its lock.

    Raises:
        OSError: it cannot be made, or is another user's.
    """
    while True:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(0o700)
        if not is_own(folder):
            raise PermissionError(f"{folder} is another user's")
        held = folder / temporary.HELD
        lock = os.open(held, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)
            os.ftruncate(lock, 0)
            os.pwrite(lock, os.fsencode(ranks.absolute()), 0)
            if os.path.samestat(os.fstat(lock), held.stat()):
                return lock
        except FileNotFoundError:  # removed by a rank that left, or by a sweep, between these lines
            pass
        except OSError:
            os.close(lock)
            raise
        os.close(lock)


def remove_if_left(folder: Path, lock: int, ranks: Path) -> None:
    """Give a lock back, and remove the folder if nobody else holds it."""
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        bring_logs(folder, ranks)
        temporary.remove(str(folder))
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_UN)  # copies of this process have the descriptor too
        os.close(lock)


def publish(folder: Path, ranks: Path, unless_within: float = 0.0) -> None:
    """Write the summary of a folder in memory, where it is another one than the last.

    Args:
        unless_within: seconds; not where one has been written since then.
    """
    with contextlib.suppress(OSError), open(folder / PUBLISHED, "r+", encoding="utf-8") as last:
        wait_for_lock(last.fileno())
        if unless_within and time.time() - os.fstat(last.fileno()).st_mtime < unless_within:
            return
        beats = dict(in_memory(folder))
        text = "".join(f"{json.dumps(beats[rank])}\n" for rank in sorted(beats))
        before = last.read()
        if text and text != before:
            # No flush to disk: should this host go down, what is lost is a few seconds.
            write_atomically(ranks / f"{min(beats)}.heartbeats", text, durable=False)
            if before and (first := json.loads(before.partition("\n")[0])["rank"]) != min(beats):
                (ranks / f"{first}.heartbeats").unlink(missing_ok=True)  # the first rank came later
            last.seek(0)
            last.truncate()
            last.write(text)
        else:
            os.utime(last.fileno())


def wait_for_lock(file: int) -> None:
    """Lock a file; go on without where another process keeps it: the worst is a summary older than the last."""
    deadline = time.monotonic() + LOCK_SECONDS
    while time.monotonic() < deadline:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            time.sleep(0.01)


def collect(ranks: Path) -> None:
    """Sum up what this host's memory holds of a run whose ranks here have ended, and remove it."""
    for folder in filter(is_own, folders(ranks)):
        publish(folder, ranks)
        deadline = time.monotonic() + LOCK_SECONDS  # a killed rank's helpers hold the lock a little longer
        while collect_if_free(folder) and time.monotonic() < deadline:
            time.sleep(0.05)


def collect_ended() -> None:
    """Sum up and remove the folders of this user's whose processes are gone."""
    for parent in places_for_lines():
        with contextlib.suppress(OSError):
            for folder in filter(is_own, parent.glob(f"{prefix()}*")):
                collect_if_free(folder)


def collect_if_free(folder: Path) -> bool:
    """Sum a folder up and remove it, unless somebody holds it; return whether that is so."""
    try:
        lock = os.open(folder / temporary.HELD, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return True
    ranks = Path(os.fsdecode(os.pread(lock, 4096, 0)))
    if folder in folders(ranks):  # else it has been deleted since
        publish(folder, ranks)
        bring_logs(folder, ranks)
    temporary.remove(str(folder))
    os.close(lock)
    return False


def bring_logs(folder: Path, ranks: Path) -> None:
    """Bring the logs on this host of the ranks that did not end well."""
    for log in folder.glob("[0-9]*.log"):
        if read_heartbeat(ranks, int(log.stem)).get("end") != FINISHED:
            bring_log(log, ranks)


def bring_log(log: Path, ranks: Path) -> None:
    """Add a log on this host to the one in the run directory, and remove it here."""
    with contextlib.suppress(OSError), open(log, "rb") as said, open(ranks / log.name, "ab", opener=no_link) as stream:
        shutil.copyfileobj(said, stream)
        log.unlink()


def in_memory(folder: Path) -> Iterator[tuple[int, Beat]]:
    """(rank, its line) of all in a folder of this host."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if name.isdecimal() and (beat := read_line(folder / name)):
                yield int(name), beat


def read_line(path: Path) -> Beat:
    """A line in memory; nothing where there is none."""
    for _ in range(3):  # it may be being written
        with contextlib.suppress(OSError, ValueError):
            return dict(json.loads(path.read_text(encoding="utf-8")))
    return {}


def read_heartbeat(ranks: Path, rank: int) -> Beat:
    """What a rank wrote last, as far as this host can see it; only its number where it wrote nothing."""
    return read_here(ranks, rank) or read_heartbeats(ranks, f'"rank": {rank},').get(rank, {"rank": rank})


def read_here(ranks: Path, rank: int) -> Beat:
    """What this host's memory has of a rank; nothing where it has nothing."""
    found = (read_line(folder / str(rank)) for folder in folders(ranks) if is_own(folder))
    return next(filter(None, found), {})


def read_heartbeats(ranks: Path, words: str = "") -> dict[int, Beat]:
    """{rank: what it wrote last, as far as this host can see it}, in order; ranks that wrote nothing are left out.

    Args:
        words: lines of other hosts without them are left out too.
    """
    found: dict[int, Beat] = {}
    for path in sorted(ranks.glob("[0-9]*.heartbeats"), key=modified_at):
        lines: list[str] = []
        with contextlib.suppress(OSError):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        for line in (line for line in lines if words in line):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                beat = json.loads(line)
                if is_newer(beat, found.get(beat["rank"])):
                    found[beat["rank"]] = beat
    for folder in filter(is_own, folders(ranks)):
        found |= {rank: beat for rank, beat in in_memory(folder) if is_newer(beat, found.get(rank))}
    return dict(sorted(found.items()))


def is_newer(beat: Beat, other: Beat | None) -> bool:
    """Whether it was written later than one found before: in an earlier attempt the rank may have been elsewhere."""
    return other is None or bool(beat.get("at", 0) >= other.get("at", 0))
