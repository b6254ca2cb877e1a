"""Gradient clipping by value and by norm, the same whoever holds which part of the gradients.

It belongs after the last backward of a step: the mean of clipped gradients is not the clipped mean, so bounding them on
each rank or in each micro-batch would be another training. And it belongs after unscaling: under fp16 gradients are
thousands of times too large before.

A rank may hold a shard of a gradient (FSDP), or of some layers only (a pipeline), or the same as all others (DDP). The
norm is always that of all gradients together: each rank sums the squares of what it holds, and those who hold different
parts add their sums up, in one number.

Source: https://arxiv.org/abs/1211.5063 (clipping by the norm)
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lockstep.config.schema import GradientsConfig
from lockstep.distributed.dtensor import is_sharded, local_shard
from lockstep.errors import UserError
from lockstep.models.parameters import unwrap
from lockstep.training.precision import Scaler

HOOKS = "_clip_pre_hooks"  # of a module, by the name of the attribute that holds them


def clips(config: GradientsConfig) -> bool:
    """Whether there is a limit."""
    return config.clip_norm is not None or bool(config.clip_value)


@torch.no_grad()
def clip_gradients(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    scaler: Scaler | None,
    config: GradientsConfig,
    stages: dist.ProcessGroup | None = None,
) -> None:
    """Bound the gradients as `gradients.clip_value` and `gradients.clip_norm` say, in place; without them do nothing.

    To be called between the last backward of a step and the update. Each number is brought into its limits first;
    then, where the norm of all gradients together is above `clip_norm`, all of them are scaled down to it.

    Args:
        model: what is trained, wrapped or not. Its parameters may be sharded.
        optimizer: what is to make the update; or several, each of which makes its own.
        scaler: fp16's, which unscales the gradients first; None: they are unscaled already. A step in which they
            overflowed is left as it is: the scaler is going to leave it out.
        stages: the ranks that hold the other layers of the model, where this rank holds some only.

    Raises:
        UserError: a pattern of `clip_value` fits no parameter.
    """
    if not clips(config):
        return
    if scaler is not None and scaler.is_enabled():
        scaler.unscale_together([optimizer] if isinstance(optimizer, Optimizer) else optimizer)
        if scaler.overflows:
            return
    module = unwrap(model)
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    names = [name for name, _ in module.named_parameters()]
    for name, limit in limits(config, names, complete=stages is None).items():
        if name in gradients:
            local_shard(gradients[name]).clamp_(-limit, limit)
    call_clip_pre_hooks(module)
    if config.clip_norm is not None:
        norm = total_norm(gradients.values(), stages)
        factor = (config.clip_norm / (norm + 1e-6)).clamp(max=1.0)  # torch's own formula
        for gradient in map(local_shard, gradients.values()):
            gradient.mul_(factor.to(gradient.device, gradient.dtype))


def register_clip_pre_hook(module: nn.Module, hook: Callable[[], None]) -> None:
    """Have something called in each `clip_gradients` that has a limit, before gradients are scaled down to the norm.

    For who looks on: the norms that are worth watching are those from before. `module` is the model, unwrapped.
    """
    vars(module).setdefault(HOOKS, []).append(hook)


def call_clip_pre_hooks(module: nn.Module) -> None:
    """For those who clip by other means."""
    for hook in vars(module).get(HOOKS, ()):
        hook()


def limits(config: GradientsConfig, names: list[str], complete: bool = True) -> dict[str, float]:
    """{parameter: the limit on each number of its gradient}, from clip_value's patterns; the last that fits counts.

    Args:
        complete: whether the names are those of the whole model.

    Raises:
        UserError: a pattern fits no parameter of the whole model.
    """
    found: dict[str, float] = {}
    for pattern, limit in (config.clip_value or {}).items():
        fitting = fnmatch.filter(names, pattern)
        if not fitting and complete:
            some = ", ".join([*names[:2], *names[-2:]])
            raise UserError(f"gradients.clip_value.{pattern}: fits none of the model's parameters, such as {some}")
        found |= dict.fromkeys(fitting, float(limit))
    return found


def total_norm(tensors: Iterable[Tensor], stages: dist.ProcessGroup | None = None) -> Tensor:
    """The 2-norm of all tensors together, float64, the same on all ranks; where they are sharded, of the whole tensors.

    Args:
        stages: the ranks whose tensors belong to it besides.
    """
    alike: dict[Any, list[Tensor]] = {}  # by who holds the other shards
    for tensor in tensors:
        sharded = cast(Any, tensor)
        alike.setdefault((sharded.device_mesh, sharded.placements) if is_sharded(tensor) else None, []).append(tensor)
    total: Tensor | None = None
    for layout, some in alike.items():
        norms = [torch.linalg.vector_norm(local_shard(tensor)) for tensor in some]
        squares = torch.stack([norm.to(norms[0].device, torch.float64) for norm in norms]).square().sum()
        if layout:
            mesh, placements = layout
            squares = squares.to(mesh.device_type)  # where its ranks talk; offloaded shards are elsewhere
            for dim, placement in enumerate(placements):
                # Along the others ranks hold copies. To ask for is_shard() would leave out the dim along which
                # fully_shard has cut what tensor parallelism had cut already: its placement says no to it.
                if not placement.is_replicate():
                    dist.all_reduce(squares, group=mesh.get_group(dim))
        total = squares if total is None else total + squares.to(total.device)
    total = torch.zeros((), dtype=torch.float64) if total is None else total
    if stages is not None:
        dist.all_reduce(total, group=stages)
    return total.sqrt()
