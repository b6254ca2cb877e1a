"""Experts that several ranks share: each has some, and tokens go to the ranks of theirs and come back.

E experts on c ranks: rank r holds experts r · E / c … (r + 1) · E / c − 1 as its shard of tensors [E, …].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.func import functional_call

from lockstep.distributed.dtensor import is_sharded, local_shard
from lockstep.errors import UserError
from lockstep.models.experts import MixtureOfExperts, on_host
from lockstep.parallel.context import subclass_of

Compute = Callable[[Tensor, Tensor], Tensor]  # rows [n, width] sorted by expert, counts [experts] → [n, …]


def over_ranks(compute: Compute, rows: Tensor, counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The experts' outputs of this rank's rows, [n, …], in their order. All ranks of the group call it together.

    Args:
        compute: by this rank's experts.
        rows: [n, width], sorted by expert.
        counts: int64 [E]: how many rows each expert gets.
    """
    ranks = dist.get_world_size(group)
    leaving = counts.view(ranks, -1)  # by rank, then by its experts
    arriving = torch.empty_like(leaving)
    dist.all_to_all_single(arriving, leaving.contiguous(), group=group)
    sent, got = on_host(torch.stack([leaving.sum(1), arriving.sum(1)]), len(rows))  # waits: sizes are the host's
    taken: Tensor = _Travel.apply(rows, sent, got, group)
    # They lie by the rank that they come from, then by expert; the experts want them by expert alone.
    own = torch.arange(arriving.shape[1], device=rows.device).repeat(ranks)
    order = own.repeat_interleave(arriving.flatten(), output_size=len(taken)).argsort(stable=True)
    outputs = compute(taken[order], arriving.sum(0))
    back: Tensor = _Travel.apply(outputs[order.argsort()], got, sent, group)
    return back


class _Travel(torch.autograd.Function):
    """Rows [n, …], of which the first sent[0] go to rank 0, and so on; got[r] come from rank r. Backward returns theirs."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], got: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.got, ctx.group = sent, got, group
        taken = rows.new_empty(sum(got), *rows.shape[1:])
        dist.all_to_all_single(taken, rows.contiguous(), got, sent, group=group)
        return taken

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _Travel.apply(gradient, ctx.got, ctx.sent, ctx.group), None, None, None


class CutExperts(nn.Module):
    """What the class of a module that a task names becomes a subclass of; its names and its state_dict stay."""

    group: dist.ProcessGroup

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        if not is_sharded(next(self.parameters())):  # called by the line below
            return cast(Tensor, super().forward(rows, counts))
        mine = {name: local_shard(parameter) for name, parameter in self.named_parameters()}
        return over_ranks(lambda *given: functional_call(self, mine, given), rows, counts, self.group)


def share_experts(model: nn.Module, names: Sequence[str], mesh: DeviceMesh) -> nn.Module:
    """Leave each rank its shard of the experts, in place; all else stays whole on every rank.

    Args:
        model: the same on all ranks, on the CPU; one parameter at a time comes to their device.
        names: `expert_modules`'.
        mesh: (copies, ranks that share one), the latter called `expert`. Copies hold the same experts.
    """
    if mesh["expert"].size() == 1:
        return model
    layout: list[Placement] = [Replicate(), Shard(0)]
    for name in names:
        module: Any = model.get_submodule(name)
        for owner in module.modules():
            for each, parameter in owner.named_parameters(recurse=False):
                shard = distribute_tensor(parameter.detach(), mesh, layout, src_data_rank=None)
                owner.register_parameter(each, nn.Parameter(shard, requires_grad=parameter.requires_grad))
        module.__class__ = subclass_of(CutExperts, type(module))
        module.group = mesh.get_group("expert")
    return model


def biased_mixtures(model: nn.Module, name: str) -> list[MixtureOfExperts]:
    """The model's mixtures, in its order, from now on balanced by biases.

    Args:
        name: the task's, for the error.

    Raises:
        UserError: it has none of lockstep's, whose router can have biases.
    """
    found = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    if not found:
        raise UserError(
            f"balance=bias: task={name} routes by means of its own; allowed are models with "
            "lockstep.models.experts.MixtureOfExperts, or balance=loss"
        )
    for mixture in found:
        mixture.balance_by_bias()
    return found


@torch.no_grad()
def update_biases(mixtures: Sequence[MixtureOfExperts], rate: float) -> None:
    """Raise the bias of each expert that got fewer than the mean of all ranks' choices of a step, and lower the others'.

    All ranks call it together, after each step: one all-reduce of E numbers per mixture.

    Args:
        rate: by how much, of a share of a token.
    """
    if not mixtures:
        return
    counts = torch.stack([mixture.chosen for mixture in mixtures])
    dist.all_reduce(counts)
    for mixture, count in zip(mixtures, counts.double(), strict=True):
        assert mixture.bias is not None
        mixture.bias += (rate * (count.mean() - count).sign()).to(mixture.bias.dtype)
        mixture.chosen.zero_()


@torch.no_grad()
def average_over_ranks(model: nn.Module, mesh: DeviceMesh) -> None:
    """Make every gradient that of the mean over all ranks' losses.

    An expert's has come together in backward already, as a sum over the ranks whose tokens it had: it is added up over
    the copies alone, and divided by the number of all ranks, like the others.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    works = [
        dist.all_reduce(
            local_shard(gradient), group=mesh.get_group("data") if is_sharded(gradient) else None, async_op=True
        )
        for gradient in gradients
        if mesh["data"].size() > 1 or not is_sharded(gradient)
    ]
    for work in works:
        work.wait()
    for gradient in gradients:
        local_shard(gradient).div_(mesh.size())
