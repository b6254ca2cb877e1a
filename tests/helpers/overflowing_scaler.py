"""fp16 that is quick, and steps that are left out at known places, for tests of the loss scale and its state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from lockstep import run
from lockstep.training import precision
from lockstep.training.precision import Scaler

LIMIT = 2.0**17
WORDS = ("precision=fp16", "loss_scale=524288")  # 4 × LIMIT: the first two steps are left out, then every third


class Overflowing(Scaler):
    """Whose scaled loss is infinite above LIMIT: what it does follows from its scale and its count of good steps."""

    def scale(self, outputs: Any) -> Any:
        return super().scale(outputs) * (torch.inf if self.is_enabled() and self.get_scale() > LIMIT else 1.0)


@contextmanager
def overflowing() -> Iterator[None]:
    """Every run's scaler is such a one, which grows after two good steps; ranks are forked, so they inherit it.

    And fp16 is computed in bf16, ten times as fast on CPUs, except where Lightning computes it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(precision.AUTOCAST, "fp16", torch.bfloat16)
        patch.setattr(precision, "GOOD_STEPS", 2)
        patch.setattr(run, "Scaler", Overflowing)
        yield
