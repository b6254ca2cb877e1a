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
    gpus: int = key(8, "devices that the training is to have, in all", minimum=1, maximum=16384)
    hardware: str = key("h100", "kind of device: a profile of conf/plan, here (measured), or a FILE.yaml of yours")
    tokens: float | None = key(None, "tokens to train on, for the cost (null: `epochs` of the training set)", minimum=1)
    network: str | None = key(None, "what links the nodes, of conf/plan/links (null: as in the hardware's profile)")
    interconnect: str | None = key(
        None, "what links the devices of a node, of conf/plan/links (null: as in the profile)"
    )
    curve: bool = key(False, "plan 8, 16, 32 … `gpus` devices, and say where each strategy stops scaling")
    scaling: str = key(
        "weak", "curve=true: `global_batch_size` grows with the devices (weak), or not (strong)", ("weak", "strong")
    )
    plot: str | None = key(None, "curve=true: also draw it, into this FILE.png or FILE.svg")
    price: float | None = key(None, "what a device costs per hour, in any currency", minimum=0)
    check: bool = key(False, "hold predictions for this machine against real runs on it")
    json: bool = key(False, "print JSON instead of tables")
