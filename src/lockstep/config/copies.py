"""Copies of a config: with other values, or as another recipe's."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

from lockstep.config.schema import Config, ConfigT


def with_values(config: ConfigT, values: dict[str, Any]) -> ConfigT:
    """A copy of a config with some dotted keys set."""
    config = copy.deepcopy(config)
    for name, value in values.items():
        *path, last = name.split(".")
        node: Any = config
        for part in path:
            node = getattr(node, part)
        assert hasattr(node, last), f"no key {name}"
        setattr(node, last, value)
    return config


def convert(config: Config, schema: type[ConfigT]) -> ConfigT:
    """A config as another recipe's: what both have is copied, the rest has its defaults, as has what a tool was told
    nothing of."""
    nullable = {entry.name for entry in fields(schema) if entry.metadata.get("nullable", True)}
    both = {entry.name for entry in fields(schema)} & {entry.name for entry in fields(config)}
    given = {name: getattr(config, name) for name in both}
    return schema(
        **{name: copy.deepcopy(value) for name, value in given.items() if value is not None or name in nullable}
    )
