"""Where a run's curves go: one writer a run, on rank 0."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, Protocol

Scalars = dict[str, float | int]


class Monitor(Protocol):
    """Takes one line of scalars a logged step."""

    def log(self, scalars: Scalars) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """`metrics.jsonl`: a JSON object a line, readable while the run goes on."""

    def __init__(self, out: Path) -> None:
        self._file = (out / "metrics.jsonl").open("a", buffering=1)  # by line: a killed run keeps all it logged

    def log(self, scalars: Scalars) -> None:
        self._file.write(json.dumps(scalars) + "\n")

    def close(self) -> None:
        self._file.close()


class Csv:
    """`metrics.csv`, for spreadsheets: one column a scalar, empty where a step has none."""

    COLUMNS = ("step", "epoch", "samples_seen", "loss", "lr", "images_per_second", "eval_loss", "eval_accuracy")

    def __init__(self, out: Path) -> None:
        self._file = (out / "metrics.csv").open("a", buffering=1, newline="")
        self._writer = csv.DictWriter(self._file, self.COLUMNS, extrasaction="ignore")
        if self._file.tell() == 0:
            self._writer.writeheader()

    def log(self, scalars: Scalars) -> None:
        self._writer.writerow(scalars)

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """`tensorboard/`: event files for `tensorboard --logdir`."""

    def __init__(self, out: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # only who asks for it imports it

        self._writer: Any = SummaryWriter(str(out / "tensorboard"))

    def log(self, scalars: Scalars) -> None:
        for name, value in scalars.items():
            if name != "step":
                self._writer.add_scalar(name, value, scalars["step"])

    def close(self) -> None:
        self._writer.close()


def open_monitors(name: str, out: Path) -> list[Monitor]:
    """The writers of a run: metrics.jsonl always, and the one that `monitor=` names."""
    chosen: Monitor = TensorBoard(out) if name == "tensorboard" else Csv(out)
    return [JsonLines(out), chosen]
