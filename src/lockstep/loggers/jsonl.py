"""metrics.jsonl, histograms.jsonl and misclassified.png: what every run has, whatever `logger=` names."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from lockstep.config.own_files import open_own
from lockstep.loggers.base import Histogram, Logger, Misclassified, Scalars, keep_lines, visible
from lockstep.utils.files import write_atomically


class JsonLinesLogger(Logger):
    """`metrics.jsonl`: a JSON object a line, readable while the run goes on."""

    def __init__(self, out: Path, step: int) -> None:
        for name in ("metrics.jsonl", "histograms.jsonl"):
            keep_lines(out / name, lambda line: json.loads(line)["step"] <= step)
        self._out = out
        # By line: a killed run keeps all it logged.
        self._file = open_own(out / "metrics.jsonl", "a", buffering=1, encoding="utf-8")

    def log(self, scalars: Scalars) -> None:
        self._file.write(json.dumps(scalars) + "\n")

    def log_histograms(self, step: int, found: dict[str, Histogram]) -> None:
        with open_own(self._out / "histograms.jsonl", "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step} | {name: asdict(each) for name, each in found.items()}) + "\n")

    def log_misclassified(self, step: int, found: list[Misclassified]) -> None:
        """`misclassified.png`, eight in a row; result.json says which they are."""
        from torchvision.utils import make_grid, save_image  # half a second, which a run without has not to wait for

        grid = make_grid(torch.stack([visible(each.image) for each in found]), nrow=8)
        stream = io.BytesIO()
        save_image(grid.float() / 255, stream, format="png")
        write_atomically(self._out / "misclassified.png", stream.getvalue())

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def logged(out: Path) -> Iterator[tuple[Scalars, dict[str, Histogram]]]:
    """All that a run has logged, in order of steps: (scalars, histograms)."""
    found: list[tuple[int, Scalars, dict[str, Histogram]]] = []
    for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        scalars = json.loads(line)
        found.append((scalars["step"], scalars, {}))
    if (out / "histograms.jsonl").exists():
        for line in (out / "histograms.jsonl").read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            step = entry.pop("step")
            found.append((step, {"step": step}, {name: Histogram(**each) for name, each in entry.items()}))
    for _, scalars, histograms in sorted(found, key=lambda each: each[0]):
        yield scalars, histograms
