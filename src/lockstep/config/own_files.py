"""Folders that are made, and files that are opened for writing, where others may be able to write, as in /tmp.

Such folders are their owner's alone, and no file is written through a link: whoever can put one there would have this
user write, or overwrite, another file. What is written in one piece goes through `utils.files.write_atomically`.
"""

from __future__ import annotations

import errno
import os
import pwd
import stat
from pathlib import Path
from typing import IO, Any

from lockstep.errors import UserError
from lockstep.utils.files import no_link


def open_own(path: Path, mode: str, **options: Any) -> IO[Any]:
    """`open` for writing, but never through a link.

    Raises:
        UserError: there is a link.
        OSError: as `open` does.
    """
    return open(path, mode, opener=descriptor_of, **options)


def descriptor_of(path: str | os.PathLike[str], flags: int) -> int:
    """os.open as `open_own` has it."""
    try:
        return no_link(path, flags)
    except OSError as error:
        # In /tmp the kernel itself follows no link of others (proc(5), protected_symlinks).
        if error.errno in (errno.ELOOP, errno.EACCES) and os.path.islink(path):
            raise link_refused(Path(path)) from None
        raise


def link_refused(link: Path) -> UserError:
    return UserError(
        f"{link}: is a link to {os.readlink(link)} that {owner_of(link)} has made, and a run writes through none; remove "
        "it, or name another out"
    )


def owner_of(path: Path) -> str:
    """The name of whom a file or link belongs to, or the number where nobody knows it."""
    number = path.lstat().st_uid
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def refuse_others_links(folder: Path) -> None:
    """Hold a folder that is entered again, and the folders in it, to links of this user's or root's.

    Raises:
        UserError: somebody else has put one there: what is written below it would go elsewhere.
    """
    for below in [folder, *(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())]:
        for entry in os.scandir(below):
            if entry.is_symlink() and entry.stat(follow_symlinks=False).st_uid not in (os.geteuid(), 0):
                raise link_refused(Path(entry.path))


def make_folders(path: Path, exist_ok: bool = False) -> None:
    """Make a folder and its parents: for this user alone where everyone can write, else as the umask says.

    Raises:
        OSError: it cannot be made, or is there and must not be.
    """
    if not path.parent.exists():
        make_folders(path.parent, exist_ok=True)
    try:
        path.mkdir(0o700 if path.parent.stat().st_mode & stat.S_IWOTH else 0o777)
    except FileExistsError:
        if not exist_ok or not path.is_dir():
            raise
