"""lockstep: the library behind the recipes."""

from lockstep.app import Proof, recipe
from lockstep.errors import UserError
from lockstep.run import Run

__all__ = ["Proof", "Run", "UserError", "recipe"]
