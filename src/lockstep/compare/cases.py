"""What recipes.compare runs: each recipe on each number of ranks, and why a combination cannot be run."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass

from lockstep.compare.config import CompareConfig
from lockstep.config.copies import with_values
from lockstep.config.keys import AUTO, typed
from lockstep.config.schema import Config
from lockstep.config.tasks import short_name
from lockstep.distributed.cores import usable_cores, wished_threads
from lockstep.distributed.devices import check_nproc, default_nproc, resolve_device
from lockstep.errors import UserError
from lockstep.launch.validate import check_package, count_samples, validate
from lockstep.recipe import Recipe
from lockstep.registry import is_file
from lockstep.training.timing import warm_up
from lockstep.utils.text import count

# Keys that mean recipes.compare itself, and not the recipes that it runs.
COMPARE_KEYS = {
    "runs",
    "recipes",
    "nprocs",
    "rounds",
    "verify",
    "hardware",
    "profile",
    "out",
    "nproc",
    "threads",
    "resume",
    "launcher",
}
REPLICATES = {"data_parallel"}  # one process, whose `replicas` the number of ranks is


@dataclass(frozen=True)
class Case:
    """A recipe on a number of ranks.

    Attributes:
        number: of `unit`: ranks, or what one process has instead of them: replicas.
        devices: GPUs, or CPU cores, that it may use.
        words: what its command is told beside its folder.
        target: the recipe's module, or the path of its file.
        profile: steps that torch.profiler records, in all rounds but the first of several: it takes memory.
    """

    recipe: str
    number: int
    devices: int
    words: tuple[str, ...] = ()
    unit: str = "rank"
    profile: int = 0
    target: str = ""

    @property
    def name(self) -> str:
        """The beginning of its folders' names."""
        return f"{self.recipe}-{self.number}"

    @property
    def label(self) -> str:
        """`ddp on 2 ranks`, and `single`, which there is but one of."""
        if self.recipe == "single":
            return self.recipe
        return f"{self.recipe} {'with' if self.unit == 'replica' else 'on'} {count(self.number, self.unit)}"


def plan_cases(config: CompareConfig, tool: Recipe, recipes: Iterable[Recipe]) -> tuple[list[Case], list[str]]:
    """What is to be run, and a line for each combination that cannot be."""
    from lockstep.config.compose import compose_another  # Hydra, which only a process that starts others needs

    device, backend = resolve_device(config.device, config.backend)
    numbers = sorted(set(config.nprocs or [default_nproc(device)]))
    cores = usable_cores()
    threads = config.threads or wished_threads(os.environ)
    if threads is None and device == "cpu" and len(numbers) > 1:
        threads = max(1, cores // numbers[-1])
    counted = count_samples(config)
    steps = min(config.epochs * (counted[1] // config.global_batch_size), config.max_steps or math.inf)
    profile = min(config.profile, max(0, int(steps) - warm_up(int(steps)) - 1))  # as many as a short run has
    cases, left_out = [], []
    for each in recipes:
        common = common_words(config, tool, each) + ([f"threads={threads}"] if threads else [])
        replicates = each.name in REPLICATES
        key = "replicas" if replicates else "nproc" if each.ranks is None else ""
        base: Config | None = None
        for number in numbers if key else [1]:
            ranks, own = each.ranks or number, {key: number} if key else {}
            devices = number  # GPUs, or where there is none the cores
            if device == "cpu":
                devices = min(cores, max(number, ranks * (threads or max(1, cores // ranks))))
            elif each.name == "model_parallel":
                devices = len(getattr(config, "devices", None) or "ab")
            words = (*common, *(typed(*pair) for pair in own.items()))
            case = Case(each.name, number, devices, words, "replica" if replicates else "rank", profile, each.target)
            try:  # all that its own command would be held to
                check_package(each)
                if each.backbone:
                    raise UserError("trains a part of a trained model, which is not the same work")
                check_nproc(number, device, backend)
                base = base or compose_another(each, common)
                if (trained := short_name(base.task.name)) != short_name(config.task.name):
                    raise UserError(f"trains a task of its own, which is not the same work; set task={trained} for all")
                validate(with_values(base, own), each, ranks, counted)
                cases.append(case)
            except UserError as error:
                left_out.append(f"{case.label}: {error}")
    return cases, left_out


def case_name(recipe: Recipe) -> str:
    """What the key `recipes` calls a recipe."""
    return recipe.target if is_file(recipe.target) else recipe.name


def common_words(config: CompareConfig, tool: Recipe, recipe: Recipe) -> list[str]:
    """The overrides that all runs of a recipe have in common."""
    from lockstep.config.compose import overrides

    if config.checkpoint.minutes == AUTO:
        config = with_values(config, {"checkpoint.minutes": 0})  # a save beside the steps that are measured is noise
    return overrides(tool, config, recipe, COMPARE_KEYS)
