"""Where a run's curves go: one writer a run, on rank 0."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from lockstep.files import write_atomically

Scalars = dict[str, float | int]


class Monitor(Protocol):
    """Takes one line of scalars a logged step."""

    def log(self, scalars: Scalars) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """`metrics.jsonl`: a JSON object a line, readable while the run goes on."""

    def __init__(self, out: Path, step: int) -> None:
        path = out / "metrics.jsonl"
        keep_lines(path, lambda line: json.loads(line)["step"] <= step)
        self._file = path.open("a", buffering=1)  # by line: a killed run keeps all it logged

    def log(self, scalars: Scalars) -> None:
        self._file.write(json.dumps(scalars) + "\n")

    def close(self) -> None:
        self._file.close()


class Csv:
    """`metrics.csv`, for spreadsheets: one column a scalar, empty where a step has none."""

    COLUMNS = (
        *("step", "epoch", "samples_seen", "loss", "lr", "images_per_second", "loss_scale", "skipped_steps"),
        *("eval_loss", "eval_accuracy", "eval_f1"),
    )

    def __init__(self, out: Path, step: int) -> None:
        path = out / "metrics.csv"
        keep_lines(path, lambda line: line.startswith("step,") or int(line.partition(",")[0]) <= step)
        self._file = path.open("a", buffering=1, newline="")
        self._writer = csv.DictWriter(self._file, self.COLUMNS, extrasaction="ignore")
        if self._file.tell() == 0:
            self._writer.writeheader()

    def log(self, scalars: Scalars) -> None:
        self._writer.writerow(scalars)

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """`tensorboard/`: event files for `tensorboard --logdir`."""

    def __init__(self, out: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # only who asks for it imports it

        self._writer: Any = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def log(self, scalars: Scalars) -> None:
        for name, value in scalars.items():
            if name != "step":
                self._writer.add_scalar(name, value, scalars["step"])

    def close(self) -> None:
        self._writer.close()


def keep_lines(path: Path, wanted: Callable[[str], bool]) -> None:
    """Drop what a run logged after the checkpoint from which it now goes on, and a line that it died in."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if line.endswith("\n") and wanted(line):
                kept.append(line)
    write_atomically(path, "".join(kept))


def open_monitors(name: str, out: Path, step: int = 0) -> list[Monitor]:
    """The writers of a run: metrics.jsonl always, and the one that `monitor=` names.

    Args:
        step: steps done; what was logged of later ones is dropped, for they are now taken again.
    """
    chosen: Monitor = TensorBoard(out, step) if name == "tensorboard" else Csv(out, step)
    return [JsonLines(out, step), chosen]
