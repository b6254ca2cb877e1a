"""The CUDA-only operations behind nn.RMSNorm, in terms of others: the CPU composes it of several.

Source: aten/src/ATen/native/layer_norm.cpp, aten/src/ATen/native/cuda/layer_norm_kernel.cu
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def forward(x: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor]:
    """(normalised, 1 / root of the mean square), the second [..., 1, …]."""
    wide = x.float() if x.dtype in (torch.half, torch.bfloat16) else x
    dims = list(range(-len(shape), 0))
    smallest = torch.finfo(wide.dtype).eps if eps is None else eps
    inverse = torch.rsqrt(wide.square().mean(dims, keepdim=True) + smallest)
    y = wide * inverse if weight is None else wide * inverse * weight
    return y.to(x.dtype), inverse


def backward(
    gradient: Tensor, x: Tensor, shape: Sequence[int], inverse: Tensor, weight: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """(of x, of the weight)."""
    dims = list(range(-len(shape), 0))
    wide, hat = gradient.to(inverse.dtype), x.to(inverse.dtype) * inverse
    scaled = wide if weight is None else wide * weight
    of_x = inverse * (scaled - hat * (scaled * hat).mean(dims, keepdim=True))
    of_weight = None
    if weight is not None:
        of_weight = (wide * hat).sum(list(range(x.dim() - len(shape)))).to(weight.dtype)
    return of_x.to(x.dtype) if wanted[0] else None, of_weight if wanted[1] else None


KERNELS = {"_fused_rms_norm": forward, "_fused_rms_norm_backward": backward}
