"""lockstep: the library behind the recipes. Importing it imports neither torch nor Hydra."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.errors import UserError
from lockstep.recipe import Proof, Recipe
from lockstep.task import Task

if TYPE_CHECKING:
    from lockstep.run import Run

__all__ = ["Proof", "Recipe", "Run", "Task", "UserError", "recipe"]
LAZY = {"Run": "lockstep.run"}  # name -> the module that defines it, and that imports torch

# recipes/, launchers/ and conf/ are sub-packages: in a wheel they lie here, in the repository beside src/.
if not Path(__file__).with_name("recipes").is_dir():
    __path__.append(str(Path(__file__).resolve().parents[2]))


def recipe(train: Callable[[Run], None] | None = None, **options: Any) -> Any:
    """Make a recipe of a training function: `@recipe` or `@recipe(ranks=1)`, then `train.main()` under `__main__`.

    The options are Recipe's attributes.
    """
    from lockstep.launch.cli import make_recipe

    return make_recipe(train, **options)


if not TYPE_CHECKING:  # else a type checker would take any name for one of these

    def __getattr__(name: str) -> Any:
        if name not in LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value = getattr(importlib.import_module(LAZY[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *LAZY})
