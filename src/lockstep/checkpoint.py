"""Checkpoints on disk: written by all ranks beside training, complete or not there, found again after anything.

    checkpoints/step-00000120/   __R_0.distcp, .metadata   tensors, in torch.distributed.checkpoint's format
                                 deepspeed/                an engine's files, where one keeps model and optimizer
                                 manifest.json             everything else, and size and SHA-256 of each file
                LATEST, BEST     the names of two of these folders

A checkpoint is written under a temporary name, hashed, flushed to disk, and only then renamed; LATEST follows. So a
folder with its final name was complete once, and its hashes tell whether it still is. Nothing is ever overwritten, and
nothing is unpickled but torch's own description of the tensors, by a reader that refuses all else (lockstep.storage).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from lockstep.files import sync_folder, write_atomically

if TYPE_CHECKING:
    from lockstep.storage import Saver

FORMAT = 1
NAME = re.compile(r"step-(\d{8,})")
UNFINISHED, BROKEN = ".writing-", "broken-"


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


Files = Mapping[str, bytes | memoryview]  # contents, by their paths in the checkpoint


class Checkpoints:
    """The checkpoints of one run; every rank has one, and all call each method together.

    Args:
        folder: the run's checkpoints/, on a file system that all ranks share.
        saver: what writes the tensors.
        keep: how many of the newest are kept, besides the best.
        warn: called with a line about a save that failed.

    Attributes:
        stall_seconds: for how long training has waited for checkpoints.
        failed: saves that failed.
        saved_step: the step of the newest one that is on disk, 0 where none is.
    """

    def __init__(self, folder: Path, saver: Saver, *, keep: int, warn: Callable[[str], None]) -> None:
        self.folder, self.saver, self.keep, self.warn = folder, saver, keep, warn
        self.stall_seconds, self.failed, self.saved_step = 0.0, 0, 0
        self._flight: tuple[Future[Any], int] | None = None

    def save(
        self,
        tensors: dict[str, Tensor],
        facts: dict[str, Any],
        *,
        files: Callable[[], Files] = dict,
        best: bool = False,
    ) -> None:
        """Save what this rank holds of the state; the ranks' parts make up the whole.

        At most one save is under way: a second one waits for the first, so one copy of the state is all the memory
        that checkpoints take.

        Args:
            tensors: {name: tensor}; of a tensor that several ranks hold, one rank's is written.
            facts: what goes into the manifest, JSON: `step` at least.
            files: makes this rank's further files.
            best: also the best one so far.
        """
        self.wait()
        started = time.perf_counter()
        step = facts["step"]
        if not (self.folder / folder_name(step)).exists():  # a good one is never overwritten
            self._flight = self.saver.start(tensors, files(), self._temporary(step), facts, self.keep, best), step
        self.stall_seconds += time.perf_counter() - started
        if not self.saver.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Wait until the save that is under way, if any, is on disk.

        A disk that refuses costs a checkpoint and a warning, not the run: the checkpoint before is still there.

        Raises:
            CheckpointException: a rank failed of something else than the disk.
        """
        if self._flight is None:
            return
        from lockstep.storage import disk_failure

        (flight, step), self._flight = self._flight, None
        started = time.perf_counter()
        error = flight.exception()
        if error is None:
            self.saved_step = step
        else:
            said = disk_failure(error)
            if not said:
                raise error
            self.failed += 1
            if dist.get_rank() == 0:
                shutil.rmtree(self._temporary(step), ignore_errors=True)
            self.warn(f"checkpoint of step {step} not saved ({said}); training goes on, the one before is kept")
        self.stall_seconds += time.perf_counter() - started

    def _temporary(self, step: int) -> Path:
        return self.folder / f"{UNFINISHED}{folder_name(step)}"


def commit(temporary: Path, manifest: dict[str, Any], *, keep: int, best: bool) -> None:
    """Seal a folder in which every rank's files are complete, give it its name, and delete what is now too old."""
    write_atomically(temporary / "manifest.json", seal(manifest | {"format": FORMAT}))
    sync_folder(temporary)
    final = temporary.with_name(temporary.name.removeprefix(UNFINISHED))
    temporary.rename(final)
    with contextlib.suppress(OSError):  # it is saved; pointers and old folders can wait for the next one
        sync_folder(final.parent)
        write_atomically(final.parent / "LATEST", final.name + "\n")
        if best:
            write_atomically(final.parent / "BEST", final.name + "\n")
        prune(final.parent, keep)


