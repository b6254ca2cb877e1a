"""The keys of recipes.compare, beside those that every recipe has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lockstep.config.keys import key
from lockstep.config.schema import ToolConfig


@dataclass
class CompareConfig(ToolConfig):
    # All recipes do the same work; one that cannot is left out, and says why.
    task_defaults: ClassVar[dict[str, Any]] = {}
    runs: list[str] | None = key(None, "no recipes but folders of finished runs, two or more; typed as A B …")
    recipes: list[str] | None = key(None, "recipes that are run (null: all)")
    rounds: int = key(3, "times that each recipe is run, in turn", minimum=1, maximum=1000)
    nprocs: list[int] | None = key(
        None, "ranks that each recipe is run on, typed as nproc=1,2,4 (null: one per GPU, else 2)"
    )
    hardware: str | None = key(
        None,
        "also say what recipes.plan predicts for it: here (measured), a profile of conf/plan, or a FILE.yaml of yours",
    )
    verify: bool = key(False, "also hold the recipes to recipes.single, with recipes.verify")
