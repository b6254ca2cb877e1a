"""Which loggers a run has: those that `logger=` names, and metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lockstep.config.schema import Config
from lockstep.loggers.base import Logger
from lockstep.loggers.csv import CsvLogger
from lockstep.loggers.jsonl import JsonLinesLogger, logged
from lockstep.loggers.tensorboard import TensorBoardLogger
from lockstep.loggers.wandb import WandbLogger


def build_loggers(
    out: Path,
    config: Config,
    *,
    name: str,
    step: int = 0,
    columns: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> list[Logger]:
    """The loggers of a run: metrics.jsonl always, and those that `logger=` names.

    Args:
        name: of the run, for a board that shows several.
        step: steps done; what was logged of later ones is dropped, for they are taken again.
        columns: scalars that only some runs have.
        say: what prints a line.
    """
    asked = config.logger
    opened: list[Logger] = [JsonLinesLogger(out, step)]
    if asked.csv:
        opened.append(CsvLogger(out, step, columns))
    if asked.tensorboard:
        opened.append(TensorBoardLogger(out, step, config))
    if asked.wandb:
        opened.append(WandbLogger(out, config, name, logged(out), say, min(30.0, config.timeout_seconds / 2)))
    return opened
