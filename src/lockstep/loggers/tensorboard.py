"""Event files for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lockstep.config.schema import Config, to_yaml
from lockstep.loggers.base import Histogram, Logger, Misclassified, Scalars, visible


class TensorBoardLogger(Logger):
    """`tensorboard/`: event files for `tensorboard --logdir`."""

    def __init__(self, out: Path, step: int, config: Config) -> None:
        from torch.utils.tensorboard import SummaryWriter  # only who asks for it imports it

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
