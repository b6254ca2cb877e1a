"""The keys of recipes.tune, beside those that every recipe has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lockstep.config.keys import key
from lockstep.config.schema import MOST_RANKS, ToolConfig


@dataclass
class Search:
    recipe: str = key("ddp", "recipe whose settings are searched")
    space: dict[str, Any] = key(
        {},
        "config key: where its values come from, such as {optim: {lr: 'loguniform(1e-4, 1e-1)'}}",
        open=True,
        texts=True,
    )
    trials: int = key(8, "settings that are tried", minimum=1, maximum=100_000)
    concurrent: int | None = key(
        None,
        "trials at once (null: as many as there are cores or GPUs for)",
        minimum=1,
        maximum=MOST_RANKS,
        free=True,
    )
    nproc: int | None = key(
        None, "ranks of a trial (null: as many as the recipe alone would have)", minimum=1, maximum=MOST_RANKS
    )
    search: str = key("random", "what draws the settings", ("random", "optuna"))
    scheduler: str = key("asha", "asha: stop early those trials that are behind", ("asha", "none"))
    grace: int = key(1, "asha: evaluations that every trial gets", minimum=1)
    reduction: int = key(2, "asha: of so many trials at a rung, one goes on", minimum=2)
    address: str | None = key(None, "an existing Ray cluster: auto, or HOST:PORT (null: this machine)", free=True)


@dataclass
class TuneConfig(ToolConfig):
    tune: Search = field(default_factory=Search)
