"""lockstep: the library behind the recipes."""

from lockstep.app import recipe
from lockstep.errors import UserError
from lockstep.run import Run

__all__ = ["Run", "UserError", "recipe"]
