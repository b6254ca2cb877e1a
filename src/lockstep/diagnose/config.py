"""The keys of recipes.doctor, beside those that every recipe has."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep.config.keys import key
from lockstep.config.schema import Config


@dataclass
class DoctorConfig(Config):
    recipes: list[str] = key(("ddp",), "the recipe that is looked at")
    check: str = key(
        "preflight",
        "what is looked at: whether a run would work here, where its memory goes, or what the hardware achieves",
        ("preflight", "memory", "hardware"),
    )
    run: str | None = key(None, "a run's folder, which is read instead", free=True)
