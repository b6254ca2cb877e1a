"""The keys of recipes.verify, beside those that every recipe has."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep.config.keys import key
from lockstep.config.schema import ToolConfig


@dataclass
class VerifyConfig(ToolConfig):
    recipes: list[str] | None = key(None, "recipes that are held to recipes.single (null: all)")
