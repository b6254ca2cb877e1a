"""What a comparison reports: its rows, and what a reader must know of how they came about."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import Any

from lockstep.compare.config import CompareConfig
from lockstep.compare.figures import ComparisonRow
from lockstep.recipe import Recipe
from lockstep.utils.places import as_installed
from lockstep.utils.text import count, interpreter


@dataclass(frozen=True)
class ComparisonReport:
    """All that a report says.

    Attributes:
        about: of the work, by name.
        verified: rows of recipes.verify.
        verify_problem: why there are none, or what is off.
        left_out: combinations that were not run, and why.
        failed: those that ended before their time, and their last words.
        environment: as in environment.json.
        config: YAML.
        command: what gives this report again.
        out: the folder the runs' are in.
    """

    title: str
    about: dict[str, str]
    rows: list[ComparisonRow]
    environment: dict[str, Any]
    config: str
    command: str
    out: str
    written: str
    verified: list[dict[str, Any]] = field(default_factory=list)
    verify_problem: str = ""
    left_out: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        return [*self.failed, *([self.verify_problem] if self.verify_problem else [])]


def repeat_command(config: CompareConfig, tool: Recipe) -> str:
    """The command that repeats the comparison in a new folder."""
    from lockstep.config.compose import overrides

    words = [
        word.replace("nprocs=[", "nproc=").rstrip("]") if word.startswith("nprocs=") else word
        for word in overrides(tool, config, tool, {"out", "nproc"})
    ]
    return as_installed(f"{interpreter()} -m recipes.compare {shlex.join(words)}".strip())


def describe_work(config: CompareConfig, device: str, trained: tuple[str, str]) -> dict[str, str]:
    """What was trained, by name.

    Args:
        trained: (the model, the data) in words.
    """
    return {
        "": trained[0],
        "on": trained[1],
        "global batch": str(config.global_batch_size),
        "optimizer": config.optim.name,
        "precision": config.precision,
        "at most": count(config.max_steps, "step") if config.max_steps else count(config.epochs, "epoch"),
        "in": count(config.rounds, "round"),
        "device": device,
    }
