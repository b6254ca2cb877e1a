"""Local SGD and DiLoCo: what replicas that train apart come to, what they send, and what their checkpoints hold."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.two_optimizers import Digits
from lockstep.config.run_directory import freeze
from lockstep.config.schema import Config
from lockstep.distributed.process_group import World
from lockstep.errors import UserError
from lockstep.launch.validate import validate
from lockstep.parallel.outer_optimizer import cut_evenly
from lockstep.run import Run
from lockstep.training.optim import build_optimizer
from recipes import ddp, local_sgd
from tests.helpers.examples import example
from tests.helpers.harness import assert_equal, compose_config, execute, result, run_ranks, tensors_of, train
from tests.helpers.traffic import count_traffic
from tests.ranks.test_resume import assert_same

TASK = (f"task={example('two_optimizers.py:Digits')}", "task.hidden=16", "global_batch_size=96", "precision=fp64")
WORDS = (*TASK, "log_every=1", "optim=adamw", "optim.lr=0.01", "optim.schedule=constant", "optim.warmup_steps=0")
DILOCO = ("period=3", "outer=nesterov", "outer_lr=0.5", "fragments=2")
STEPS = 8


def batches_of(world: World, config: Config, out: str) -> list[tuple[Tensor, Tensor]]:
    """This rank's share of each batch."""
    run = Run("ddp", config, world, Path(out))
    return [(batch.inputs, batch.targets) for batch in run.batches(0, STEPS)]


def diloco_by_hand(
    start: dict[str, Tensor], shares: list[list[tuple[Tensor, Tensor]]], config: Any
) -> dict[str, Tensor]:
    """Algorithm 1 of arXiv 2311.08105 in one process. With two fragments in a period of 3, the first matrix has its
    turn in steps 2, 5, 8, the rest in steps 3, 6."""
    task = Digits(hidden=16)
    first = task.build_model().double()
    first.load_state_dict(start)
    replicas = [copy.deepcopy(first) for _ in shares]
    optimizers = [build_optimizer(config.optim, replica) for replica in replicas]
    agreed = {name: tensor.detach().clone() for name, tensor in first.named_parameters()}
    velocity = {name: torch.zeros_like(tensor) for name, tensor in agreed.items()}
    turns = {name: 2 if number == 0 else 0 for number, name in enumerate(agreed)}
    for step in range(1, STEPS + 1):
        for replica, optimizer, share in zip(replicas, optimizers, shares, strict=True):
            inputs, targets = share[step - 1]
            task.loss(replica(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        for name in agreed:
            if step % 3 == turns[name]:
                weights = [dict(replica.named_parameters())[name].data for replica in replicas]
                gradient = agreed[name] - torch.stack(weights).mean(0)
                velocity[name] = 0.9 * velocity[name] + gradient
                agreed[name] = agreed[name] - 0.5 * (gradient + 0.9 * velocity[name])
                for weight in weights:
                    weight.copy_(agreed[name])
    return {name: torch.stack([dict(r.named_parameters())[name].data for r in replicas]).mean(0) for name in agreed}


def test_diloco_is_the_paper_s_and_resumes_between_two_synchronisations(tmp_path: Path) -> None:
    """Replicas, their moments and the outer momentum to the last bit, on as many ranks alone."""
    start = train(local_sgd.train, tmp_path / "start", 2, *WORDS, "optim.lr=0", "optim.weight_decay=0", "max_steps=1")
    config = compose_config(ddp.train, *WORDS, f"max_steps={STEPS}", f"out={tmp_path / 'read'}")
    validate(config, ddp.train, 2)
    assert freeze(config, "ddp")
    shares = run_ranks(batches_of, 2, config, str(tmp_path / "read"))
    words = (*WORDS, *DILOCO, f"max_steps={STEPS}", "checkpoint.every=4")
    whole = train(local_sgd.train, tmp_path / "whole", 2, *words)
    for name, expected in diloco_by_hand(start, shares, config).items():
        assert torch.allclose(whole[name], expected, rtol=0, atol=1e-12), name

    execute(local_sgd.train, tmp_path / "parts", 2, *words, "max_steps=4")
    for recipe, ranks in ((local_sgd.train, 3), (ddp.train, 2)):
        said = "holds the different weights of 2 ranks; resume it with recipes.local_sgd on 2 ranks"
        own = DILOCO if recipe is local_sgd.train else ()
        with pytest.raises((AssertionError, UserError), match=said):
            execute(recipe, tmp_path / recipe.name, ranks, *WORDS, *own, "max_steps=6", f"resume={tmp_path / 'parts'}")
    assert_equal(train(local_sgd.train, tmp_path / "parts", 2, *words), whole)
    saved, last = (tensors_of(tmp_path / run / "checkpoints" / "step-00000008") for run in ("parts", "whole"))
    assert_same(saved, last)
    assert not torch.equal(saved["model.0.bias"], saved["replica.1.model.0.bias"]), "step 8 is no synchronisation of it"


@pytest.mark.slow
def test_weights_cross_the_network_once_a_period(tmp_path: Path) -> None:
    """W bytes in a period of 3: the first fragment in its second step, the other in its third, and nothing else."""
    ranks = count_traffic(local_sgd.train, tmp_path / "run", 2, *WORDS, *DILOCO, "max_steps=7", "eval_every=0")
    first = 8 * 64 * 16
    rest = 8 * result(tmp_path / "run")["parameters"] - first
    for steps in ranks:
        assert steps == [{}, {"allreduce_": first}, {"allreduce_": rest}] * 2 + [{}]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [(1, ["abcde"]), (2, ["abc", "de"]), (3, ["ab", "cd", "e"]), (5, ["a", "b", "c", "d", "e"])],
)
def test_parameters_are_cut_evenly_and_in_their_order(pieces: int, expected: list[str]) -> None:
    assert cut_evenly({"a": 1, "b": 4, "c": 2, "d": 2, "e": 3}, pieces) == [list(names) for names in expected]
