"""The module that starts the ranks: one of `launchers/` by its short name, or any importable module of the user's."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from types import ModuleType

from lockstep.config.tasks import where
from lockstep.errors import UserError
from lockstep.utils.places import sources

STARTERS = {"launch", "submit"}  # a launcher has one of these functions


def list_launchers() -> list[str]:
    """The short names of the launchers that come with lockstep."""
    functions = {
        name: {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        for name, tree in sources("launchers").items()
    }
    return [name for name, found in functions.items() if found & STARTERS]


def launcher_module(name: str) -> str:
    """The full name of a launcher's module: `slurm` is lockstep.launchers.slurm, any other name stands for itself.

    `launchers.slurm`, as older configs have it, is a module of the user's own where there is one, else ours.
    """
    short = name.removeprefix("launchers.")
    if short in list_launchers() and (short == name or not importable(name)):
        return f"lockstep.launchers.{short}"
    return name


def is_module_name(name: str) -> bool:
    """Whether a text could name a module: `launchers.slurm`, and not `../slurm`."""
    return all(part.isidentifier() for part in name.split("."))


def importable(name: str) -> bool:
    """Whether there is a module of this name."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # its package is missing, or is none
        return False


def load_launcher(name: str, key: str = "launcher") -> ModuleType:
    """Import the module that a config names to start the ranks.

    Raises:
        UserError: there is none, it cannot be imported, or it starts nothing.
    """
    allowed = f"allowed are {', '.join(list_launchers())}, or a module of your own"
    module = launcher_module(name)
    try:
        if not is_module_name(name):
            raise ModuleNotFoundError(name=name)
        found = importlib.import_module(module)
    except Exception as error:  # it is the user's, and may do anything
        if isinstance(error, ModuleNotFoundError) and module.startswith(str(error.name)):
            raise UserError(f"{key}={name}: no such module; {allowed}") from None
        raise UserError(f"{key}={name}: cannot be imported: {where(error, None)}") from None
    if not any(hasattr(found, function) for function in STARTERS):
        raise UserError(f"{key}={name}: has neither launch nor submit; {allowed}")
    return found
