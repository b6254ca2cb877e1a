"""Recipes by their names: those that come with lockstep, and a file of one's own by its path."""

from __future__ import annotations

import ast
import importlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lockstep.config.declared import own_recipe
from lockstep.errors import UserError
from lockstep.utils.places import sources

if TYPE_CHECKING:
    from lockstep.recipe import Recipe


def first_lines() -> dict[str, str]:
    """{recipe: its docstring's first line}, read without importing them: each would import torch."""
    return {name: (ast.get_docstring(tree) or "").partition("\n")[0] for name, tree in sources("recipes").items()}


def grouped_lines() -> dict[str, dict[str, str]]:
    """The same by what they are: techniques, techniques in another library's engine, and tools."""
    groups: dict[str, dict[str, str]] = {"Techniques": {}, "Techniques by another library's engine": {}, "Tools": {}}
    techniques, engines, tools = groups.values()
    lines = first_lines()
    for name, tree in sources("recipes").items():
        said = decorator_words(tree)
        (tools if "looks_at" in said else engines if "needs" in said else techniques)[name] = lines[name]
    return groups


def list_recipes() -> list[str]:
    """The names of the techniques; tools that run recipes, and demonstrations, are left out."""
    return [name for name, tree in sources("recipes").items() if is_technique(tree)]


def is_technique(tree: ast.Module) -> bool:
    """Whether a recipe is a training to be compared with others: it says neither `looks_at` nor single_training=False."""
    said = decorator_words(tree)
    return "looks_at" not in said and said.get("single_training") != "False"


def decorator_words(tree: ast.Module) -> dict[str | None, str]:
    """{key: value} that `@recipe(…)` of a recipe's file is given, as they are written."""
    calls = [
        decorator
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == "train"
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call)
    ]
    return {word.arg: ast.unparse(word.value) for call in calls for word in call.keywords}


def choose(names: list[str] | None) -> list[str]:
    """The recipes a tool is to run: those that are named, also files of one's own, or all that come with lockstep.

    Raises:
        UserError: a name is not one of them, or a file holds no recipe, or an empty list names none.
    """
    every = list_recipes()
    if names == []:
        raise UserError(f"recipes=[]: names none; allowed are {', '.join(every)}, or a FILE.py of yours")
    for name in names or []:
        check_name(name, f"recipes=[{name}]")
    return names or every


def check_name(name: str, asked: str) -> None:
    """Hold a recipe's name to those there are; a path is held to what is in the file.

    Args:
        asked: key and value, which an error begins with.

    Raises:
        UserError: there is no such recipe.
    """
    if is_file(name):
        own_recipe(asked, Path(name))
    elif name not in (every := list_recipes()):
        raise UserError(f"{asked}: no such recipe; allowed are {', '.join(every)}, or a FILE.py of yours")


def is_file(name: str) -> bool:
    """Whether a recipe is named by the path of its file."""
    return name.endswith(".py")


def get_recipe(name: str) -> Recipe:
    """A recipe by its name, or by the path of its file."""
    if is_file(name):
        file = Path(name).expanduser().resolve()
        own: Recipe = own_recipe(f"recipes=[{name}]", file)
        return replace(own, target=str(file))  # imported it has a module's name, by which no command could start it
    found: Recipe = importlib.import_module(f"lockstep.recipes.{name}").train
    return found
