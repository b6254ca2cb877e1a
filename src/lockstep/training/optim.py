"""optim."""

from __future__ import annotations

import math
from typing import Any

from lockstep.config.schema import OptimConfig


def lr_factor(config: OptimConfig, total_steps: int) -> Any:
    """step → factor on optim.lr: a linear warm-up, then constant or a half cosine down to 0.

    It spans all epochs even where max_steps ends the run earlier, so that a shorter run is a prefix of the longer one.
    Source: https://arxiv.org/abs/1608.03983 (cosine), https://arxiv.org/abs/1706.02677 (warm-up).
    """

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if config.schedule == "constant":
            return 1.0
        progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor
