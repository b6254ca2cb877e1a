"""The CUDA-only operations behind torch's nn.SyncBatchNorm, in terms of others.

Source: aten/src/ATen/native/cuda/Normalization.cuh, torch/nn/modules/_functions.py
"""

from __future__ import annotations

import torch
from torch import Tensor


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (like.dim() - 2))


def _others(x: Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(mean, 1 / standard deviation) by channel."""
    wide = x.float() if x.dtype in (torch.half, torch.bfloat16) else x
    var, mean = torch.var_mean(wide, _others(x), unbiased=False)
    return mean, torch.rsqrt(var + eps)


def gather_stats(
    x: Tensor,
    means: Tensor,
    inverse_deviations: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same of all ranks' samples, from each rank's [ranks, channels]; updates the running statistics."""
    weights = counts.to(means.dtype).view(-1, 1)
    total = weights.sum()
    mean = (means * weights).sum(0) / total
    own = 1 / inverse_deviations.square() - eps
    var = (own * weights + weights * (means - mean).square()).sum(0) / total
    if running_mean is not None and running_var is not None:
        running_mean.mul_(1 - momentum).add_(mean.to(running_mean.dtype), alpha=momentum)
        running_var.mul_(1 - momentum).add_((var * total / (total - 1)).to(running_var.dtype), alpha=momentum)
    return mean, torch.rsqrt(var + eps)


def normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, inverse: Tensor, eps: float
) -> Tensor:
    y = (x - _per_channel(mean, x)) * _per_channel(inverse, x)
    if weight is not None and bias is not None:
        y = y * _per_channel(weight, x) + _per_channel(bias, x)
    return y.to(x.dtype)


def backward_sums(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor | None,
    of_x: bool,
    of_weight: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sum of the gradient, sum of gradient × (x − mean), the weight's gradient, the bias's), by channel."""
    wide = gradient.to(mean.dtype)
    total = wide.sum(_others(x))
    with_x = (wide * (x - _per_channel(mean, x))).sum(_others(x))
    return total, with_x, with_x * inverse, total.clone()


def backward(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor | None,
    total: Tensor,
    with_x: Tensor,
    counts: Tensor,
) -> Tensor:
    """The gradient of x, from the sums over all ranks."""
    count = counts.sum().to(mean.dtype)
    scale = inverse if weight is None else weight * inverse
    wide = gradient.to(mean.dtype) - _per_channel(total / count, x)
    result = (wide - (x - _per_channel(mean, x)) * _per_channel(inverse.square() * with_x / count, x)) * _per_channel(
        scale, x
    )
    return result.to(x.dtype)


KERNELS = {
    "batch_norm_stats": stats,
    "batch_norm_gather_stats_with_counts": gather_stats,
    "batch_norm_elemt": normalise,
    "batch_norm_backward_reduce": backward_sums,
    "batch_norm_backward_elemt": backward,
}
