"""Event files for TensorBoard."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lockstep.config.schema import Config, to_yaml
from lockstep.loggers.base import Histogram, Logger, Misclassified, Scalars, visible

EVENTS = "events.out.tfevents."  # then the second in which the file was made, ten digits, host and process


class TensorBoardLogger(Logger):
    """`tensorboard/`: event files for `tensorboard --logdir`.

    Each start begins its file with the step from which on it takes the place of what is there. TensorBoard then says that
    it has found steps out of order and purges them, also where this start comes to log nothing: what it purges are steps
    that will be taken again, and metrics.jsonl has lost them as well.
    """

    def __init__(self, out: Path, step: int, config: Config) -> None:
        from torch.utils.tensorboard import SummaryWriter  # only who asks for it imports it

        read_before(out / "tensorboard", time.time())
        self._writer: Any = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
        self._writer.add_text("config", "".join(f"    {line}\n" for line in to_yaml(config).splitlines()), step)

    def log(self, scalars: Scalars) -> None:
        for name, value in scalars.items():
            if name != "step":
                self._writer.add_scalar(name, value, scalars["step"])

    def log_histograms(self, step: int, found: dict[str, Histogram]) -> None:
        for name, each in found.items():
            self._writer.add_histogram_raw(
                name,
                min=each.low,
                max=each.high,
                num=sum(each.counts),
                sum=each.total,
                sum_squares=each.squares,
                bucket_limits=each.edges[1:],
                bucket_counts=each.counts,
                global_step=step,
            )

    def log_misclassified(self, step: int, found: list[Misclassified]) -> None:
        for number, each in enumerate(found):
            self._writer.add_image(f"misclassified/{number}", visible(each.image), step)
            self._writer.add_text(f"misclassified/{number}", each.caption, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def read_before(folder: Path, now: float) -> None:
    """See to it that TensorBoard, which reads files by their names, reads those that are there before one made now.

    The clock of another node, on which an earlier start ran, may be ahead, and two starts may begin in one second: the
    earlier one's first event would then purge what the later one has logged.
    """
    there = sorted(folder.glob(f"{EVENTS}*"))
    if there and there[-1].name >= f"{EVENTS}{int(now):010d}":
        for number, path in enumerate(there, 1):
            rest = path.name.removeprefix(EVENTS).partition(".")[2]
            path.rename(path.with_name(f"{EVENTS}{number:010d}.{rest}"))
