"""Batch normalisation over the batches of all ranks, with its backward written by hand; runs on CPU with gloo too.

With few samples per rank (2 to 4), the mean and variance of a rank's own share are noise. SyncBatchNorm takes them over
the global batch, so any number of ranks computes what one process computes with nn.BatchNorm on the whole batch.
torch's own layer refuses CPU tensors, and DistributedDataParallel refuses a CPU model that holds one, so nobody could
try or test it without GPUs. `convert_sync_batchnorm` is the one function to call, on any device, before the wrap:

    model = convert_sync_batchnorm(model.to(device))
    model = DistributedDataParallel(model, device_ids=device_ids, **NO_BUFFER_SYNC)

NO_BUFFER_SYNC because every rank already holds the same running statistics, to the last bit: sending rank
0's before each forward would be waste, and between process groups that normalise apart it would be wrong. (torch 2.15
still takes the name, and warns that the new one is `forward_sync_buffers`.)

Forward
-------
For one channel, i counts the N values that all ranks hold together (N = samples × pixels); γ, β are weight and bias:

    μ = Σ xᵢ / N        σ = √(Σ (xᵢ − μ)² / N + ε)        x̂ᵢ = (xᵢ − μ) / σ        yᵢ = γ x̂ᵢ + β

Each rank reduces its own nₖ values to (mₖ, Mₖ, nₖ): mean, sum of squared distances from that mean, count. One
all-gather shows every rank all triples, and Chan's formula merges them, for any number of parts at once:

    N = Σ nₖ        μ = Σ nₖ mₖ / N        Σ (xᵢ − μ)² = Σ Mₖ + Σ nₖ (mₖ − μ)²

Σx and Σx² would need only one all-reduce, but Σx²/N − μ² subtracts two large numbers: at μ = 1000 and σ = 1, fp32 keeps
one digit of it or none.

Backward
--------
Let gᵢ = dℓ/dyᵢ, where ℓ is the sum of all ranks' losses. xᵢ reaches ℓ by three roads: its own yᵢ, μ, and σ.

    dℓ/dxᵢ = gᵢ · ∂yᵢ/∂xᵢ + dℓ/dμ · ∂μ/∂xᵢ + dℓ/dσ · ∂σ/∂xᵢ

    ∂yᵢ/∂xᵢ = γ/σ
    dℓ/dμ = Σ gⱼ ∂yⱼ/∂μ = −(γ/σ) Σ gⱼ             ∂μ/∂xᵢ = 1/N
    dℓ/dσ = Σ gⱼ ∂yⱼ/∂σ = −(γ/σ) Σ gⱼ x̂ⱼ          ∂σ/∂xᵢ = +(xᵢ − μ)/(Nσ) = x̂ᵢ/N

The last one: σ² = Σ (xⱼ − μ)²/N + ε, so 2σ ∂σ/∂xᵢ = 2(xᵢ − μ)/N; what xᵢ does to σ through μ is −Σ (xⱼ − μ)/(Nσ) = 0.
Its sign is plus: a value above the mean that moves further up widens the spread. Together, with mean() over the global
batch:

    dℓ/dxᵢ = (γ/σ) · (gᵢ − mean(g) − x̂ᵢ · mean(g x̂))

The popular study notes write ∂σ/∂xᵢ with a minus and leave dℓ/dσ out. A check without pen and paper: adding a constant
to all xᵢ, or (at ε = 0) scaling them about their mean, does not change y, so the gradient must be orthogonal to 1 and
to x̂. With this sign it is, with the other it is not. Σg and Σg x̂ over all ranks are the backward's one all-reduce.

Sources: Ioffe & Szegedy 2015 (https://arxiv.org/abs/1502.03167, section 3); Chan, Golub & LeVeque 1979, "Updating
formulae and a pairwise algorithm for computing sample variances" (Stanford, STAN-CS-79-773);
torch/nn/modules/_functions.py, whose SyncBatchNorm makes the same two collectives on GPUs.
"""

