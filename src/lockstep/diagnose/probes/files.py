"""The run directory's file system: whether all ranks share it, whether it is consistent, how fast and how full it is."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import statistics
import time
import uuid
from pathlib import Path

import torch.distributed as dist

from lockstep.config import own_files
from lockstep.diagnose.findings import Facts, Findings
from lockstep.diagnose.probes.ranks import first_rank_of_hosts, rank_and_host, value_or_error
from lockstep.distributed.collectives import broadcast_object
from lockstep.distributed.process_group import World
from lockstep.utils import files
from lockstep.utils.text import count, mebibytes, some_of

FOLDER = ".preflight"  # in the run directory, removed at the end
PATIENCE_SECONDS = 10.0  # in which a file of another rank must be seen
SWAP_SECONDS = 0.5  # in which rank 0 replaces a file again and again while the others read it
BLOCK_BYTES = 2**25  # written to see how fast that is
SMALL_FILES = 8  # of 4 KiB each, to see how long fsync takes
AT_ONCE_SECONDS = 0.1
LATE_SECONDS = 1.0  # after which a file of another rank should have been seen
SLOW_WRITE, SLOW_FSYNC = 20e6, 0.5  # bytes/s and s from which a file system is called slow


def probe_files(world: World, out: Path) -> Facts:
    """Whether the ranks see each other's files in the run directory, always whole, and how fast it is."""
    folder, found = out / FOLDER, Facts()
    nonce = uuid.uuid4().hex
    if world.rank == 0:
        found["made"] = value_or_error(lambda: make_folder(folder, nonce))
    nonce = broadcast_object(nonce, world.control)
    found["seen"] = seconds_until(folder / "hello", nonce, PATIENCE_SECONDS)
    # Each rank writes a file for the next rank; rank 0 reads all.
    mine = value_or_error(lambda: files.write_atomically(folder / f"rank-{world.rank}", nonce))
    dist.barrier(world.control)
    others = range(world.world_size) if world.rank == 0 else [(world.rank + 1) % world.world_size]
    found["write_error"] = mine["error"] if mine else None
    found["unseen"] = []
    for rank in others:  # when one is missing, there is no need to wait as long for the next
        if seconds_until(folder / f"rank-{rank}", nonce, 0.1 if found["unseen"] else PATIENCE_SECONDS) is None:
            found["unseen"].append(rank)
    dist.barrier(world.control)
    swap = replace_repeatedly if world.rank == 0 else read_repeatedly
    found["swaps"] = value_or_error(lambda: swap(folder / "swapped"))
    dist.barrier(world.control)
    if world.rank in first_rank_of_hosts(world.hosts):
        found["disk"] = value_or_error(lambda: probe_disk(folder, world.rank))
    with contextlib.ExitStack() as held:
        if world.rank == 0:
            value_or_error(
                lambda: fcntl.lockf(
                    held.enter_context(own_files.open_own(folder / "lock", "w", encoding="utf-8")), EXCLUSIVE
                )
            )
        dist.barrier(world.control)
        if world.rank:
            found["locked"] = value_or_error(lambda: files.is_locked(folder / "lock"))
        dist.barrier(world.control)
    if world.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    return found


EXCLUSIVE = fcntl.LOCK_EX | fcntl.LOCK_NB


