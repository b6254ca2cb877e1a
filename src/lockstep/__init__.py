"""lockstep: the library behind the recipes."""

from lockstep.errors import UserError
from lockstep.launch.cli import recipe
from lockstep.recipe import Proof, Recipe
from lockstep.run import Run

__all__ = ["Proof", "Recipe", "Run", "UserError", "recipe"]
