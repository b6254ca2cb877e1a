"""Checkpoints on disk: written by all ranks beside training, complete or not there, found again after anything.

    checkpoints/step-00000120/   __R_0.distcp, .metadata   tensors, in torch.distributed.checkpoint's format
                                 deepspeed/                an engine's files, where one keeps model and optimizer
                                 manifest.json             everything else, and size and SHA-256 of each file
                LATEST, BEST     the names of two of these folders

A checkpoint is written under a temporary name, hashed, flushed to disk, and only then renamed; LATEST follows. So a
folder with its final name was complete once, and its hashes tell whether it still is. Nothing is ever overwritten, and
nothing is unpickled but torch's own description of the tensors, by a reader that refuses all else
(lockstep.checkpoint.dcp).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lockstep.distributed.collectives import broadcast_object, gather_objects
from lockstep.utils.files import sync_folder, write_atomically

FORMAT = 1
FOLDER_NAME = re.compile(r"step-(\d{8,})")
UNFINISHED, BROKEN = ".writing-", "broken-"


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


FileContents = Mapping[str, bytes | memoryview]  # contents, by their paths in the checkpoint


def commit(temporary: Path, manifest: dict[str, Any], *, keep: int, best: bool) -> None:
    """Seal a folder in which every rank's files are complete, give it its name, and delete what is now too old."""
    write_atomically(temporary / "manifest.json", seal_manifest(manifest | {"format": FORMAT}))
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


def seal_manifest(manifest: dict[str, Any]) -> str:
    """A manifest as text, with the hash of the rest of it."""
    return json.dumps(manifest | {"seal": manifest_digest(manifest)}, indent=1) + "\n"


def manifest_digest(manifest: dict[str, Any]) -> str:
    rest = {name: value for name, value in manifest.items() if name != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the best one."""
    best = read_pointer(folder, "BEST")
    for path in list_checkpoints(folder)[keep:]:
        if path != best:
            doomed = path.with_name(f"{UNFINISHED}{path.name}")  # half deleted it must not look like a checkpoint
            path.rename(doomed)
            shutil.rmtree(doomed)


def list_checkpoints(folder: Path) -> list[Path]:
    """The folders that are called like checkpoints, newest first; whether they are intact is another question."""
    found = {path: FOLDER_NAME.fullmatch(path.name) for path in folder.glob("step-*")}
    return sorted((path for path, match in found.items() if match), key=lambda path: -int(path.name[5:]))


def read_pointer(folder: Path, pointer: str) -> Path | None:
    """The checkpoint that LATEST or BEST names; None where there is no such pointer, or none that names one."""
    file = folder / pointer
    text = file.read_text(errors="replace", encoding="utf-8").strip() if file.is_file() else ""
    return next((path for path in list_checkpoints(folder) if path.name == text), None)


# Finding and loading ----------------------------------------------------------------------------------------------


@dataclass
class FoundCheckpoint:
    """The newest intact checkpoint, and what was passed over on the way to it: lines that say what and why."""

    path: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


def find_newest(folder: Path, group: dist.ProcessGroup | None = None, only: str = "") -> FoundCheckpoint:
    """Find the newest checkpoint whose files are all what its manifest says. All ranks call it; each hashes its share.

    Args:
        group: a gloo group of all ranks; None: the default one.
        only: the name of the one that may be taken; empty: any.
    """
    found = FoundCheckpoint()
    listed = list_checkpoints(folder) if dist.get_rank(group) == 0 else []
    mine = [str(path) for path in listed if only in ("", path.name)]
    for name in broadcast_object(mine, group):
        path = Path(name)
        mine_wrong = find_damage(path, dist.get_rank(group), dist.get_world_size(group))
        problems = [problem for problem in gather_objects(mine_wrong, group) if problem]
        if not problems:
            manifest = (
                json.loads((path / "manifest.json").read_text(encoding="utf-8")) if dist.get_rank(group) == 0 else {}
            )
            found.path, found.facts = path, broadcast_object(manifest, group)
            break
        found.skipped.append(f"{path.name}: {problems[0]}")
    if (folder / "LATEST").is_file() and read_pointer(folder, "LATEST") is None:
        found.skipped.append("LATEST: names no checkpoint that is there")
    return found


def find_damage(path: Path, share: int = 0, shares: int = 1) -> str:
    """Why a checkpoint cannot be used, as far as every shares-th of its files says; empty: nothing."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or manifest_digest(manifest) != manifest.get("seal"):
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


def repair(folder: Path, found: FoundCheckpoint) -> None:
    """Remove what killed saves left, set aside newer checkpoints that are broken (their names will be needed again),
    and point LATEST and BEST at what the newest intact one knows of. A folder that is now read-only stays as it is.
    """
    best = found.facts.get("best_step")
    with contextlib.suppress(OSError):
        for path in folder.glob(f"{UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)
        for path in (*folder.glob(".*.[0-9]*"), *folder.parent.glob(".*.[0-9]*")):  # write_atomically's
            path.unlink(missing_ok=True)
        for path in list_checkpoints(folder):
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
