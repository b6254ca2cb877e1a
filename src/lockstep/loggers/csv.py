"""metrics.csv."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from lockstep.config.own_files import open_own
from lockstep.loggers.base import Logger, Scalars, keep_lines
from lockstep.utils.files import write_atomically


class CsvLogger(Logger):
    """`metrics.csv`, for spreadsheets: one column a scalar, empty where a step has none."""

    COLUMNS = ("step", "epoch", "samples_seen", "loss", "lr", "loss_scale", "skipped_steps", "eval_loss")

    def __init__(self, out: Path, step: int, columns: Sequence[str] = ()) -> None:
        self._path = out / "metrics.csv"
        keep_lines(self._path, lambda line: line.startswith("step,") or int(line.partition(",")[0]) <= step)
        self._open([*self.COLUMNS, *columns])

    def _open(self, columns: Sequence[str]) -> None:
        """Write the file anew with these columns and all that it has, for a run that now logs other things."""
        path = self._path
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        before = list(csv.DictReader(io.StringIO(text, newline="")))
        self._names = list(dict.fromkeys([*columns, *(before[0] if before else ())]))
        anew = io.StringIO(newline="")
        writer = csv.DictWriter(anew, self._names)
        writer.writeheader()
        writer.writerows(before)
        write_atomically(path, anew.getvalue())
        self._file = open_own(path, "a", buffering=1, newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, self._names)

    def log(self, scalars: Scalars) -> None:
        if more := [name for name in scalars if name not in self._names]:  # a metric's first value
            self._file.close()
            self._open([*self._names, *more])
        self._writer.writerow(scalars)

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
