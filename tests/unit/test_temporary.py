"""What lockstep keeps in TMPDIR: private, and gone when its owner is, whoever starts next."""

from __future__ import annotations

import os
import signal
import stat
import tempfile
from pathlib import Path

import pytest

from lockstep.utils import temporary
from tests.helpers.processes import wait_until


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def hold() -> tuple[int, Path]:
    """(a process that holds a folder with a subfolder and a file, the folder)."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with temporary.own_folder() as folder:
            Path(folder, "0").mkdir()
            Path(folder, "0", "error.json").write_text("{}")
            os.write(writer, folder.encode())
            while True:
                signal.pause()
    os.close(writer)
    with os.fdopen(reader) as stream:
        return child, Path(os.read(stream.fileno(), 4096).decode())


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_killed_process_s_folder_goes_at_the_next_start_and_a_living_one_s_stays(place: Path) -> None:
    (dead, left), (living, held) = hold(), hold()
    try:
        kill(dead)
        assert (left / "0" / "error.json").exists()
        with temporary.own_folder() as mine:
            assert stat.S_IMODE(os.stat(mine).st_mode) == 0o700
            assert sorted(place.iterdir()) == sorted([held, Path(mine)])
            assert (held / "0" / "error.json").exists()
        assert list(place.iterdir()) == [held]
    finally:
        kill(living)
    with temporary.own_folder() as mine:
        assert list(place.iterdir()) == [Path(mine)]


def test_a_copy_of_the_owner_holds_its_folder_too(place: Path) -> None:
    """A launcher that is killed may leave ranks behind for a moment: they are copies of it."""
    reader, writer = os.pipe()
    owner = os.fork()
    if not owner:
        with temporary.own_folder():
            if copy := os.fork():
                os.write(writer, str(copy).encode())
            signal.pause()
    copy = int(os.read(reader, 20))
    kill(owner)
    temporary.sweep()
    assert len(list(place.iterdir())) == 1
    os.kill(copy, signal.SIGKILL)

    def gone() -> bool:
        temporary.sweep()
        return not list(place.iterdir())

    wait_until(gone, 30)


def test_what_is_not_certainly_ours_stays(place: Path) -> None:
    (place / "lockstep-abc").mkdir()  # no lock in it
    (place / "pymp-abc").mkdir()
    (place / "torchinductor_me").mkdir()
    target = place / "target"
    target.mkdir()
    (target / temporary.HELD).touch()
    (place / "lockstep-link").symlink_to(target)
    (place / "lockstep-file").touch()
    linked = place / "lockstep-linked-lock"
    linked.mkdir()
    (linked / temporary.HELD).symlink_to(target / temporary.HELD)
    before = sorted(place.rglob("*"))
    temporary.sweep()
    assert sorted(place.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_another_user_s_folder_stays(place: Path) -> None:
    theirs = place / "lockstep-theirs"
    theirs.mkdir()
    (theirs / temporary.HELD).touch()
    os.chown(theirs, 65534, 65534)
    temporary.sweep()
    assert theirs.exists()
    os.chown(theirs, os.geteuid(), os.getegid())
    temporary.sweep()
    assert not theirs.exists()


def test_a_folder_that_cannot_be_removed_at_once_is_found_again(place: Path) -> None:
    with temporary.own_folder() as folder:
        (Path(folder) / "sub").mkdir()
        os_rmdir = os.rmdir
        refused: list[str] = []

        def rmdir(path: str, **more: int) -> None:
            if path == folder and not refused:
                refused.append(path)
                raise OSError(39, "Directory not empty")
            os_rmdir(path, **more)

        os.rmdir = rmdir  # type: ignore[assignment]
        try:
            temporary.remove(folder)
        finally:
            os.rmdir = os_rmdir
        assert [path.name for path in Path(folder).iterdir()] == [temporary.HELD]
