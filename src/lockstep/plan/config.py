"""The keys of recipes.plan, beside those that every recipe has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lockstep.config.keys import key
from lockstep.config.schema import ToolConfig


@dataclass
class PlanConfig(ToolConfig):
    task_defaults: ClassVar[dict[str, Any]] = {}
    recipes: list[str] | None = key(None, "recipes that are planned (null: all that can be)")
    gpus: int = key(8, "devices that the training is to have, in all", minimum=1, maximum=1024)
    hardware: str = key("h100", "kind of device: a profile of conf/plan, here (measured), or a FILE.yaml of yours")
    tokens: float | None = key(None, "tokens to train on, for the cost (null: `epochs` of the training set)", minimum=1)
    price: float | None = key(None, "what a device costs per hour, in any currency", minimum=0)
    check: bool = key(False, "hold predictions for this machine against real runs on it")
    json: bool = key(False, "print JSON instead of tables")