def make_folder(folder: Path, nonce: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    own_files.make_folders(folder)
    files.write_atomically(folder / "hello", nonce)
    files.write_atomically(folder / "swapped", one_version(0))


def one_version(number: int) -> bytes:
    """A content that shows whether all of it was written at once: the same byte everywhere."""
    return bytes([number % 256]) * 2**16


def seconds_until(path: Path, content: str, seconds: float) -> float | None:
    """Seconds until a file is there with this content; None where it does not come in time."""
    started = time.monotonic()
    while True:
        passed = time.monotonic() - started  # before the look, so that there is one however slow this process is
        with contextlib.suppress(OSError):
            if path.read_text(encoding="utf-8") == content:
                return passed
        if passed >= seconds:
            return None
        time.sleep(0.02)


def replace_repeatedly(path: Path) -> Facts:
    until, written = time.monotonic() + SWAP_SECONDS, 0
    while time.monotonic() < until:
        written += 1
        files.write_atomically(path, one_version(written))
    return {"written": written}


def read_repeatedly(path: Path) -> Facts:
    """How often a file that is being replaced was there and whole, missing, or a mix of two versions."""
    until, found = time.monotonic() + SWAP_SECONDS, {"read": 0, "missing": 0, "torn": 0, "stale": 0}
    while time.monotonic() < until:
        try:
            content = path.read_bytes()
        except OSError as error:  # stale: NFS has deleted the old file while it was read; it is to be tried again
            found["stale" if error.errno == errno.ESTALE else "missing"] += 1
            continue
        whole = len(content) == len(one_version(0)) and content.count(content[:1]) == len(content)
        found["read" if whole else "torn"] += 1
    return found


def probe_disk(folder: Path, rank: int) -> Facts:
    """Speed of a large file with one fsync, seconds of a small one's, bytes free, and the kind of file system."""
    block, path = os.urandom(2**20), folder / f"block-{rank}"
    started = time.perf_counter()
    with own_files.open_own(path, "wb") as stream:
        for _ in range(BLOCK_BYTES // len(block)):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
    seconds, small = time.perf_counter() - started, []
    for _ in range(SMALL_FILES):
        started = time.perf_counter()
        files.write_atomically(path, block[:4096])
        small.append(time.perf_counter() - started)
    path.unlink()
    return {
        "write_bytes_per_second": BLOCK_BYTES / seconds,
        "fsync_seconds": statistics.median(small),
        "free_bytes": shutil.disk_usage(folder).free,
        "kind": file_system_of(folder),
    }


def file_system_of(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """The kind of file system that a folder is on: ext4, nfs4, lustre, tmpfs, …"""
    best, kind = "", "unknown"
    for line in mounts.read_text(encoding="utf-8").splitlines():
        _, point, what, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        if folder.resolve().is_relative_to(point) and len(point) >= len(best):
            best, kind = point, what
    return kind


def judge_files(ranks: list[Facts], checkpoint_bytes: int, keep: int) -> Findings:
    """Whether the run directory is the same for all ranks, is consistent, and is fast and large enough.

    Args:
        checkpoint_bytes: size of one checkpoint.
        keep: checkpoints that are kept.
    """
    found, first = Findings("files"), ranks[0]["files"]
    if first.get("made"):
        found.fails(f"rank 0 cannot write there: {first['made']['error']}", "name another out")
        return found
    blind = [each for each in ranks if each["files"]["seen"] is None]
    unseen = {rank for each in ranks if each not in blind for rank in each["files"]["unseen"]}
    if blind or unseen:
        who = some_of([rank_and_host(each) for each in ranks if each in blind or each["rank"] in unseen])
        why = next((each["files"]["write_error"] for each in ranks if each["files"]["write_error"]), None)
        figure = f"not shared: {who} and rank 0 do not see each other's files" + (f" ({why})" if why else "")
        found.fails(figure, "set out to a folder on a file system that all hosts mount")
        return found
    if "error" in first["swaps"]:
        found.fails(f"rank 0 cannot replace a file: {first['swaps']['error']}", "name another out")
        return found
    late = max(each["files"]["seen"] for each in ranks)
    soon = f"within {late:.2g} s" if late > AT_ONCE_SECONDS else "immediately"
    figure = f"seen by all ranks {soon}; replaced {first['swaps'].get('written', 0)} times"
    torn = [each for each in ranks if each["files"]["swaps"].get("torn") or each["files"]["swaps"].get("missing")]
    if torn:
        one = torn[0]["files"]["swaps"]
        figure = f"{rank_and_host(torn[0])} found a file that was being replaced {one['torn']} times torn, "
        figure += f"{one['missing']} times missing"
        remedy = "set out to a file system where a rename is atomic: checkpoints and result.json rely on it"
        found.fails(figure, remedy)
    elif late > LATE_SECONDS:
        found.warning(figure, "mount it with a shorter attribute cache (NFS: actimeo=1)")
    else:
        found.ok(figure + ", and whole at every reading" * (len(ranks) > 1))
    if any(each["files"].get("locked") is False for each in ranks):
        figure = "a lock of one rank does not keep the others out"
        found.warning(figure, "do not start two runs in one out; or mount it with locks")
    disks = [each for each in ranks if "disk" in each["files"]]
    for each in disks:
        if "error" in each["files"]["disk"]:
            figure = f"{each['host']} cannot write a large file: {each['files']['disk']['error']}"
            found.fails(figure, "make room, or name another out")
            return found
    judge_disks(disks, checkpoint_bytes, keep, found)
    return found


def judge_disks(ranks: list[Facts], checkpoint_bytes: int, keep: int, found: Findings) -> None:
    """Add speed and room of the file system, as each host has it."""
    slow = min(ranks, key=lambda each: each["files"]["disk"]["write_bytes_per_second"])
    late = max(ranks, key=lambda each: each["files"]["disk"]["fsync_seconds"])
    speed, fsync = slow["files"]["disk"]["write_bytes_per_second"], late["files"]["disk"]["fsync_seconds"]
    kind = ", ".join(dict.fromkeys(each["files"]["disk"]["kind"] for each in ranks))
    figure = f"{kind}: {speed / 1e6:,.0f} MB/s, fsync {1e3 * fsync:.2g} ms"
    figure += f", the slowest {slow['host']}" if len(ranks) > 1 else ""
    if {"tmpfs", "ramfs"} & set(kind.split(", ")):
        found.warning(f"{figure}; it is memory", "set out to a disk: a reboot clears this one")
    elif speed < SLOW_WRITE or fsync > SLOW_FSYNC:
        seconds = checkpoint_bytes / speed
        found.warning(figure, f"a checkpoint takes {seconds:.0f} s: set checkpoint.minutes higher, or a faster out")
    else:
        found.ok(figure)
    free = min(each["files"]["disk"]["free_bytes"] for each in ranks)
    need = checkpoint_bytes * (keep + 1)  # one more while the next is written
    figure = f"{mebibytes(free, 0)} MiB free; {count(keep + 1, 'checkpoint')} take {mebibytes(need, 0)}"
    if free < checkpoint_bytes:
        found.fails(figure, "make room, or name another out: not one checkpoint fits")
    elif free < need:
        found.warning(figure, "make room, or set checkpoint.keep lower")
    else:
        found.ok(figure)
