"""The recipes that come with lockstep: their names, what they are, and one of them by its name."""

from __future__ import annotations

import ast
import importlib
from typing import TYPE_CHECKING

from lockstep.errors import UserError
from lockstep.utils.places import sources

if TYPE_CHECKING:
    from lockstep.recipe import Recipe


def first_lines() -> dict[str, str]:
    """{recipe: its docstring's first line}, read without importing them: each would import torch."""
    return {name: (ast.get_docstring(tree) or "").partition("\n")[0] for name, tree in sources("recipes").items()}


def list_recipes() -> list[str]:
    """The names of the techniques; tools that run recipes, and demonstrations, are left out."""
    return [name for name, tree in sources("recipes").items() if is_technique(tree)]


def is_technique(tree: ast.Module) -> bool:
    """Whether a recipe is a training to be compared with others: it says neither `looks_at` nor single_training=False."""
    calls = [
        decorator
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == "train"
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call)
    ]
    said = {word.arg: ast.unparse(word.value) for call in calls for word in call.keywords}
    return "looks_at" not in said and said.get("single_training") != "False"


def choose(names: list[str] | None) -> list[str]:
    """The recipes a tool is to run: those that are named, or all.

    Raises:
        UserError: a name is not one of them.
    """
    every = list_recipes()
    wrong = [name for name in names or [] if name not in every]
    if wrong:
        raise UserError(f"recipes=[{','.join(wrong)}]: no such recipe; allowed are {', '.join(every)}")
    return names or every


def get_recipe(name: str) -> Recipe:
    """A recipe by its name."""
    found: Recipe = importlib.import_module(f"lockstep.recipes.{name}").train
    return found
