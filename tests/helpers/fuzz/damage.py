"""What befalls the files of a run between two starts, and what shows that a file was written again."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from lockstep.checkpoint.directory import UNFINISHED, list_checkpoints, manifest_digest
from tests.helpers.fuzz.plans import STEPS, Damage


def inflict(damage: Damage, folder: Path) -> tuple[str, str]:
    """Damage the newest checkpoint, or what lies around it.

    Returns:
        What was done, and the name of the checkpoint that is not intact any more; both may be empty.
    """
    listed = list_checkpoints(folder)
    if not listed:
        return "", ""
    newest = listed[0]
    if damage.kind == "no LATEST":
        (folder / "LATEST").unlink(missing_ok=True)
        return damage.kind, ""
    if damage.kind == "garbled LATEST":
        (folder / "LATEST").write_bytes(random.Random(damage.place).randbytes(1 + int(600 * damage.file)))
        return damage.kind, ""
    if damage.kind == "stale folder":
        stale = folder / f"{UNFINISHED}step-{int(STEPS * damage.place):08d}"
        shutil.copytree(newest, stale, dirs_exist_ok=True)
        return damage.kind, ""
    files = sorted(file for file in newest.rglob("*") if file.is_file())
    file = files[int(damage.file * len(files))]
    before = file.read_bytes()
    at = int(damage.place * len(before))
    what = f"{damage.kind} {newest.name}/{file.name}"
    if damage.kind == "delete":
        file.unlink()
        return what, newest.name
    after = before[:at] if damage.kind == "truncate" else flipped(before, at, bit=at % 8)
    file.write_bytes(after)
    harmless = file.name == "manifest.json" and same_manifest(before, after)  # 1e-5 and 1E-5 are the same number
    return what, "" if harmless else newest.name


def flipped(content: bytes, at: int, bit: int = 0) -> bytes:
    return content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]


def same_manifest(before: bytes, after: bytes) -> bool:
    try:
        old, new = json.loads(before), json.loads(after)
        return bool(manifest_digest(old) == manifest_digest(new) and old["seal"] == new["seal"])
    except (ValueError, KeyError):
        return False


def state_of(folder: Path, damaged: set[str]) -> dict[Path, tuple[int, int, int]]:
    """What would show that a file of an intact checkpoint was written again."""
    intact = [path for path in list_checkpoints(folder) if path.name not in damaged]
    found = {}
    for path in intact:
        for file in filter(Path.is_file, path.rglob("*")):
            facts = file.stat()
            found[file] = facts.st_ino, facts.st_size, facts.st_mtime_ns
    return found


def folders_of(folder: Path, names: set[str]) -> dict[str, int]:
    """Inodes of those checkpoints that are there: one that is saved again is another folder under the same name."""
    return {name: (folder / name).stat().st_ino for name in names if (folder / name).exists()}
