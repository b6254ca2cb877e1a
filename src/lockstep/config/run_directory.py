"""The run directory: made new, or found to hold a run that can be resumed."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException

from lockstep.config import own_files
from lockstep.config.keys import typed, typed_value, walk
from lockstep.config.schema import Config, from_yaml, shared_part, to_yaml
from lockstep.errors import Busy, UserError
from lockstep.utils import files
from lockstep.utils.text import short

CHECKPOINTS = "checkpoints"


def freeze(config: Config, recipe: str) -> Path | None:
    """Make the run directory, or enter one that holds this run already, and put the config into it.

    Returns:
        Its absolute path; None where the run in it has finished.

    Raises:
        UserError: `out` cannot be written to, holds something else, or a run with other settings.
    """
    text = f"# recipe: {recipe}\n{to_yaml(config)}"
    found = found_in(config, recipe)
    out = found[0] if found else make_run_directory(config.out, recipe)
    try:
        if found:
            own_files.refuse_others_links(out)
            lock(out, 3).close()  # whoever trains there must not find its config changed; a killed one is let end
            result = read_result(out)
            if result.get("status") == "finished":
                why = ended_by(found[1], result)
                if why == "patience" or getattr(config, why) == getattr(found[1], why):
                    return None
                if not (out / CHECKPOINTS).is_dir():
                    raise UserError(
                        f"{why}={getattr(config, why)}: out={config.out} finished at step {result['steps']} and "
                        "kept no checkpoint to resume from; set checkpoint.every in the next run"
                    )
            (out / "result.json").unlink(missing_ok=True)
        files.write_atomically(out / "config.yaml", text)
    except OSError as error:
        if not found:
            shutil.rmtree(out, ignore_errors=True)
        raise UserError(f"out={out}: cannot be written to ({error.strerror}); name another folder") from None
    return out


def already_finished(config: Config) -> str:
    """What is said of a run in `out` that has finished: what would have it train on, and does."""
    why = ended_by(config, read_result(Path(str(config.out)).expanduser()))
    start = f"out={config.out}: this run has finished"
    if why == "max_steps" or (why == "epochs" and not is_planned(config)):
        return f"{start}; raise {why} to train on, or name another out to train again"
    change = "optim.schedule=constant and a" if why == "epochs" else "a"
    return (
        f"{start}, by {why}={getattr(config, why)}; to train on, start another from it: resume={config.out} out=NEW, with "
        f"{change} larger {why}"
    )


def is_planned(config: Config) -> bool:
    """Whether the learning rate of a step depends on how many epochs there are."""
    return config.optim.schedule != "constant"


def refuse_other_plan(config: Config, before: Config, run: Path) -> None:
    """Hold a run that goes on for other epochs to a learning rate that was not planned over those it had.

    Raises:
        UserError: it was, so what was trained is no part of the longer run.
    """
    if config.epochs == before.epochs or config.optim != before.optim or not is_planned(config):
        return
    weights = run / "model.pt"
    from_weights = f", or from its weights: resume={short(weights)} out=NEW" if weights.is_file() else ""
    raise UserError(
        f"epochs={config.epochs}: {short(run)} has a {before.optim.schedule} learning rate planned over "
        f"epochs={before.epochs}, so it is no part of a run of {config.epochs}; start another from it with "
        f"resume={short(run)} out=NEW optim.schedule=constant{from_weights}"
    )


def ended_by(config: Config, result: dict[str, Any]) -> str:
    """The key that ended a finished run: epochs, max_steps or patience."""
    if result.get("epochs", 0) >= config.epochs:
        return "epochs"
    before = config.patience is not None and result.get("steps", 0) < (config.max_steps or math.inf)
    return "patience" if before else "max_steps"


def found_in(config: Config, recipe: str) -> tuple[Path, Config] | None:
    """The folder `out` and the config in it, if they are a run that this config continues.

    Raises:
        UserError: it holds another recipe's run, or one with other settings.
    """
    if config.out is None or config.resume == "never":
        return None
    out = Path(config.out).expanduser().absolute()
    try:
        theirs, there = read_frozen(out, recipe, type(config))
    except (OSError, ValueError, OmegaConfBaseException):
        return None  # not a run; make_run_directory says so if it is not empty
    if theirs != recipe:
        raise UserError(f"out={config.out}: holds a run of {theirs or 'something else'}; name a new folder")
    other = changes(config, there)
    if other.keys() == {"epochs"} and config.epochs > there.epochs:
        refuse_other_plan(config, there, out)
    elif other:
        changed = ", ".join(
            f"{typed(name, now)} (there: {typed_value(before)})" for name, (now, before) in other.items()
        )
        raise UserError(
            f"out={config.out}: holds a run with other settings: {changed}; set them as they were to continue it, "
            "or name a new out"
        )
    return out, there


def read_frozen(out: Path, recipe: str, schema: type[Config]) -> tuple[str | None, Config]:
    """(the recipe that a run directory is of, its config): of another recipe's, what every recipe has of it.

    Raises:
        OSError, ValueError, OmegaConfBaseException: there is none, or none that this version reads.
    """
    text = (out / "config.yaml").read_text(encoding="utf-8")
    theirs = frozen_recipe(text)
    return theirs, from_yaml(text, schema) if theirs == recipe else shared_part(text)


def frozen_recipe(text: str) -> str | None:
    """The recipe that a frozen config is of, by its first line; None where it has none."""
    found = re.match(r"# recipe: (\S+)\n", text)
    return found[1] if found else None


def config_of(run: Path) -> Config | None:
    """What every recipe has of the config in a run directory, whichever recipe's it is; None where there is none."""
    try:
        return shared_part((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, OmegaConfBaseException):
        return None


def changes(config: Config, before: Config, free: tuple[str, ...] = ()) -> dict[str, tuple[Any, Any]]:
    """{key: (value, value before)} of what would make it another training.

    Args:
        free: what the names of those begin with that count although they may change when a run is resumed.
    """
    there = {name: value for name, value, _ in walk(before)}
    # A cluster's settings say where a run is computed, not what.
    return {
        name: (value, there.get(name))
        for name, value, rule in walk(config)
        if (name.startswith(free) if rule["free"] else not name.startswith("cluster.")) and there.get(name) != value
    }


def has_checkpoint(out: Path) -> bool:
    """Whether there is something to resume from, intact or not."""
    return any((out / CHECKPOINTS).glob("step-*"))


def checkpoint_folder(path: Path) -> tuple[Path, str]:
    """(folder of checkpoints, name of the one meant or nothing for the newest), of a run's folder or a checkpoint's.

    Raises:
        UserError: there is none.
    """
    if (path / "manifest.json").is_file():
        return path.parent, path.name
    for folder in (path / CHECKPOINTS, path):
        if any(folder.glob("step-*/manifest.json")):
            return folder, ""
    raise UserError(f"resume={path}: holds no checkpoint; name a run's folder, a checkpoint's, or a file of weights")


def read_result(out: Path) -> dict[str, Any]:
    return files.read_json(out / "result.json")


def note_failure(out: Path, recipe: str, world_size: int, wall_seconds: float) -> None:
    """Leave a result.json behind for a run whose ranks could not."""
    result = {"recipe": recipe, "status": "failed", "world_size": world_size, "wall_seconds": wall_seconds}
    with contextlib.suppress(OSError):  # a full disk may be what it failed of
        if not (out / "result.json").exists():
            files.write_json(out / "result.json", result)


def lock(out: Path, wait_seconds: float = 0) -> Any:
    """Keep a second start of the same run out while this process lives; keep what is returned.

    A POSIX lock: the kernel takes it back however the process ends, DataLoader workers do not inherit it, NFS knows it.

    Args:
        wait_seconds: how long an earlier start may take to end, where it is known to be ending.

    Raises:
        UserError: another process has it.
    """
    stream = own_files.open_own(out / ".lock", "w", encoding="utf-8")
    deadline = time.monotonic() + wait_seconds
    try:
        while True:
            try:
                fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.5)
    except BlockingIOError:
        raise Busy(f"out={out}: another process is training there; wait for its end, or name another out") from None
    except OSError:
        pass  # a file system without locks
    return stream


