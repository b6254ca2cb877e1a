"""What a rank hands to its collectives in each step, in bytes by operation."""

from __future__ import annotations

from pathlib import Path

import torch

from lockstep.callbacks.base import Callback, CallbackContext
from lockstep.config.run_directory import freeze
from lockstep.config.schema import Config
from lockstep.distributed.process_group import World
from lockstep.distributed.traffic import TrafficCounter
from lockstep.launch.validate import validate
from lockstep.launch.worker import carry_out
from lockstep.recipe import Recipe
from lockstep.run import Run
from tests.helpers.harness import compose_config, run_ranks

Traffic = dict[str, int]  # {allreduce_: bytes of its tensors on this rank}


class TrafficCount(Callback):
    """Counts each step by itself; evaluation, saving and logging are left out."""

    def __init__(self) -> None:
        self.steps: list[Traffic] = []

    def on_step_begin(self, context: CallbackContext) -> None:
        self._mode = TrafficCounter()
        self._mode.__enter__()

    def on_step_end(self, context: CallbackContext) -> None:
        self._mode.__exit__(None, None, None)
        self.steps.append(dict(self._mode.bytes))


def count_traffic(recipe: Recipe, out: Path, world_size: int, *words: str) -> list[list[Traffic]]:
    """Train on forked ranks; each rank's traffic, step by step."""
    config = compose_config(recipe, f"out={out}", *words)
    validate(config, recipe, world_size)
    return run_ranks(_counted, world_size, recipe, config, str(freeze(config, recipe.name)), timeout=120)


def _counted(world: World, recipe: Recipe, config: Config, out: str) -> list[Traffic]:
    torch.set_num_threads(1)
    count = TrafficCount()
    carry_out(recipe, Run(recipe.name, config, world, Path(out), callbacks=[count], quiet=True))
    return count.steps
