"""What a recipe's technique leaves a rank of parameters, gradients and optimizer state, found without any memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lockstep.memory.predict import sharded_state_bytes
from lockstep.memory.tracker import KINDS
from lockstep.models.lora import adapt, adaptable
from lockstep.models.parameters import NO_HEAD, head_of
from lockstep.parallel.expert_plan import expert_modules
from lockstep.parallel.partition import choose_cuts, split, wanted_cut
from lockstep.parallel.tensor_plan import local_shape, tensor_parallel_plan
from lockstep.tasks.build import blocks_of_task, known_task
from lockstep.training.optim import build_optimizer
from lockstep.training.precision import DTYPES

KNOWN = (
    *("single", "ddp", "activation_checkpointing", "comm_hooks", "context_parallel", "expert_parallel", "fsdp"),
    *("grad_accumulation", "local_sgd", "lora", "parallel_mesh", "pipeline_parallel", "sync_batchnorm"),
    *("tensor_parallel", "zero1"),
)


@dataclass(frozen=True)
class StateOfParameter:
    """A parameter of the whole model: bytes of it, of its gradient, of what its optimizer keeps for each number of it and
    besides."""

    shape: tuple[int, ...]
    parameter: int
    gradient: int
    moments: int
    counters: int

    def held(self, shape: Iterable[int]) -> tuple[int, int, int]:
        """(parameter, gradient, optimizer) of a rank that has so much of it."""
        share = math.prod(shape) / max(1, math.prod(self.shape))
        return int(self.parameter * share), int(self.gradient * share), int(self.moments * share) + self.counters


def technique_state_bytes(name: str, config: Any, ranks: int) -> dict[str, int] | None:
    """Bytes of parameters, gradients and optimizer on the rank that holds most; None where no formula says so.

    Left out is what is no such state: a context's keys on their way, PowerSGD's errors, local_sgd's outer weights.

    Args:
        name: the recipe's.
        config: of its own config class.
    """
    table = sharded_state_bytes(config, ranks)
    stage = f"{name} stage={getattr(config, 'stage', '')}"
    if stage in table:
        return table[stage]
    if name not in KNOWN:
        return None
    states, model = states_of(name, config)
    shapes = {each: tuple(state.shape) for each, state in states.items()}
    task = known_task(config)
    if name in ("tensor_parallel", "parallel_mesh") and config.tensor > 1:
        sequence = bool(config.sequence_parallel)
        plan = tensor_parallel_plan(task, config.task.name, model, config.tensor, sequence)
        shapes = {each: local_shape(each, shapes[each], plan, config.tensor) for each in shapes}
    if name == "expert_parallel":
        experts = tuple(f"{each}." for each in expert_modules(task, config.task.name, model, config.expert))
        cut = {each for each in shapes if each.startswith(experts)}
        shapes |= {each: (shapes[each][0] // config.expert, *shapes[each][1:]) for each in cut}
    if name in ("fsdp", "parallel_mesh"):
        shards = ranks // getattr(config, "pipeline", 1) // getattr(config, "tensor", 1) // config.replicate
        shapes = {each: (-(-shape[0] // shards), *shape[1:]) if shape else () for each, shape in shapes.items()}
    held = {each: states[each].held(shape) for each, shape in shapes.items()}
    if name == "zero1":
        sums = [sum(sizes) for sizes in list(zip(*held.values(), strict=True))[:2]]
        return _named([*sums, fullest(states, ranks)])
    stages = [list(held)]
    if config.pipeline_stages > 1:
        stages = names_by_rank(config, task, model)
    totals = [[sum(sizes) for sizes in zip(*(held[each] for each in names), strict=True)] for names in stages]
    return _named(max(totals, key=sum))


def states_of(name: str, config: Any) -> tuple[dict[str, StateOfParameter], nn.Module]:
    """(each parameter's state in one whole model, the model); on fake tensors, which have no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[config.precision])
    try:
        with torch.random.fork_rng(devices=[]), FakeTensorMode():
            model: nn.Module = known_task(config).build_model()
            if name == "lora":
                adapt_as(config, model)
            optimizer = build_optimizer(config.optim, model)
            trained = {id(each) for group in optimizer.param_groups for each in group["params"] if each.requires_grad}
            for parameter in model.parameters():
                if id(parameter) in trained:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            found = {}
            for each, parameter in model.named_parameters():
                kept = [value for value in optimizer.state.get(parameter, {}).values() if isinstance(value, Tensor)]
                moments, counters = (sum(x.nbytes for x in kept if bool(x.dim()) == whole) for whole in (True, False))
                gradient = parameter.nbytes if id(parameter) in trained else 0
                found[each] = StateOfParameter(tuple(parameter.shape), parameter.nbytes, gradient, moments, counters)
    finally:
        torch.set_default_dtype(before)
    return found, model


def adapt_as(config: Any, model: nn.Module) -> None:
    """Freeze a model and give it the adapters that recipes.lora would."""
    head = head_of(model) if config.new_head else NO_HEAD
    model.requires_grad_(False)
    patterns = ["*"] if config.layers is None else config.layers
    chosen = [
        name
        for name, side in adaptable(model).items()
        if config.r <= side and any(fnmatchcase(name, each) for each in patterns) and not f"{name}.".startswith(head)
    ]
    adapt(model, chosen, config.r, config.alpha)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith(head))


def fullest(states: dict[str, StateOfParameter], ranks: int) -> int:
    """Bytes of optimizer state on the fullest rank where whole parameters are dealt out, the largest first."""
    numbers, held = [0] * ranks, [0] * ranks
    for state in sorted(states.values(), key=lambda each: -math.prod(each.shape)):
        rank = numbers.index(min(numbers))
        numbers[rank] += math.prod(state.shape)
        held[rank] += state.moments + state.counters
    return max(held)


def names_by_rank(config: Any, task: Any, model: nn.Module) -> list[list[str]]:
    """The parameters of each rank of a pipeline; cut evenly where the cut is to be measured."""
    blocks, cut = blocks_of_task(task, model), wanted_cut(config.cut, config.parts)
    parts = split(model, choose_cuts(model, "even" if cut == "balanced" else cut, config.parts, None, blocks), blocks)
    ranks = range(config.pipeline_stages)
    return [
        [name for part in parts[rank :: config.pipeline_stages] for name, _ in part.named_parameters()]
        for rank in ranks
    ]


def _named(sizes: list[int]) -> dict[str, int]:
    return dict(zip(KINDS, sizes, strict=False)) | {"total": sum(sizes)}
