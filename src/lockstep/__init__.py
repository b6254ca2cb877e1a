"""lockstep: the library behind the recipes."""

from lockstep.app import Proof, Recipe, recipe
from lockstep.errors import UserError
from lockstep.run import Run

__all__ = ["Proof", "Recipe", "Run", "UserError", "recipe"]
