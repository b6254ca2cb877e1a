"""A disk that is full, or becomes read-only, costs checkpoints, and not the run."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lockstep.checkpoint.directory import (
    folder_name,
    list_checkpoints,
)
from lockstep.checkpoint.saver import CheckpointSaver
from lockstep.config.run_directory import freeze, read_result
from lockstep.launch.validate import validate
from tests.helpers.checkpointed_run import (
    NUMBERS,
    again,
    contents,
    resumed_from,
)
from tests.helpers.fuzz.damage import state_of
from tests.helpers.fuzz.plans import STEPS, Setup
from tests.helpers.fuzz.results import Result, compare, first_difference, result_of
from tests.helpers.harness import compose_config

MS_RDONLY, MS_REMOUNT, MS_REC, MS_PRIVATE = 1, 32, 1 << 14, 1 << 18  # linux/mount.h
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000  # linux/sched.h
libc = ctypes.CDLL(None, use_errno=True)


class NoMount(Exception):
    """This machine lets nobody mount anything."""


def own_mounts() -> None:
    """Mounts of this process alone, which end with it; as a user who is root in here where the real one is not."""
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWNS) != 0:
        if libc.unshare(CLONE_NEWNS | CLONE_NEWUSER) != 0:
            raise NoMount(os.strerror(ctypes.get_errno()))
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    mount(None, Path("/"), MS_REC | MS_PRIVATE)


def mount(kind: str | None, where: Path, flags: int = 0, options: str = "") -> None:
    names = [kind and kind.encode(), os.fsencode(where), kind and kind.encode()]
    if libc.mount(names[0], names[1], names[2], ctypes.c_ulong(flags), options.encode()) != 0:
        code = ctypes.get_errno()
        raise (NoMount if code in (1, 13) else OSError)(f"mount {where}: {os.strerror(code)}")


def on_a_disk(body: Callable[..., None], disk: Path, kilobytes: int, *args: Any) -> None:
    """Call `body(disk, *args)` in a process of its own, in which `disk` is a file system of that size."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)

    def within() -> None:
        try:
            own_mounts()
            disk.mkdir()
            mount("tmpfs", disk, 0, f"size={kilobytes}k")
            body(disk, *args)
            writer.send("")
        except NoMount as error:
            writer.send(f"NoMount {error}")
        except BaseException:
            writer.send(traceback.format_exc())
        os._exit(0)

    process = context.Process(target=within)
    process.start()
    writer.close()
    said = reader.recv()
    process.join()
    if said.startswith("NoMount"):
        pytest.skip(said)
    assert not said, said


