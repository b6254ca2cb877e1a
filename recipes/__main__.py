"""`python -m recipes`: every recipe with the first line of its docstring."""

from lockstep.__main__ import show_recipes

if __name__ == "__main__":
    show_recipes()
