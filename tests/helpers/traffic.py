"""What a rank hands to its collectives in each step, in bytes by operation, whoever calls them, Python or torch's C++."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lockstep.callbacks.base import Callback, CallbackContext
from lockstep.config.run_directory import freeze
from lockstep.config.schema import Config
from lockstep.distributed.process_group import World
from lockstep.launch.validate import validate
from lockstep.launch.worker import carry_out
from lockstep.recipe import Recipe
from lockstep.run import Run
from tests.helpers.harness import compose_config, run_ranks

Traffic = dict[str, int]  # {allreduce_: bytes of its tensors on this rank}
NAMESPACES = ("c10d", "_c10d_functional")
WAITS = ("wait_tensor", "barrier", "monitored_barrier_", "_wrap_tensor_autograd")  # they send nothing


class CountedStep(TorchDispatchMode):
    """Adds up the bytes that are handed to collectives while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # it makes operations on local tensors of it, which come by here once more
        result = func(*args, **(kwargs or {}))
        if func.namespace in NAMESPACES and func._opname not in WAITS:
            # The last output is a handle; of what gathers, the larger side counts: what a rank ends up with.
            given, got = (sum(nbytes(each) for each in tree_leaves(side)) for side in (args[-1:] and args, result))
            handed = max(given, got) if func.namespace != "c10d" else nbytes_of_largest(args)
            if func._opname == "alltoall_base_":  # (output, input, …): they may be unequal, and what is sent counts
                handed = nbytes(args[1])
            self.bytes[func._opname] += handed
        return result


def nbytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def nbytes_of_largest(args: Any) -> int:
    """c10d's operations take lists of outputs and inputs: the larger of the two."""
    return max((sum(map(nbytes, tree_leaves(each))) for each in args), default=0)


class TrafficCount(Callback):
    """Counts each step by itself; evaluation, saving and logging are left out."""

    def __init__(self) -> None:
        self.steps: list[Traffic] = []

    def on_step_begin(self, context: CallbackContext) -> None:
        self._mode = CountedStep()
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
