"""What a config key is: a dataclass field with its default, one line of help, and the rule its value is held to."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import field, fields, is_dataclass
from typing import Any

AUTO = "auto"  # a value that is decided later: found by trials, or chosen for the hardware
CUT_HELP = (
    "first layer of each further part: a name, a list, even (as many blocks each), or balanced (by measured cost); "
    "auto: layer3 where the model has one, else even"
)


def key(
    default: Any,
    help: str,
    choices: tuple[str | int, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    free: bool = False,
    open: bool = False,
    texts: bool = False,
) -> Any:
    """A config key, as the default of a dataclass field.

    Args:
        default: a tuple or a dict becomes a list or a dict of the config's own.
        help: one line, for `--help`.
        choices: the values that are allowed; (): any of the field's type.
        minimum: the smallest number that is allowed; of a list, the smallest that may be in it.
        maximum: the largest; None: what `lockstep.config.check` holds every number to.
        free: may change when a run is resumed; any other key would make it another training.
        open: its value is a dict whose own keys are the user's to name.
        texts: and their values are texts, taken as they are typed.
    """
    metadata: dict[str, Any] = {
        "help": help,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "nullable": default is None,
        "free": free,
        "open": open,
        "texts": texts,
    }
    if isinstance(default, tuple):
        return field(default_factory=lambda: list(default), metadata=metadata)
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


NO_RULE: dict[str, Any] = {
    "help": "",
    "choices": (),
    "minimum": None,
    "maximum": None,
    "nullable": True,
    "free": False,
    "open": False,
    "texts": False,
}


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield (dotted key, value, what `key` was given) for every leaf of a config object."""
    for entry in fields(config):
        value = getattr(config, entry.name)
        if is_dataclass(value):
            yield from walk(value, f"{prefix}{entry.name}.")
        elif entry.metadata or prefix.startswith("task."):  # within a dataclass of a task's, fields are plain
            yield f"{prefix}{entry.name}", value, NO_RULE | dict(entry.metadata)


def typed(name: str, value: Any) -> str:
    """A key and its value as a person would type them, but for the shell's own quotes."""
    return f"{name}={typed_value(value)}"


def typed_value(value: Any) -> str:
    """A value as it is typed after `key=`."""
    if isinstance(value, list):
        return f"[{','.join(map(typed_value, value))}]"
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z_/.][\w/.*-]*", value)
    special = isinstance(value, str) and value.lower() in ("true", "false", "null", "nan", "inf")
    return str(value) if plain and not special else json.dumps(value)
