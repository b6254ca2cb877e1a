"""What a recipe of one's own is held to: recipes.single, or a recipe's file run as a command of its own on one rank.

The latter is for a training that is not `run.task`'s, such as two optimizers: no recipe of lockstep's computes it. It
really is one process: among several ranks a recipe that adds gradients up where it should average them would be wrong
in the same way on both sides. Such a run leaves losses, weights and evaluation, and not the first gradients.
"""

from __future__ import annotations

import ast
import os
import signal
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lockstep.config.schema import Config
from lockstep.distributed.signals import Preempted
from lockstep.errors import CheckFailed, UserError
from lockstep.launch import recipe_process
from lockstep.recipe import Recipe
from lockstep.registry import get_recipe, is_file
from lockstep.run import Run
from lockstep.utils.text import short
from lockstep.verify.archive import RECORD, is_record, read_archived
from lockstep.verify.trace import Trace, trace_left_by

SINGLE, SELF = "single", "self"
NOT_HANDED_ON = {"out", "nproc", "resume", "launcher", "start", "threads"}  # of the tool itself


def reference_of(recipe: Recipe, asked: str | None) -> str:
    """What a recipe is held to: single, or the path of the file that is run on one rank.

    Args:
        asked: the key `against`. It is for recipes of one's own: lockstep's are held to single.
    """
    if not is_file(recipe.target):
        return SINGLE
    if asked is None or is_record(asked):
        asked = SINGLE if recipe.proofs or trains_task(recipe.path) else SELF
    return recipe.target if asked == SELF else asked


def check_against(asked: str | None) -> None:
    """Hold the key `against` to what it can be; raises UserError."""
    if asked in (None, SINGLE, SELF):
        return
    if is_record(asked):
        read_archived(str(asked))
        return
    if not is_file(str(asked)) or not Path(str(asked)).expanduser().is_file():
        raise UserError(
            f"against={asked}: allowed are {SINGLE}, {SELF}, the FILE.py of a recipe, and the {RECORD} of an earlier run"
        )
    get_recipe(str(asked))


def trains_task(file: Path) -> bool:
    """Whether a recipe's file reads `run.task`, and so trains any task."""
    return any(
        isinstance(node, ast.Attribute) and node.attr == "task" and ast.unparse(node.value) == "run"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    )


def described_reference(against: str, recipe: Recipe) -> str:
    """A reference in words."""
    if against == SINGLE:
        return "recipes.single"
    return "itself on one rank" if against == recipe.target else f"{short(Path(against))} on one rank"


def run_alone(run: Run[Any], against: str, config: Config, name: str, mine: Trace | None) -> Trace | None:
    """A recipe's training on one rank, started by rank 0 as a command; the others wait. The Trace on rank 0, else None.

    Args:
        config: what the recipe that is held to it has trained with.
        mine: what it computed, on rank 0.

    Raises:
        CheckFailed: it failed.
    """
    problem, found = [""], None
    if run.world.rank == 0 and mine is not None:
        from lockstep.config.compose import overrides

        recipe, out = get_recipe(against), run.out / name
        words = [*overrides(recipe, config, recipe, NOT_HANDED_ON), "nproc=1", f"threads={run.world.threads}"]
        process = recipe_process.RecipeProcess(recipe.target, words, out, os.getcwd(), {})
        try:
            while not process.ended(0.2):
                if run.listener and run.listener.received:
                    raise Preempted(signal.Signals(run.listener.received).name)
            found = trace_left_by(out, mine.gradients.keys(), {})
        except recipe_process.RecipeFailed as error:
            problem[0] = str(error)
        finally:
            process.stop()
    dist.broadcast_object_list(problem, src=0)
    if problem[0]:
        raise CheckFailed(f"{short(Path(against))} on one rank: {problem[0]}")
    return found
