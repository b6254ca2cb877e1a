"""The runs in the default place that were cut off: found at a start, and continued where resume=last asks for it.

A command without `out` starts a new run. Where an earlier one of the same settings was killed, that is seldom what is
meant, so the first line says it. To continue it without being asked would surprise whoever wants a second run.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from omegaconf.errors import OmegaConfBaseException

from lockstep.config.run_directory import CHECKPOINTS, changes, has_checkpoint, lock, read_frozen, read_result
from lockstep.config.schema import LAST, NO_SOURCE, Config
from lockstep.errors import Busy, UserError
from lockstep.utils.text import short

ENDING_SECONDS = 3  # for the ranks of a launcher that was killed, which still save
# What the same command says again although a run may be resumed with another value: its length, and which data it reads.
SAME = ("max_steps", "data.", "task.")


@dataclass(frozen=True)
class Unfinished:
    """A run that was cut off: its directory, its newest checkpoint's step, and its last step where that is known."""

    out: Path
    config: Config
    step: int
    last: int | None


def offer_or_continue(config: Config, recipe: str, *, any_batch: bool = False) -> None:
    """With resume=last, have the config continue the newest unfinished run of its settings; else say that there is one.

    Args:
        config: complete, as it would be frozen; `out` and `resume` are set where it continues a run.
        any_batch: the global batch was found by trials, so the run's own counts.

    Raises:
        UserError: resume=last, and there is none.
    """
    if config.out is not None or config.resume == "never":
        return
    running: list[Path] = []
    found = next(unfinished(config, recipe, running, any_batch), None)
    if config.resume != LAST:
        if found is not None:
            steps = f"step {found.step}" + (f" of {found.last}" if found.last else "")
            how = f"resume={LAST}" if config.resume in NO_SOURCE else f"out={short(found.out)}"
            print(f"an unfinished run of these settings is at {steps}: add {how}", file=sys.stderr, flush=True)
        return
    if found is None and running:
        raise Busy(f"resume={LAST}: {short(running[0])} is still running; wait for its end, or leave resume={LAST} out")
    if found is None:
        raise UserError(
            f"resume={LAST}: outputs/{recipe} has no unfinished run of these settings with a checkpoint; leave it out"
        )
    config.out, config.resume = str(found.out), "auto"
    config.global_batch_size = found.config.global_batch_size


def unfinished(config: Config, recipe: str, running: list[Path], any_batch: bool) -> Iterator[Unfinished]:
    """The unfinished runs of these settings that have a checkpoint and do not run now, the one started last first.

    Args:
        running: those that do are added here.
    """
    found = [(file.stat().st_mtime, file.parent.absolute()) for file in Path("outputs", recipe).glob("*/config.yaml")]
    for _, out in sorted(found, reverse=True):
        if read_result(out).get("status") == "finished":
            continue
        busy = is_running(out)
        if not busy and not has_checkpoint(out):
            continue
        try:
            theirs, there = read_frozen(out, recipe, type(config))
        except (OSError, ValueError, OmegaConfBaseException):
            continue  # another version's, or of another task
        other = changes(config, there, SAME).keys() - ({"global_batch_size"} if any_batch else set())
        source = config.resume if config.resume not in NO_SOURCE else None
        if theirs != recipe or other or (there.resume if there.resume not in NO_SOURCE else None) != source:
            continue
        if busy and is_running(out, ENDING_SECONDS):
            running.append(out)
        elif steps := newest_step(out):
            yield Unfinished(out, there, *steps)


def is_running(out: Path, wait_seconds: float = 0) -> bool:
    """Whether a process trains there, also after a wait for one that is ending; or whether nobody can know."""
    try:
        lock(out, wait_seconds).close()
    except (Busy, UserError, OSError):  # somebody else's folder, which this user could not continue
        return True
    return False


def newest_step(out: Path) -> tuple[int, int | None] | None:
    """(the newest checkpoint's step, the run's last step if it is written there); None where there is no checkpoint."""
    names = sorted(path.name for path in (out / CHECKPOINTS).glob("step-*") if re.fullmatch(r"step-\d+", path.name))
    if not names:
        return None
    try:
        facts = json.loads((out / CHECKPOINTS / names[-1] / "manifest.json").read_text(encoding="utf-8"))
        last = facts.get("last_step")
    except (OSError, ValueError, AttributeError):
        last = None  # resuming passes over one that is broken, and says so
    return int(names[-1].removeprefix("step-")), last
