"""`recipes.verify simulate=N`: recipes on N ranks in one process, each a thread, held to one process in fp64.

What is trained is small, and made for the number: a GPT of two blocks, one above 16 ranks, with as many heads, hidden
features and experts as there are ranks, sequences of twice as many tokens, and a vocabulary that does not divide. All else
is the recipe as it is.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from lockstep.config.keys import AUTO, key
from lockstep.config.schema import Config
from lockstep.config.tasks import named_task
from lockstep.data.tokens import Tokens
from lockstep.distributed.process_group import World
from lockstep.distributed.simulated import MEANS, require_simulation, simulate
from lockstep.errors import CheckFailed, UserError
from lockstep.launch.validate import check_batch
from lockstep.models.gpt import GPTConfig
from lockstep.recipe import Proof, Recipe
from lockstep.tasks.language import Language
from lockstep.utils.temporary import own_folder
from lockstep.utils.text import count, divisors
from lockstep.verify.config import VerifyConfig
from lockstep.verify.proofs import ProofCase, both_configs
from lockstep.verify.report import progress_line, verify_tables
from lockstep.verify.rows import VerifyRow
from lockstep.verify.trace import Tensors, Trace, trace_of, train_traced

OWN_KEYS: dict[str, dict[str, Any]] = {  # of each recipe that can be simulated; ALL stands for the number of ranks
    "tensor_parallel": {"tensor": "ALL"},
    "context_parallel": {"context": "ALL"},
    "expert_parallel": {"expert": "ALL"},
    "parallel_mesh": {"replicate": 2, "context": 2, "tensor": 2},
}
STEPS_OF_MANY = 2


@dataclass
class SimulatedGpt(Language):
    """A GPT that so many ranks can share in each way, and random tokens."""

    shared_by: int = key(8, "ranks that share its layers, its sequences or its experts", minimum=1)

    def _check(self) -> None:
        self.sequence_length = self._tokens

    @property
    def _tokens(self) -> int:
        return 16 if self.experts else max(16, 2 * self.shared_by)

    def _read(self) -> tuple[Tokens, Tokens]:
        vocabulary = max(16, 2 * self.shared_by) - 1
        drawn = np.random.default_rng(0).integers(vocabulary, size=self._tokens * 400)
        return Tokens([drawn], vocabulary, "simulate"), Tokens([drawn[-self._tokens - 1 :]], vocabulary, "simulate")

    def _shape(self) -> GPTConfig:
        width = 2 * max(8, self.shared_by)
        blocks = 2 if self.shared_by <= 16 else 1  # a rank more makes every pass of every block dearer
        heads = self.shared_by if self.shared_by > 2 else 4
        return GPTConfig(blocks, width, heads, heads, width, self.vocabulary, experts=self.experts)


def simulated_cases(config: VerifyConfig, recipes: Sequence[Recipe], words: Sequence[str]) -> list[ProofCase]:
    """A row for each recipe: the ranks all share one copy of the model, unless a word says otherwise.

    Args:
        words: of the command line.

    Raises:
        UserError: a recipe cannot be simulated, or not on so many ranks.
    """
    ranks, cases = int(config.simulate or 0), []
    for each in recipes:
        if each.name not in OWN_KEYS:
            raise UserError(
                f"simulate={ranks}: recipes.{each.name} is not simulated; allowed are {', '.join(OWN_KEYS)}"
            )
        own = {name: ranks if value == "ALL" else value for name, value in OWN_KEYS[each.name].items()}
        typed_keys = {word.partition("=")[0] for word in words}
        own = {name: getattr(config, name) if name in typed_keys else value for name, value in own.items()}
        # What is cut shows in the first steps; Adam on DTensors would take half of the time, and its moments are exact.
        settings: dict[str, Any] = {
            "optim.name": "sgd",
            "optim.lr": 0.1,
            "max_steps": config.max_steps or STEPS_OF_MANY,
        }
        task = ""
        if named_task(words) is None:
            task, settings["task.shared_by"] = f"{__name__}:{SimulatedGpt.__name__}", ranks
            if each.name == "expert_parallel":
                settings |= {"task.experts": max(4, ranks), "task.balance": 0.1}
        cases.append(ProofCase(each, Proof(own=own), "fp64", settings, task=task))
    return cases


def simulated_configs(case: ProofCase, single: Recipe, asked: VerifyConfig) -> tuple[Config, Config]:
    """`both_configs`, checked as a command's would be, for the number of ranks.

    Raises:
        UserError: a size does not divide.
    """
    ranks = int(asked.simulate or 0)
    base, mine = both_configs(case, single, asked)
    size = mine.model_parallel_size
    if ranks % size:
        names = " × ".join(f"{name}={getattr(mine, name)}" for name in mine.model_parallel_key.split(" × "))
        raise UserError(f"{names}: simulate={ranks} does not divide by it; allowed are {divisors(ranks)}")
    if mine.pipeline_stages > 1:
        raise UserError(
            f"pipeline={mine.pipeline_stages}: a pipeline's ranks do different things, and simulate={ranks} has all do the "
            "same at once; leave pipeline out, or leave simulate out"
        )
    if asked.global_batch_size == AUTO:
        base.global_batch_size = mine.global_batch_size = max(2, ranks // size)
    check_batch(mine, ranks)
    if case.recipe.check:
        case.recipe.check(mine, mine.global_batch_size // (ranks // size))
    return base, mine


def verify_simulated(config: VerifyConfig, recipes: Sequence[Recipe], single: Recipe, words: Sequence[str]) -> int:
    """Train each recipe on simulated ranks and the reference on one, print what verify prints; the exit code.

    Raises:
        UserError: the torch at hand cannot, or a recipe or a size cannot.
        CheckFailed: a row is off.
    """
    ranks = int(config.simulate or 0)
    require_simulation(ranks)
    cases = simulated_cases(config, recipes, words)
    pairs = [simulated_configs(case, single, config) for case in cases]
    print(f"verify: {count(len(cases), 'row')}, on {ranks} simulated ranks, {MEANS}", flush=True)
    rows, threads = [], config.threads or torch.get_num_threads()
    for number, (case, (base, mine)) in enumerate(zip(cases, pairs, strict=True), start=1):
        began = time.perf_counter()
        row = VerifyRow(case.recipe.name, case.precision, ranks, mine.max_steps or 0)
        row.variant = " ".join(case.own_words)
        with own_folder() as folder:
            theirs = simulated_trace(Path(folder) / "single", single, base, 1, threads)
            row.compare(simulated_trace(Path(folder) / row.recipe, case.recipe, mine, ranks, threads), theirs)
        rows.append(row)
        print(progress_line(row, number, len(cases), time.perf_counter() - began), flush=True)
    Console(highlight=False, width=None if sys.stdout.isatty() else 140).print(*verify_tables(rows), sep="\n")
    off = [f"{row.label} ({row.first})" for row in rows if row.fails]
    if off:
        raise CheckFailed(f"not the training that recipes.single computes: {', '.join(off)}")
    return 0


def simulated_trace(out: Path, recipe: Recipe, config: Config, ranks: int, threads: int) -> Trace:
    """What a recipe computes on so many simulated ranks, in the folder `out`."""
    parts: list[Tensors] = [{} for _ in range(ranks)]

    def train(world: World) -> None:
        parts[world.rank] = train_traced(world, out, recipe, config).found

    simulate(ranks, train, threads)
    return trace_of(out, recipe, parts)