from __future__ import annotations

from inspect import signature
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from lockstep.errors import UserError

# DDP's argument for "do not send rank 0's buffers before each forward", which torch 2.15 gave another name.
NO_BUFFER_SYNC: dict[str, Any] = {
    "forward_sync_buffers"
    if "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    else "broadcast_buffers": False
}


class SyncBatchNorm(_BatchNorm):
    """Batch normalisation of [N, C, …] over the batches of all ranks in `process_group` (None: of all ranks).

    What nn.BatchNorm computes on the ranks' batches put together, whatever each rank's N is, 0 included: an empty rank
    returns an empty output and takes part in the collectives. As torch's SyncBatchNorm it communicates in train mode
    only: one all-gather in a forward, one all-reduce in its backward (none where the input needs no gradient). In eval
    mode it uses the running statistics, or with `track_running_stats=False` this rank's own batch, alone. Without a
    process group, with one rank in it, or on a rank outside of it, it is plain batch normalisation.

    Every rank of the group must run forward, and backward, equally often, or the others wait for it.

    Not a subclass of nn.SyncBatchNorm: DistributedDataParallel refuses to wrap one on CPU. Arguments, parameters,
    buffers and state_dict are those of nn.BatchNorm.

    Raises (forward):
        ValueError: the input is not [N, num_features, …], or in train mode the whole group holds fewer than 2 values a
            channel; then on every rank.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.process_group = process_group

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or group_size(self.process_group) < 2:
            return super().forward(input)
        self._check_input_dim(input)
        mean, var, count = global_statistics(input, self.process_group)
        self._track(mean, var, count)
        return _Normalise.apply(input, self.weight, self.bias, mean, var, count, self.eps, self.process_group)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Move the running statistics towards this batch's, by `momentum`, or to the mean of all batches (None)."""
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        momentum = self.momentum or 0.0
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
            if self.momentum is None:
                momentum = 1 / int(self.num_batches_tracked)
        # Unbiased, N − 1, as nn.BatchNorm keeps it: evaluation wants the population's variance, not this batch's.
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), momentum)

    def _check_input_dim(self, input: Tensor) -> None:
        # Before the all-gather: ranks that disagree on C would make gloo fail with the sizes of its messages.
        if input.dim() < 2 or input.size(1) != self.num_features:
            raise ValueError(f"expected an input [N, {self.num_features}, …], got {list(input.shape)}")