def size_of(folder: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*")) // 1024


def fill(disk: Path, out: Path, setup: Setup, whole: Result, kilobytes: int) -> None:
    ended = again(out, setup)
    failed = [line for line in ended.said.splitlines() if "not saved (" in line]
    said = "not saved ([Errno 28] No space left on device); training continues, the one before is kept"
    assert failed == [f"checkpoint of step {step} {said}" for step in (8, 12, 16)]
    assert "Traceback" not in ended.said
    assert "not saved 3 checkpoints, each named in ranks/0.log" in ended.said, "the summary has it, too"
    assert read_result(out)["checkpoints_failed"] == 3
    folder = out / "checkpoints"
    assert sorted(os.listdir(folder)) == ["LATEST", "step-00000004"]
    assert first_difference(torch.load(out / "model.pt", weights_only=True), whole.weights) == ""
    assert result_of(out).log == whole.log
    # And when there is room again it is a checkpoint to go on from.
    before = contents(folder, (4,))
    mount("tmpfs", disk, MS_REMOUNT, f"size={8 * kilobytes}k")
    (out / "result.json").unlink()
    ended = again(out, setup)
    assert "not saved" not in ended.said
    assert resumed_from(out) == folder_name(4)
    assert compare(result_of(out), whole, best=False) == ""
    assert contents(folder, (4,)) == before


@pytest.mark.slow
@pytest.mark.parametrize(("asynchronous", "share"), [("true", 0.5), ("false", 0.9), ("true", 0.99)])
def test_a_full_disk_costs_checkpoints_and_not_the_run(
    asynchronous: str, share: float, finished: Path, tmp_path: Path, whole: Result
) -> None:
    """Room for one checkpoint and a share of another: it breaks off in the tensors, or at the very end."""
    room = size_of(finished / "checkpoints" / folder_name(4))
    setup = Setup(
        "ddp", 2, NUMBERS, ("checkpoint.every=4", "checkpoint.keep=4", f"checkpoint.asynchronous={asynchronous}")
    )

    def body(disk: Path) -> None:
        out = tmp_path / "out"
        lay_out(out, setup)
        (out / "checkpoints").symlink_to(disk)
        fill(disk, out, setup, whole, room)

    on_a_disk(body, tmp_path / "disk", int(room * (1 + share)))


def lay_out(out: Path, setup: Setup) -> None:
    """The run directory as a launcher makes it, for a start that finds its checkpoints elsewhere."""
    config = compose_config(setup.target, f"out={out}", *setup.words, *setup.saving)
    validate(config, setup.target, setup.ranks)
    freeze(config, setup.recipe)


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_run_that_lies_on_the_full_disk_goes_on_too(
    asynchronous: str, finished: Path, tmp_path: Path, whole: Result
) -> None:
    """A save that fails must not take the room that the log and the weights need."""
    room = size_of(finished / "checkpoints" / folder_name(4))
    rest = size_of(finished) - size_of(finished / "checkpoints")
    setup = Setup(
        "ddp", 2, NUMBERS, ("checkpoint.every=4", "checkpoint.keep=4", f"checkpoint.asynchronous={asynchronous}")
    )
    assert room > rest, "or the room for weights and log were room for a checkpoint"

    def body(disk: Path) -> None:
        fill(disk, disk / "out", setup, whole, room + rest)

    on_a_disk(body, tmp_path / "disk", int(1.1 * room) + rest)


@pytest.mark.slow
def test_a_disk_that_becomes_read_only_costs_checkpoints_and_not_the_run(
    tmp_path: Path, whole: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup("ddp", 2, NUMBERS, ("checkpoint.every=2", "checkpoint.keep=2"))
    save = CheckpointSaver.save

    def body(disk: Path) -> None:
        out = tmp_path / "out"
        lay_out(out, setup)
        (out / "checkpoints").symlink_to(disk)

        def close_and_save(self: CheckpointSaver, tensors: Any, facts: Any, **more: Any) -> None:
            if facts["step"] == 6 and dist.get_rank() == 0:
                self.wait()
                while True:
                    try:
                        mount("tmpfs", disk, MS_REMOUNT | MS_RDONLY)
                        break
                    except OSError:  # the other rank has not closed its file yet
                        time.sleep(0.002)
            save(self, tensors, facts, **more)

        monkeypatch.setattr(CheckpointSaver, "save", close_and_save)
        ended = again(out, setup)
        assert "not saved ([Errno 30] Read-only file system" in ended.said
        assert "Traceback" not in ended.said
        assert read_result(out)["checkpoints_failed"] > 0
        assert first_difference(torch.load(out / "model.pt", weights_only=True), whole.weights) == ""
        left = list_checkpoints(disk)
        assert left
        assert left[0].name < folder_name(STEPS)
        before = state_of(disk, set())
        # Still read-only, it can be read from.
        (out / "result.json").unlink()
        again(out, setup)
        assert resumed_from(out) == left[0].name
        assert state_of(disk, set()) == before
        assert result_of(out).log == whole.log
        assert first_difference(torch.load(out / "model.pt", weights_only=True), whole.weights) == ""

    on_a_disk(body, tmp_path / "disk", 64 * 1024)
