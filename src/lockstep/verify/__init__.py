"""The proof: `recipes.verify`, and the two functions by which a program of your own can be judged by it."""

from lockstep.verify.watching import record, watch

__all__ = ["record", "watch"]
