"""clip."""

from __future__ import annotations

import fnmatch

from lockstep.config.schema import GradientsConfig
from lockstep.errors import UserError


def limits(config: GradientsConfig, names: list[str]) -> dict[str, float]:
    """{parameter: the limit on each number of its gradient}, from clip_value's patterns; the last that fits counts.

    Raises:
        UserError: a pattern fits no parameter.
    """
    found: dict[str, float] = {}
    for pattern, limit in (config.clip_value or {}).items():
        fitting = fnmatch.filter(names, pattern)
        if not fitting:
            some = ", ".join([*names[:2], *names[-2:]])
            raise UserError(f"gradients.clip_value.{pattern}: fits none of the model's parameters, such as {some}")
        found |= dict.fromkeys(fitting, float(limit))
    return found