def wanted_directory(out: str | None, recipe: str) -> Path:
    """The run directory that there will be: `out`, or outputs/<recipe>/<time>.

    Raises:
        UserError: `out` holds something already, or cannot be made.
    """
    wanted = Path(out).expanduser() if out else Path("outputs", recipe, time.strftime("%Y-%m-%d_%H-%M-%S"))
    wanted = wanted.absolute()
    for link in (wanted, *wanted.parents):
        if os.path.islink(link) and not os.path.exists(link):
            raise UserError(
                f"out={out or wanted}: {link} is a link to {os.readlink(link)}, which is not there; make that folder, or "
                "name another"
            )
    longest = os.pathconf("/", "PC_NAME_MAX")
    if any(len(os.fsencode(part)) > longest for part in wanted.parts):
        raise UserError(f"out={out}: a name in it is too long; allowed are {longest} bytes")
    try:
        if out and wanted.exists() and not wanted.is_dir():
            raise UserError(f"out={out}: is a file; name a folder")
        if out and wanted.exists() and any(wanted.iterdir()):
            raise UserError(f"out={out}: not empty; name a new folder, or empty it")
    except OSError as error:
        raise UserError(f"out={out}: cannot be read ({error.strerror}); name a folder you can write to") from None
    return wanted


def make_run_directory(out: str | None, recipe: str) -> Path:
    """Create the run directory, `out` or outputs/<recipe>/<time>, with `ranks/` in it.

    Raises:
        UserError: `out` holds something already, or cannot be made.
    """
    wanted = wanted_directory(out, recipe)
    path, again = wanted, 1
    while True:
        try:
            # A second run in the same second gets a name of its own.
            own_files.make_folders(path, exist_ok=out is not None)
            break
        except OSError as error:
            if not isinstance(error, FileExistsError) or not path.exists():
                raise UserError(
                    f"out={out or path}: cannot be made ({error.strerror}); name a folder you can write to"
                ) from None
            again += 1
            path = wanted.with_name(f"{wanted.name}-{again}")
    (path / "ranks").mkdir()
    return path
