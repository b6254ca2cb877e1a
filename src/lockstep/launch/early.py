"""What a recipe's command can answer before torch is loaded, which takes seconds: `--help`, a misspelt key, a wrong type,
what the shell completes.

`python -m recipes.ddp` imports the package `recipes` first, and that calls `answer`. What it lets pass is composed again
by the recipe's own `main`, which knows everything else.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

from lockstep.config.declared import declared, own_task
from lockstep.config.tasks import IMAGES, named_task
from lockstep.distributed.environment import MPI
from lockstep.errors import UserError
from lockstep.utils.places import as_installed
from lockstep.utils.standard_streams import show_meanwhile

# Variables of a process that is a rank, or might be one.
RANKS = ("RANK", "LOCKSTEP_LAUNCHER_PID", "SLURM_STEP_ID", *(mpi.rank for mpi in MPI))


def answer(folder: Path) -> None:
    """Answer the command line, if `python -m PACKAGE.NAME` is running one of the recipes in this folder.

    Exits with 0 after `--help`, and with 2 after a mistake in the command. Otherwise a terminal shows what now takes
    seconds.
    """
    name = recipe_of(sys.orig_argv)
    file = folder / f"{name}.py"
    if not name or not file.is_file() or any(variable in os.environ for variable in RANKS):
        return
    answer_command(file, sys.argv[1:])
    if "-sc" not in sys.argv:
        show_meanwhile(f"{name}: loading torch …")


def answer_command(file: Path, words: list[str]) -> None:
    """Exit with 0 after `--help`, and with 2 after a mistake that can be seen in these words of the recipe in `file`."""
    if any(word.startswith("-") and not word.startswith(("--help", "-h", "--config-dir", "-sc")) for word in words):
        return  # Hydra's own
    recipe = declared(file)
    if recipe is None or (named_task(words) or own_task(recipe)) not in (None, IMAGES):
        return  # the keys of another task stand in a file that loads torch
    if recipe.looks_at and any(".py" in word for word in words if word.startswith(f"{recipe.looks_at}=")):
        return  # and so may those of a recipe of one's own
    from lockstep.config.check import check_values
    from lockstep.config.compose import compose

    try:
        compose(recipe, check_values)
    except UserError as error:
        print(as_installed(f"error: {error}"), file=sys.stderr)
        leave(error.exit_code)
    except SystemExit:
        leave(0)
    else:
        if "-sc" in words:  # the shell waits for what it can complete a word to
            leave(0)
    finally:
        sys.argv[1:] = words


def recipe_of(command: list[str]) -> str:
    """NAME of `python … -m PACKAGE.NAME …`; empty where a command is another one."""
    if "-m" not in command[:-1]:
        return ""
    package, _, name = command[command.index("-m") + 1].rpartition(".")
    return name if package.endswith("recipes") else ""


def leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
