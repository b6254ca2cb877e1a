"""The bounds of a composed config: what can be said of each value alone, before anything starts and without torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from lockstep.config.keys import AUTO, walk
from lockstep.config.schema import LAST, OPTIMIZERS, Config, GradientsConfig
from lockstep.errors import UserError

# What every key is held to that has no bounds of its own. A larger number of steps or samples is no training's, and would
# overflow in a library: Slurm's numbers have 32 bits, a factor of fp32's ends at 3e38.
LARGEST_INT = 2**31 - 1
LARGEST_FLOAT = 1e30


def check_values(config: Config) -> None:
    """Hold every key to its own choices and bounds, and to what can be said of it alone.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """
    if config.global_batch_size != AUTO and type(config.global_batch_size) is not int:
        raise UserError(f"global_batch_size={config.global_batch_size}: allowed are whole numbers from 1 up, or {AUTO}")
    if not 0 < config.memory_fraction <= 1:
        raise UserError(f"memory_fraction={config.memory_fraction}: allowed are numbers above 0, up to 1")
    minutes = config.checkpoint.minutes
    if minutes != AUTO and type(minutes) not in (int, float):
        raise UserError(f"checkpoint.minutes={minutes}: allowed are numbers from 0 up, or {AUTO}")
    if config.resume == LAST and config.out is not None:
        raise UserError(
            f"resume={LAST}: finds its run in the default place, and out={config.out} names one; leave one out"
        )
    check_rules(config)
    if config.task.name == "images" and config.metric not in (None, "eval_accuracy", "eval_loss", "eval_f1"):
        raise UserError(f"metric={config.metric}: allowed are eval_accuracy, eval_loss, eval_f1")
    if config.optim.name not in OPTIMIZERS and not config.optim.name.startswith("torch.optim."):
        raise UserError(
            f"optim.name={config.optim.name}: allowed are {', '.join(OPTIMIZERS)}, and the classes of torch.optim, such "
            "as torch.optim.RMSprop"
        )
    check_limits(config.gradients)
    asked = config.checkpoint_activations
    if asked not in ("none", "full", "selective") and not (type(asked) is int and asked >= 1):
        raise UserError(f"checkpoint_activations={asked}: allowed are none, full, selective, and numbers from 1 up")
    if asked != "none" and config.compile:
        raise UserError(
            f"checkpoint_activations={asked}: compile=true decides by itself what is computed again; leave one out"
        )


def check_limits(config: GradientsConfig) -> None:
    """Hold what gradients are measured against to numbers above 0; raises UserError."""
    values = config.clip_value
    if values is not None and not isinstance(values, dict):
        raise UserError(f"gradients.clip_value={values}: allowed are a pattern and a number, such as {{fc.*: 0.1}}")
    limits = {"warn_above": config.warn_above, "clip_norm": config.clip_norm}
    limits |= {f"clip_value.{name}": value for name, value in (values or {}).items()}
    if config.stop_on_nan and config.allow_nan:
        raise UserError("gradients.allow_nan=true: allowed is false where gradients.stop_on_nan=true")
    for name, limit in limits.items():
        if limit is not None and not (type(limit) in (int, float) and limit > 0 and math.isfinite(limit)):
            raise UserError(f"gradients.{name}={limit}: allowed are finite numbers above 0")


def check_rules(config: Any) -> None:
    """Hold every key to its own choices and bounds.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """
    for name, value, rule in walk(config):
        if value == AUTO and AUTO not in rule["choices"]:
            continue
        if rule["choices"] and not is_choice(value, rule):
            allowed = (str(each).lower() if isinstance(each, bool) else str(each) for each in rule["choices"])
            shown = "null" if value is None else value
            raise UserError(f"{name}={shown}: allowed are {', '.join(allowed)}")
        if value == "" and not rule["open"] and not name.startswith("task."):
            raise UserError(f"{name}=: is empty; allowed are texts of at least one character, or leave {name} away")
        for where, number in numbers_in(name, value):
            if allowed_numbers := out_of_bounds(name, number, rule):
                shown = number if isinstance(value, dict) else value
                raise UserError(f"{where}={shown}: allowed are {allowed_numbers}")


def numbers_in(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """(key, number) of each number in a value: of a dict the key has the number's own name, of a list it is the list's."""
    if isinstance(value, dict):
        for inner, each in value.items():
            yield from numbers_in(f"{name}.{inner}", each)
    elif isinstance(value, list):
        for each in value:
            yield from numbers_in(name, each)
    elif type(value) in (int, float):
        yield name, value


def is_choice(value: Any, rule: dict[str, Any]) -> bool:
    """Whether a value is one of those that are allowed, of their type too: 1 is not true."""
    if value is None:
        return bool(rule["nullable"])
    return any(value == each and type(value) is type(each) for each in rule["choices"])


def out_of_bounds(name: str, number: float, rule: dict[str, Any]) -> str:
    """What is allowed where a number is not; nothing where it is."""
    least, most = rule["minimum"], rule["maximum"]
    if not math.isfinite(number):
        return "finite numbers"
    if (least is not None and number < least) or (most is not None and number > most):
        if most is None:
            return f"numbers from {least} up"
        return f"numbers up to {most}" if least is None else f"{least}…{most}"
    limit = LARGEST_INT if isinstance(number, int) else LARGEST_FLOAT
    if abs(number) > limit and most is None and not name.startswith("task."):  # of a task's, its own fields say it
        return f"numbers up to {limit}" if number > 0 else f"numbers from -{limit} up"
    return ""
