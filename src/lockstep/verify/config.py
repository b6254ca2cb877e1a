"""The keys of recipes.verify and of recipes.diff, beside those that every recipe has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from lockstep.config.keys import AUTO, key
from lockstep.config.schema import NARROW, ModelConfig, ToolConfig

OF_PROGRAMS = ("steps", "tolerance", "limit_seconds")  # keys that go with program=…


@dataclass
class VerifyConfig(ToolConfig):
    # All recipes are held to one task; what one of them needs, its proof sets.
    task_defaults: ClassVar[dict[str, Any]] = {}
    global_batch_size: Any = key(
        AUTO, "samples of a step, over all ranks; auto: 14 for each rank, or fewer where there are fewer", minimum=1
    )
    model: ModelConfig = field(default_factory=lambda: ModelConfig(NARROW))  # as in conf/verify.yaml
    recipes: list[str] | None = key(None, "recipes that are proven, also FILE.py (null: all of lockstep's)")
    against: str | None = key(
        None,
        "what a recipe of your own must equal: single; self, itself on one rank; FILE.py, that on one rank (null: "
        "single if it declares a proof or trains run.task, else self); what program=… must: another command; or the "
        "verify.json of an earlier run, to see what has changed since (docs/proof.md)",
    )
    interrupt: int | None = key(
        None, "step after which each training is cut off, and resumed from its checkpoint (null: none is)", minimum=1
    )
    museum: str | None = key(
        None, "break a recipe by a bug that really happened, and see it found; list: their names (docs/museum.md)"
    )
    trace: bool = key(False, "of a row that is off, also name the first layer and operation that differ")
    simulate: int | None = key(
        None,
        "so many ranks in this one process, each a thread, in fp64; of recipes that cut what is trained (null: real ones)",
        minimum=2,
        maximum=256,
    )
    program: str | None = key(
        None,
        "no recipe but a program of your own: a command such as 'torchrun --nproc-per-node=2 train.py', which is held to "
        "against='python train.py' (docs/your_program.md)",
    )
    steps: int = key(3, "program: steps of each of the two that are compared", minimum=1)
    tolerance: float | None = key(
        None, "program: largest relative difference that is equal (null: by the precision that is found)", minimum=0
    )
    limit_seconds: float = key(600, "program: longest that each of the two may take", minimum=1)


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
