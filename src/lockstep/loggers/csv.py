"""metrics.csv."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from lockstep.loggers.base import Logger, Scalars, keep_lines
from lockstep.utils.files import write_atomically


class CsvLogger(Logger):
    """`metrics.csv`, for spreadsheets: one column a scalar, empty where a step has none."""

    COLUMNS = (
        *("step", "epoch", "samples_seen", "loss", "lr", "images_per_second", "peak_memory_bytes"),
        *("loss_scale", "skipped_steps", "eval_loss", "eval_accuracy", "eval_f1"),
    )

    def __init__(self, out: Path, step: int, columns: Sequence[str] = ()) -> None:
        path = out / "metrics.csv"
        keep_lines(path, lambda line: line.startswith("step,") or int(line.partition(",")[0]) <= step)
        before = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
        names = list(dict.fromkeys([*self.COLUMNS, *columns, *(before[0] if before else ())]))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, names)
        writer.writeheader()  # with other columns than before, where it now logs other things
        writer.writerows(before)
        write_atomically(path, text.getvalue())
        self._file = path.open("a", buffering=1, newline="")
        self._writer = csv.DictWriter(self._file, names, extrasaction="ignore")

    def log(self, scalars: Scalars) -> None:
        self._writer.writerow(scalars)

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
