"""What a logger is: it takes the curves of a run, on rank 0. A run has as many of them as `logger=` names.

`metrics.jsonl`, and `histograms.jsonl` where there are histograms, are always written, a line at a time, and are what a
resumed run relies on: what was logged after the checkpoint it starts from is dropped, for those steps are taken again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lockstep.utils.files import write_atomically

Scalars = dict[str, float | int]


@dataclass(frozen=True)
class Histogram:
    """How many numbers of a tensor lie in each of equal bins from `low` to `high`; their sum and sum of squares."""

    low: float
    high: float
    counts: list[int]
    total: float
    squares: float

    @property
    def edges(self) -> list[float]:
        """The ends of the bins, one more than there are bins."""
        return torch.linspace(self.low, self.high, len(self.counts) + 1, dtype=torch.float64).tolist()


@dataclass(frozen=True)
class Misclassified:
    """An image of the evaluation set that the trained model gets wrong: uint8 [3, H, W]."""

    sample: int
    label: int
    predicted: int
    image: Tensor

    @property
    def caption(self) -> str:
        return f"sample {self.sample}: {self.label}, predicted {self.predicted}"


class Logger:
    """Derive from it and override what you can show; the rest is not shown."""

    def log(self, scalars: Scalars) -> None:
        """A line of scalars, `step` among them."""

    def log_histograms(self, step: int, found: dict[str, Histogram]) -> None:
        """Histograms of weights and gradients, by name."""

    def log_misclassified(self, step: int, found: list[Misclassified]) -> None:
        """Some images that the trained model gets wrong, at the end."""

    def flush(self) -> None:
        """Have on disk what was logged: a checkpoint is about to say that it happened."""

    def close(self) -> None:
        """Nothing more will be logged."""


def visible(image: Tensor) -> Tensor:
    """An image [3, H, W], its pixels made large enough to be seen."""
    times = max(1, 64 // image.shape[-1])
    return image.repeat_interleave(times, 1).repeat_interleave(times, 2)


def keep_lines(path: Path, wanted: Callable[[str], bool]) -> None:
    """Drop what a run logged after the checkpoint from which it resumes, and a line that it died in."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if line.endswith("\n") and wanted(line):
                kept.append(line)
    write_atomically(path, "".join(kept))
