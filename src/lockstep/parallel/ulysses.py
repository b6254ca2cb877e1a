"""Attention over a sequence of which each rank has a part: ranks exchange positions for heads (DeepSpeed Ulysses).

Each rank has all heads of t = T / c positions. One all-to-all of queries, keys and values gives it all T positions of
1 / c of the heads; a head looks at no other, so plain attention goes on from there, torch's fastest and any mask; and one
all-to-all of the output brings positions back. Backward is the same two the other way round.

Source: https://arxiv.org/abs/2309.14509
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


def ulysses_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: dist.ProcessGroup,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """F.scaled_dot_product_attention over the positions of all ranks: [N, heads, t, value_width].

    All ranks of the group call it together, and their backward too.

    Args:
        query: [N, heads, t, width]: rank r's are positions r · t … (r + 1) · t − 1.
        key: [N, kv_heads, t, width]; kv_heads divide heads, and the ranks divide both.
        value: [N, kv_heads, t, value_width].
        causal: whether a query sees its own position and those before it, and not all.
        scale: None: 1 / √width.
    """
    query, key, value = heads_for_positions((query, key, value), group)
    grouped = key.shape[1] < query.shape[1]
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale, enable_gqa=grouped)
    return positions_for_heads(mixed, group)


def heads_for_positions(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """Each [N, heads, t, width] to [N, heads / c, c · t, width], in one all-to-all."""
    size = dist.get_world_size(group)
    cut = [tensor.unflatten(1, (size, -1)).movedim(1, 0) for tensor in tensors]  # [c, N, heads / c, t, width]
    got = _Exchange.apply(torch.cat([each.flatten(1) for each in cut], 1), group)
    parts = got.split([each[0].numel() for each in cut], 1)
    return [part.view(each.shape).movedim(0, 2).flatten(2, 3) for part, each in zip(parts, cut, strict=True)]


def positions_for_heads(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[N, heads / c, c · t, width] to [N, heads, t, width]."""
    cut = tensor.unflatten(2, (dist.get_world_size(group), -1)).movedim(2, 0)
    got: Tensor = _Exchange.apply(cut.flatten(1), group)
    return got.view(cut.shape).movedim(0, 1).flatten(1, 2)


class _Exchange(torch.autograd.Function):
    """[c, n]: row i goes to rank i, and what rank i sends becomes row i. Backward sends the gradients back so."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        rows = rows.contiguous()
        got = torch.empty_like(rows)
        dist.all_to_all_single(got, rows, group=group)
        return got

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(gradient, ctx.group), None
