"""Makes this interpreter's CUDA devices the emulated ones, as soon as it has imported torch."""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]


def install() -> None:
    """Load the package by its place: nothing of this repository need be importable where the command runs."""
    spec = importlib.util.spec_from_file_location(
        "emulated_gpu", PACKAGE / "__init__.py", submodule_search_locations=[str(PACKAGE)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["emulated_gpu"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    importlib.import_module("emulated_gpu.emulate").install()


class AfterTorch(MetaPathFinder):
    """Finds torch as everybody would, and has `install` follow its import."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_and_install(module: ModuleType) -> None:
            load(module)
            install()

        spec.loader.exec_module = load_and_install  # type: ignore[method-assign]
        return spec


if os.environ.get("EMULATED_GPUS"):
    import importlib

    sys.meta_path.insert(0, AfterTorch())