def group_size(group: dist.ProcessGroup | None) -> int:
    """Ranks in `group` (None: in all); 1 without torch.distributed, −1 on a rank that is not in it."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def global_statistics(x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, int]:
    """Mean [C], biased variance [C] and number of values a channel of x [N, C, …] over all ranks. One all-gather.

    Every rank merges the same triples in the same order, so the ranks' results are equal to the last bit. In float32,
    or in float64 if x is.

    Raises:
        ValueError: fewer than 2 values a channel on all ranks together. nn.BatchNorm asks each process for 2; here one
            value on each of two ranks is enough.
    """
    dims, channels = reduced_dims(x), x.size(1)
    count = x.numel() // channels
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # Two passes, not torch.var_mean: as exact, and several times as fast on CPU. An empty share's mean is 0, not 0 / 0.
    mean = wide.sum(dims) / max(count, 1)
    squares = (wide - per_channel(mean, x)).square().sum(dims)

    mine = torch.cat([mean, squares, mean.new_tensor([count])])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    table = torch.stack(everyone)  # [ranks, C + C + 1]
    means, squares, counts = table.split([channels, channels, 1], dim=1)

    total = counts.sum()
    if total < 2:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got {int(total)} on all {len(everyone)} ranks "
            f"together, here in an input {list(x.shape)}; raise batch_size"
        )
    mean = (counts * means).sum(0) / total
    squares = (squares + counts * (means - mean).square()).sum(0)
    return mean, squares / total, int(total)


class _Normalise(Function):
    """y = γ (x − μ)/σ + β, whose backward knows that μ and σ are functions of every rank's x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: int,
        eps: float,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, torch.sqrt(var + eps))
        ctx.count, ctx.group = count, group
        gamma, beta = (None if p is None else p.to(mean.dtype) for p in (weight, bias))
        # In eval mode's form: one fused pass, which keeps x's dtype and memory format.
        return batch_norm(x, mean, var, gamma, beta, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, sigma = ctx.saved_tensors
        dims = reduced_dims(x)
        dy = grad_output.to(mean.dtype)
        x_hat = (x - per_channel(mean, x)) / per_channel(sigma, x)
        sum_dy, sum_dy_x_hat = dy.sum(dims), (dy * x_hat).sum(dims)

        # dℓ/dγ and dℓ/dβ stay this rank's sums: DistributedDataParallel averages them later, as it does every gradient.
        # Summed over the ranks here already, they alone would come out world_size times too large.
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_weight = sum_dy_x_hat.to(weight.dtype) if needs_weight else None
        grad_bias = sum_dy.to(weight.dtype) if needs_bias else None

        grad_x = None
        if needs_x:
            everyone = torch.cat([sum_dy, sum_dy_x_hat])
            dist.all_reduce(everyone, group=ctx.group)
            mean_dy, mean_dy_x_hat = (per_channel(total, x) for total in (everyone / ctx.count).chunk(2))
            scale = per_channel((1 if weight is None else weight) / sigma, x)
            grad_x = input_gradient(dy, x_hat, scale, mean_dy, mean_dy_x_hat).to(x.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


def input_gradient(dy: Tensor, x_hat: Tensor, scale: Tensor, mean_dy: Tensor, mean_dy_x_hat: Tensor) -> Tensor:
    """dℓ/dx [N, C, …] of this rank's share, as derived above; `scale`, γ/σ, and the global means are [1, C, 1, …]."""
    return scale * (dy - mean_dy - x_hat * mean_dy_x_hat)


def reduced_dims(x: Tensor) -> list[int]:
    """The dims of x [N, C, …] that a channel's statistics run over: all but C."""
    return [dim for dim in range(x.dim()) if dim != 1]


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """values [C] as [1, C, 1, …], to broadcast against x [N, C, …]."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def convert_sync_batchnorm(module: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """Turn every BatchNorm1d, 2d and 3d in `module` into a synchronising one, in place; return `module` itself.

    A layer on CUDA becomes torch's nn.SyncBatchNorm, any other lockstep's SyncBatchNorm: call it after `.to(device)`
    and before the DistributedDataParallel wrap. The layers stay the same objects and only their class changes (as
    torch's lazy modules and fully_shard do it), the root's too if it is one: parameters, buffers, hooks, mode and
    state_dict are untouched, and an optimizer that was built before still holds them. Converting twice changes nothing
    more; the last call's `process_group` holds.

    Raises:
        UserError: there is no BatchNorm layer, or one of another class, whose own forward would be lost.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    if not layers:
        raise UserError(
            f"the model ({type(module).__name__}) holds no BatchNorm layer: model.norm=group has none to synchronise; "
            "set model.norm=batch, or train it without synchronising (recipes.ddp)"
        )
    known = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, SyncBatchNorm)
    for layer in layers:
        if type(layer) not in known:
            raise UserError(
                f"cannot synchronise a {type(layer).__name__}: allowed are nn.BatchNorm1d, 2d and 3d themselves "
                "(a lazy layer becomes one when it has seen a batch)"
            )
    for layer in layers:
        tensors = chain(layer.parameters(recurse=False), layer.buffers(recurse=False))
        layer.__class__ = nn.SyncBatchNorm if any(tensor.is_cuda for tensor in tensors) else SyncBatchNorm
        layer.process_group = process_group  # type: ignore[assignment]
    return module
