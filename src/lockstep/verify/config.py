"""The keys of recipes.verify and of recipes.diff, beside those that every recipe has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lockstep.config.keys import AUTO, key
from lockstep.config.schema import ToolConfig


@dataclass
class VerifyConfig(ToolConfig):
    # All recipes are held to one task; what one of them needs, its proof sets.
    task_defaults: ClassVar[dict[str, Any]] = {}
    global_batch_size: Any = key(
        AUTO, "samples of a step, over all ranks; auto: 14 for each rank, or fewer where there are fewer", minimum=1
    )
    recipes: list[str] | None = key(None, "recipes that are proven, also FILE.py (null: all of lockstep's)")
    against: str | None = key(
        None,
        "what a recipe of your own must equal: single; self, itself on one rank; FILE.py, that on one rank (null: "
        "single if it declares a proof or trains run.task, else self)",
    )
    interrupt: int | None = key(
        None, "step after which each training is cut off, and resumed from its checkpoint (null: none is)", minimum=1
    )
    museum: str | None = key(
        None, "break a recipe by a bug that really happened, and see it found; list: their names (docs/museum.md)"
    )
    trace: bool = key(False, "of a row that is off, also name the first layer and operation that differ")


@dataclass
class DiffConfig(ToolConfig):
    task_defaults: ClassVar[dict[str, Any]] = {}
    runs: list[str] | None = key(None, "the two: folders of runs with record_tensors, or recipes; typed as A B")
    tolerance: float | None = key(
        None, "largest relative difference that is none (null: 1e-10 in fp64, 1e-3 in fp32, 5e-2 in 16 bits)", minimum=0
    )
    record_tensors: int = key(2, "recipes: steps that both are trained for", minimum=1, maximum=100)
    global_batch_size: Any = key(
        AUTO, "samples of a step, over all ranks; auto: 14 for each rank, or fewer where there are fewer", minimum=1
    )
