"""What a task's plans for ranks that share its model's layers, or its sequences, have in common."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from lockstep.errors import UserError
from lockstep.task import option


def fits_pattern(name: str, pattern: str) -> bool:
    """Whether a module's name is one that a task's plan means: as many parts, each of which fits."""
    parts, wanted = name.split("."), pattern.split(".")
    return bool(name) == bool(pattern) and len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def fitting_modules(names: Iterable[str], pattern: str, task: str, method: str) -> list[str]:
    """The modules that a plan's pattern means.

    Args:
        names: of all modules.
        task, method: the task's name, and that of its method which has the plan, for errors.

    Raises:
        UserError: there is none.
    """
    fitting = [each for each in names if fits_pattern(each, pattern)]
    if not fitting:
        raise UserError(f"task={task}: {method} names {pattern}, which fits no module of the model")
    return fitting


def require_same_samples(task: Any, name: str, ranks: int, shared: str) -> None:
    """Hold a task to giving the same samples to ranks that share something.

    Args:
        shared: what they share, such as `a model`.

    Raises:
        UserError: its stream is each rank's own.
    """
    if ranks > 1 and option(task, "stream_per_rank"):
        raise UserError(
            f"task={name}: stream_per_rank gives each rank samples of its own, and the {ranks} ranks that share {shared} "
            "need the same; have the stream be the whole, without stream_per_rank"
        )
