"""Copies of a config, with other values or as another recipe's; and what of it a tool does not heed."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import fields
from typing import Any

from lockstep.config.declared import CommandLine
from lockstep.config.schema import Config, ConfigT
from lockstep.errors import UserError

# How ranks are started, whatever they do.
LAUNCHING = (
    "nproc", "device", "backend", "threads", "timeout_seconds", "max_restarts", "logs", "out", "launcher", "start",
)  # fmt: skip


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


def refuse_others(config: Config, tool: CommandLine, heeded: Collection[str], what: str) -> None:
    """Refuse keys that mean nothing where a tool trains nothing.

    Args:
        heeded: keys, and groups of them, that mean something; `cluster` among them.
        what: the words that have the tool train nothing.

    Raises:
        UserError: it names the first one.
    """
    from lockstep.config.compose import overrides  # Hydra, which no rank needs

    others = overrides(tool, config, tool, heeded)
    task = [word for word in others if word.startswith("task.name=")]  # the others may be that task's own
    if config.cluster and "cluster" not in heeded:
        others.append("+cluster")
    shown = f"task={config.task.name}" if task else others[0] if others else ""
    if shown:
        raise UserError(f"{shown}: means nothing to {what}; leave it out")


def convert(config: Config, schema: type[ConfigT]) -> ConfigT:
    """A config as another recipe's: what both have is copied, the rest has its defaults, as has what a tool was told
    nothing of."""
    nullable = {entry.name for entry in fields(schema) if entry.metadata.get("nullable", True)}
    both = {entry.name for entry in fields(schema)} & {entry.name for entry in fields(config)}
    given = {name: getattr(config, name) for name in both}
    return schema(
        **{name: copy.deepcopy(value) for name, value in given.items() if value is not None or name in nullable}
    )