def fingerprint(path: Path) -> dict[str, Any]:
    """A file's size and SHA-256."""
    with path.open("rb") as stream:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def seal(manifest: dict[str, Any]) -> str:
    """A manifest as text, with the hash of the rest of it."""
    return json.dumps(manifest | {"seal": digest(manifest)}, indent=1) + "\n"


def digest(manifest: dict[str, Any]) -> str:
    rest = {name: value for name, value in manifest.items() if name != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the best one."""
    best = named(folder, "BEST")
    for path in names(folder)[keep:]:
        if path != best:
            doomed = path.with_name(f"{UNFINISHED}{path.name}")  # half deleted it must not look like a checkpoint
            path.rename(doomed)
            shutil.rmtree(doomed)


def names(folder: Path) -> list[Path]:
    """The folders that are called like checkpoints, newest first; whether they are intact is another question."""
    found = {path: NAME.fullmatch(path.name) for path in folder.glob("step-*")}
    return sorted((path for path, match in found.items() if match), key=lambda path: -int(path.name[5:]))


def named(folder: Path, pointer: str) -> Path | None:
    """The checkpoint that LATEST or BEST names; None where there is no such pointer, or none that names one."""
    file = folder / pointer
    text = file.read_text(errors="replace").strip() if file.is_file() else ""
    return next((path for path in names(folder) if path.name == text), None)


# Finding and loading ----------------------------------------------------------------------------------------------


@dataclass
class Found:
    """The newest intact checkpoint, and what was passed over on the way to it: lines that say what and why."""

    path: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


def newest(folder: Path, group: dist.ProcessGroup | None = None, only: str = "") -> Found:
    """Find the newest checkpoint whose files are all what its manifest says. All ranks call it; each hashes its share.

    Args:
        group: a gloo group of all ranks; None: the default one.
        only: the name of the one that may be taken; empty: any.
    """
    found = Found()
    listed = names(folder) if dist.get_rank(group) == 0 else []
    mine = [str(path) for path in listed if only in ("", path.name)]
    for name in agree(mine, group):
        path = Path(name)
        mine_wrong = whats_wrong(path, dist.get_rank(group), dist.get_world_size(group))
        problems = [problem for problem in gather(mine_wrong, group) if problem]
        if not problems:
            manifests = [json.loads((path / "manifest.json").read_text())] if dist.get_rank(group) == 0 else [None]
            found.path, found.facts = path, agree(manifests, group)[0]
            break
        found.skipped.append(f"{path.name}: {problems[0]}")
    if (folder / "LATEST").is_file() and named(folder, "LATEST") is None:
        found.skipped.append("LATEST: names no checkpoint that is there")
    return found


def agree(mine: list[Any], group: dist.ProcessGroup | None) -> list[Any]:
    """Rank 0's list, on all ranks."""
    box = [mine]
    dist.broadcast_object_list(box, group=group, group_src=0)
    return box[0]


def gather(mine: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """One object from every rank of a group, or of all, in rank order, on every rank."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def whats_wrong(path: Path, share: int = 0, shares: int = 1) -> str:
    """Why a checkpoint cannot be used, as far as every shares-th of its files says; empty: nothing."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if not isinstance(manifest, dict) or digest(manifest) != manifest.get("seal"):
            return "manifest.json has changed since it was written"
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, this version reads {FORMAT}"
        files = sorted(manifest["files"].items())
        for file, expected in files[share::shares]:
            size = (path / file).stat().st_size
            if size != expected["bytes"]:
                return f"{file} has {size} of {expected['bytes']} bytes"
            if fingerprint(path / file) != expected:
                return f"{file} has changed since it was written (SHA-256)"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read ({error.strerror})"
    except ValueError:
        return "manifest.json is not JSON"
    return ""


def tidy(folder: Path, found: Found) -> None:
    """Remove what killed saves left, set aside newer checkpoints that are broken (their names will be needed again),
    and point LATEST and BEST at what the newest intact one knows of. A folder that is now read-only stays as it is.
    """
    best = found.facts.get("best_step")
    with contextlib.suppress(OSError):
        for path in folder.glob(f"{UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)
        for path in (*folder.glob(".*.[0-9]*"), *folder.parent.glob(".*.[0-9]*")):  # write_atomically's
            path.unlink(missing_ok=True)
        for path in names(folder):
            if found.path is not None and path.name == found.path.name:
                break
            aside = path.with_name(f"{BROKEN}{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        for pointer, name in (("LATEST", found.path and found.path.name), ("BEST", best and folder_name(best))):
            if name and (folder / name).is_dir():
                write_atomically(folder / pointer, name + "\n")
            else:
                (folder / pointer).unlink(missing_ok=True)
