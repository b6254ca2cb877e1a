"""Attention over a sequence of which each rank has a part: keys and values go around a ring (ring attention).

**Forward.** Of a query q, attention to keys k₁ … k_m is Σ exp(sᵢ − L) vᵢ with sᵢ = scale · q·kᵢ and L = log Σ exp(sᵢ). Let two
sets of keys A and B give outputs o_A, o_B and logarithms L_A, L_B. Over both together

    L = log(exp L_A + exp L_B)        o = exp(L_A − L) · o_A + exp(L_B − L) · o_B,

because exp(sᵢ − L) = exp(L_A − L) · exp(sᵢ − L_A). So a rank attends to the keys that it holds, sends them to the next rank,
gets others from the one before, and merges what it finds. After c − 1 passes each query has met all keys, and no rank
ever held more than two ranks' keys. The next keys travel while the present ones are worked on.

**Backward.** Let P = exp(S − L) be the weights, with the final L: then each block's gradients stand by themselves. From
o = P v: dv = Pᵀ do, dP = do vᵀ. Of a softmax, dsᵢ = Pᵢ (dPᵢ − Σⱼ Pⱼ dPⱼ), and the sum is the same for every block: Σⱼ Pⱼ dPⱼ =
do · Σⱼ Pⱼ vⱼ = do · o =: δ, a number per query that the forward's output gives. So dS = P ∘ (dP − δ), dq = scale · dS k summed
over the blocks, dk = scale · dSᵀ q. Only q, k, v, o and L are kept, and P is computed again. Keys and values go around
once more; the gradients of keys and values follow them one step behind, each rank adds what its queries say, and the
last one sends them home.

**Zig-zag.** A causal query sees no later key, so of contiguous parts the last rank would do c times the work of the
first, and all wait for it. The sequence is cut into 2c chunks, and rank r has chunks r and 2c − 1 − r, an early and a late
one. Against the keys of rank j: for j = r, what lies on or below the diagonal, as positions ascend within a rank; for
j < r all queries see chunk j and none chunk 2c − 1 − j; for j > r only the queries of the late chunk see anything, but they
see both. In each case it is half of a full block: all ranks do the same work in each step.

Products are in the dtype of the inputs; scores, sums and gradients on their way in fp32, or fp64 from fp64. Scores of
TILE queries at a time are in memory.

Source: https://arxiv.org/abs/2310.01889 (ring attention), https://arxiv.org/abs/2205.14135 (FlashAttention, whose L and δ
these are), https://arxiv.org/abs/2311.09431 (striped: the work balanced), https://arxiv.org/abs/2407.21783 section 3.3.2
(Llama 3, the zig-zag in 2c chunks).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 1024  # queries whose scores are in memory at a time
ALL = slice(None)


def zigzag_positions(length: int, place: int, size: int, device: torch.device | None = None) -> Tensor:
    """The positions [length / size], ascending, that rank `place` of `size` has: chunks place and 2 · size − 1 − place.

    Args:
        length: of the sequence; 2 · size divides it.
    """
    chunks = torch.arange(length, device=device).chunk(2 * size)
    return torch.cat([chunks[place], chunks[2 * size - 1 - place]])


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: dist.ProcessGroup,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale · query keyᵀ) value over the keys of all ranks: [N, heads, t, value_width].

    All ranks of the group call it together, and their backward too.

    Args:
        query: [N, heads, t, width], at this rank's t positions of the sequence: `zigzag_positions`, where `causal`.
        key: [N, kv_heads, t, width]; kv_heads divide heads, and head h sees the keys of h // (heads / kv_heads).
        value: [N, kv_heads, t, value_width], of query's dtype, as key is.
        causal: whether a query sees its own position and those before it, and not all.
        scale: None: 1 / √width.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    grouped = query.unflatten(1, (key.shape[1], -1))  # [N, kv_heads, heads / kv_heads, t, width]
    with torch.autocast(query.device.type, enabled=False):
        out: Tensor = _Ring.apply(grouped, key, value, group, causal, scale)
    return out.flatten(1, 2)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup, causal: bool, scale: float
    ) -> Tensor:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        held, width = torch.cat([key, value], -1), key.shape[-1]
        out, total = attend(query, key, value, scale, causal)
        passing = _Pass(held, group) if size > 1 else None
        for step in range(1, size):
            assert passing is not None
            held = passing.wait()
            passing = _Pass(held, group) if step < size - 1 else None
            rows, keys = seen((rank - step) % size, rank, query.shape[3] // 2, causal)
            block = held[:, :, keys]
            mine, sums = attend(query[:, :, :, rows], block[..., :width], block[..., width:], scale, False)
            both = torch.logaddexp(total[..., rows], sums)
            old, new = (total[..., rows] - both).exp()[..., None], (sums - both).exp()[..., None]
            out[:, :, :, rows] = out[:, :, :, rows] * old + mine * new
            total[..., rows] = both
        result = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, result, total)
        ctx.group, ctx.causal, ctx.scale = group, causal, scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        query, key, value, result, total = ctx.saved_tensors
        group, causal, scale = ctx.group, ctx.causal, ctx.scale
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        held, width = torch.cat([key, value], -1), key.shape[-1]
        upstream = upstream.to(query.dtype)
        delta = (upstream.to(total.dtype) * result).sum(-1)
        passing = _Pass(held, group) if size > 1 else None
        d_query, d_own = _gradients(query, held, width, total, delta, upstream, scale, causal)
        homing: _Pass | None = None  # the gradients of other ranks' keys and values, on their way home
        for step in range(1, size):
            assert passing is not None
            held = passing.wait()
            passing = _Pass(held, group) if step < size - 1 else None
            rows, keys = seen((rank - step) % size, rank, query.shape[3] // 2, causal)
            some, part = _gradients(
                query[:, :, :, rows],
                held[:, :, keys],
                width,
                total[..., rows],
                delta[..., rows],
                upstream[:, :, :, rows],
                scale,
                False,
            )
            d_query[:, :, :, rows] += some
            d_held = homing.wait() if homing else torch.zeros_like(d_own)
            d_held[:, :, keys] += part
            homing = _Pass(d_held, group)
        if homing:
            d_own += homing.wait()
        d_key, d_value = d_own[..., :width], d_own[..., width:]
        return d_query.to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype), None, None, None


def seen(source: int, rank: int, half: int, causal: bool) -> tuple[slice, slice]:
    """(which of this rank's queries, which of the keys of rank `source`): what the one see, all of it, of the other."""
    if not causal:
        return ALL, ALL
    return (ALL, slice(half)) if source < rank else (slice(half, None), ALL)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention to these keys alone: (output [N, kv_heads, group, t, value_width], log-sum-exp [N, kv_heads, group, t]).

    Args:
        query: [N, kv_heads, group, t, width].
        key, value: [N, kv_heads, u, …].
        causal: query i sees keys 0 … i; else all u.
    """
    outs, sums = [], []
    for start in range(0, query.shape[3], TILE):
        _, keys, scores = _scores(query, key, start, scale, causal)
        total = scores.logsumexp(-1)
        weights = (scores - total[..., None]).exp_().to(value.dtype)
        mixed = weights.flatten(2, 3) @ value[:, :, keys]
        outs.append(mixed.to(scores.dtype).unflatten(2, scores.shape[2:4]))
        sums.append(total)
    return torch.cat(outs, 3), torch.cat(sums, 3)


def _gradients(
    query: Tensor,
    held: Tensor,
    width: int,
    total: Tensor,
    delta: Tensor,
    upstream: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """(of the queries, of keys and values side by side), what these keys contribute; in fp32, or fp64."""
    key, value = held[..., :width], held[..., width:]
    d_held = torch.zeros(held.shape, dtype=total.dtype, device=held.device)
    d_queries = []
    for start in range(0, query.shape[3], TILE):
        rows, keys, scores = _scores(query, key, start, scale, causal)
        weights = (scores - total[..., rows, None]).exp_()
        above, below = upstream[:, :, :, rows].flatten(2, 3), query[:, :, :, rows].flatten(2, 3)
        d_weights = (above @ value[:, :, keys].mT).to(total.dtype).unflatten(2, scores.shape[2:4])
        d_scores = (weights * (d_weights - delta[..., rows, None]) * scale).to(query.dtype).flatten(2, 3)
        d_held[:, :, keys, width:] += weights.to(query.dtype).flatten(2, 3).mT @ above
        d_held[:, :, keys, :width] += d_scores.mT @ below
        d_queries.append((d_scores @ key[:, :, keys]).to(total.dtype).unflatten(2, scores.shape[2:4]))
    return torch.cat(d_queries, 3), d_held


def _scores(query: Tensor, key: Tensor, start: int, scale: float, causal: bool) -> tuple[slice, slice, Tensor]:
    """(some queries, the keys that they see, their scores [N, kv_heads, group, rows, keys] in fp32 or fp64)."""
    stop = min(start + TILE, query.shape[3])
    rows, keys = slice(start, stop), slice(stop) if causal else ALL
    some = query[:, :, :, rows]
    scores = some.flatten(2, 3) @ key[:, :, keys].mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).unflatten(2, some.shape[2:4]) * scale
    if causal:
        later = torch.ones(stop - start, stop, dtype=torch.bool, device=query.device).triu_(start + 1)
        scores = scores.masked_fill_(later, float("-inf"))
    return rows, keys, scores


class _Pass:
    """A tensor on its way to the next rank of the ring, and another one like it on its way here."""

    def __init__(self, tensor: Tensor, group: dist.ProcessGroup) -> None:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        after, before = (dist.get_global_rank(group, (rank + step) % size) for step in (1, -1))
        self._sent = tensor.contiguous()
        self._received = torch.empty_like(self._sent, memory_format=torch.contiguous_format)
        send = dist.P2POp(dist.isend, self._sent, after, group)
        receive = dist.P2POp(dist.irecv, self._received, before, group)
        self._works = dist.batch_isend_irecv([send, receive])

    def wait(self) -> Tensor:
        for work in self._works:
            work.wait()
        return self._received
