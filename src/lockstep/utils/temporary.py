"""Folders in TMPDIR that go with the process that made them, however it ends: if not by itself, at somebody's next start.

Each holds a file with a lock (flock) that the kernel takes back when the process and all its copies are gone. A folder
whose lock is free belongs to nobody any more; one without that file is none of ours, and is left alone. So is torch's
compile cache (torchinductor_USER), which is there to be found again.
Source: https://man7.org/linux/man-pages/man2/flock.2.html
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import multiprocessing
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing import util
from pathlib import Path
from typing import NoReturn

from lockstep.utils.files import cache_folder

PREFIX = "lockstep-"
HELD = ".held"  # the file with the lock
_of_sockets: dict[int, tuple[str, int]] = {}  # {process: its folder for sockets, the lock's descriptor}
_last_works: list[Callable[[], None]] = []


def own_compile_cache() -> None:
    """Have torch.compile keep what it makes in its usual folder (TMPDIR/torchinductor_USER) only where that is this user's.

    What lies there is run. Anyone can make a folder of that name in /tmp before this user does; then it is a hidden one
    in the home directory. Who sets TORCHINDUCTOR_CACHE_DIR is heeded.
    """
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    folder = default_cache_dir()
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)  # from here on it cannot be another's
    if is_own_folder(folder, closed=stat.S_IWGRP | stat.S_IWOTH):
        return
    own = cache_folder("torchinductor")
    own.mkdir(0o700, parents=True, exist_ok=True)
    print(f"{folder} is writable by others: torch.compile keeps its code in {own}", file=sys.stderr, flush=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(own)


@contextlib.contextmanager
def own_folder() -> Iterator[str]:
    """A new folder in TMPDIR, of which nobody else can read or write anything; gone at the end."""
    me = os.getpid()
    folder, lock = make()
    try:
        yield folder
    finally:
        if os.getpid() == me:  # a copy of this process that comes by here leaves it to the original
            remove(folder)
            os.close(lock)


def keep_sockets() -> None:
    """Have this process and the workers that it starts put multiprocessing's sockets into one folder of this process's.

    Python would make a folder in each of them (pymp-…), and take it away only where the process comes to its last line.
    """
    if os.getpid() not in _of_sockets:
        util.Finalize(None, remove_sockets, exitpriority=-100)  # after its own of the sockets
        _of_sockets[os.getpid()] = make()
        multiprocessing.current_process()._config["tempdir"] = _of_sockets[os.getpid()][0]  # type: ignore[attr-defined]


def remove_sockets() -> None:
    """Take the folder of `keep_sockets` away, before a process ends without coming to its last line."""
    if os.getpid() in _of_sockets:
        remove(_of_sockets.pop(os.getpid())[0])


def do_at_the_end(work: Callable[[], None]) -> None:
    """Have it done before this process ends, by `exit_at_once` or the interpreter's own way."""
    _last_works.append(work)
    atexit.register(work)


def exit_at_once(code: int) -> NoReturn:
    """os._exit, with nothing left unsaid, and no folder left behind."""
    sys.stdout.flush()
    sys.stderr.flush()
    for work in _last_works:
        work()
    remove_sockets()
    os._exit(code)


def make() -> tuple[str, int]:
    """(a new folder, the descriptor of its lock); what killed processes have left is removed on the way."""
    sweep()
    while True:
        folder = tempfile.mkdtemp(prefix=PREFIX)
        lock = os.open(f"{folder}/{HELD}", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        with contextlib.suppress(OSError):  # a file system without locks: it is never swept there
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.exists(f"{folder}/{HELD}"):  # else a sweep came between these lines, and found it free
            return folder, lock
        os.close(lock)


def sweep() -> None:
    """Remove the folders of this user's whose processes are gone."""
    with contextlib.suppress(OSError):
        for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
            if "-" in folder.name.removeprefix(PREFIX):  # a run's: what is in it is brought there before it is removed
                continue
            with contextlib.suppress(OSError):
                if is_own_folder(folder):
                    remove_if_free(folder)


def is_own_folder(folder: str | Path, closed: int = 0) -> bool:
    """Whether it is a folder, no link to one, of this user's: anyone can make one of a known name first.

    Args:
        closed: bits of the mode that nobody may have there.
    """
    with contextlib.suppress(OSError):
        facts = os.lstat(folder)
        return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & closed
    return False


def remove_if_free(folder: Path) -> None:
    """Remove a folder that nobody holds; raises OSError where it is held, or has no lock."""
    lock = os.open(folder / HELD, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove(str(folder))
    finally:
        os.close(lock)


def remove(folder: str) -> None:
    """Remove a folder of ours; what cannot be removed now keeps its lock's file, and is found again."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            elif entry.name != HELD:
                os.unlink(entry.path)
        os.unlink(f"{folder}/{HELD}")
        try:
            os.rmdir(folder)
        except OSError:  # a worker that still lives has put something into it
            os.close(os.open(f"{folder}/{HELD}", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600))
