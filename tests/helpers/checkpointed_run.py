"""A run with checkpoints, finished or cut off, for tests of what befalls its files."""

from __future__ import annotations

import shutil
from hashlib import sha256
from pathlib import Path

from lockstep.checkpoint.directory import (
    folder_name,
    list_checkpoints,
)
from lockstep.config.run_directory import read_result
from tests.helpers.fuzz.plans import SIZE, Setup
from tests.helpers.fuzz.results import Result, reference
from tests.helpers.fuzz.starts import Ended, start

NUMBERS = (*SIZE, "optim=adamw")
RUN = Setup("ddp", 2, NUMBERS, ("checkpoint.every=4", "checkpoint.keep=4"))


def undisturbed() -> Result:
    """What the run leaves that nothing befell."""
    return reference(Setup(RUN.recipe, RUN.ranks, RUN.words))


def finished_run(out: Path) -> Path:
    """A run with checkpoints of steps 4, 8, 12 and 16."""
    assert start(RUN, out).codes == [0, 0]
    assert [path.name for path in list_checkpoints(out / "checkpoints")] == [
        folder_name(step) for step in (16, 12, 8, 4)
    ]
    return out


def cut_off_run(finished: Path, out: Path) -> Path:
    """The same run, killed when its last checkpoint was complete and before it said so."""
    shutil.copytree(finished, out)
    (out / "result.json").unlink()
    (out / "model.pt").unlink()
    return out


def again(out: Path, setup: Setup = RUN) -> Ended:
    """Start a run once more, and to its end."""
    ended = start(setup, out)
    assert ended.codes == [0] * setup.ranks, ended.said or ended.hung
    return ended


def resumed_from(out: Path) -> str | None:
    """The step, or nothing where the run started anew."""
    path = read_result(out)["resumed_from"]
    return path and path.removeprefix("checkpoints/")


def contents(folder: Path, steps: tuple[int, ...]) -> dict[str, tuple[str, int, int]]:
    """SHA-256, modification time and inode of every file of some checkpoints."""
    files = [file for step in steps for file in sorted((folder / folder_name(step)).iterdir())]
    facts = [(sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns, file.stat().st_ino) for file in files]
    return {str(file): found for file, found in zip(files, facts, strict=True)}
