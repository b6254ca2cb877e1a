"""`recipes/`, `launchers/` and `conf/` lie at the top of the repository, and in an installed wheel in `lockstep/`.

They are found by that place, as `lockstep.recipes` and so on, and not by a top-level name: a folder `recipes`,
`launchers` or `conf` of the user's own, or a `conf.py`, breaks nothing.
"""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType


@cache
def folder(name: str) -> Path:
    """Where `recipes`, `launchers` or `conf` is."""
    spec = importlib.util.find_spec(f"lockstep.{name}")
    assert spec, f"lockstep is installed without {name}/"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


@cache
def sources(name: str) -> dict[str, ast.Module]:
    """{module: its syntax tree} of a folder, without importing any: most would import torch."""
    return {file.stem: ast.parse(file.read_text(encoding="utf-8")) for file in sorted(folder(name).glob("[!_]*.py"))}


def as_installed(text: str) -> str:
    """A text whose commands name recipes as they can be typed here: `-m lockstep.recipes.NAME` in an installed wheel."""
    return text if top_level("recipes") else text.replace("-m recipes.", "-m lockstep.recipes.")


@cache
def top_level(name: str) -> bool:
    """Whether `import NAME` gives lockstep's folder of that name, as it does in the repository."""
    spec = importlib.util.find_spec(name)
    return spec is not None and str(folder(name)) in (spec.submodule_search_locations or ())


class Alias(importlib.machinery.SourceFileLoader):
    """Imports `lockstep.recipes.ddp` for `recipes.ddp`. `python -m recipes.ddp` still runs the source itself."""

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(f"lockstep.{module.__name__}")


class AliasFinder:
    """Makes modules of a top-level package aliases of those in `lockstep.PACKAGE`: never two copies of one module."""

    def __init__(self, package: str) -> None:
        self.prefix = f"{package}."

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(self.prefix):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec and spec.origin:
            spec.loader = Alias(name, spec.origin)
        return spec


def alias(package: str) -> None:
    """Called by `recipes/__init__.py` and `launchers/__init__.py` where they are imported under their top-level name."""
    sys.meta_path.insert(0, AliasFinder(package))
