"""Attention over ranks, by a ring and by an exchange of heads, is plain attention: forward and backward, in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from lockstep.distributed.process_group import World
from lockstep.parallel import ring_attention as ring
from lockstep.parallel.ulysses import ulysses_attention
from tests.helpers.harness import run_ranks

WAYS: dict[str, Callable[..., Tensor]] = {"ring": ring.ring_attention, "ulysses": ulysses_attention}
HEADS = ((4, 4), (8, 4))  # of queries, and of keys and values
NAMES = ("output", "query", "key", "value")


def of_everyone(world: World, length: int, rows: int, dtype: torch.dtype) -> dict[str, float]:
    """{what: the largest difference from one process's, relative to its largest number}, on the rank's own positions."""
    ring.TILE = rows
    group = dist.group.WORLD
    assert group is not None
    torch.manual_seed(3)
    found: dict[str, float] = {}
    for way, (heads, kv_heads), causal in ((w, h, c) for w in WAYS for h in HEADS for c in (True, False)):
        shapes = ((heads, 6), (kv_heads, 6), (kv_heads, 10))  # values may be wider
        given = [torch.randn(3, count, length, width, dtype=torch.float64).to(dtype) for count, width in shapes]
        upstream = torch.randn(3, heads, length, 10, dtype=torch.float64).to(dtype)
        whole = [each.double().clone().requires_grad_() for each in given]
        query, key, value = whole
        expected = F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=0.3, enable_gqa=True)
        expected.backward(upstream.double())
        mine = positions(way, length, world)
        parts = [each[:, :, mine].clone().requires_grad_() for each in given]
        out = WAYS[way](*parts, group, causal, 0.3)
        out.backward(upstream[:, :, mine])
        assert out.dtype == dtype
        pairs = [(out, expected), *((part.grad, each.grad) for part, each in zip(parts, whole, strict=True))]
        for name, (a, b) in zip(NAMES, pairs, strict=True):
            assert a is not None
            assert b is not None
            found[f"{way} {name} {heads}/{kv_heads} causal={causal}"] = relative(a, b[:, :, mine])
    return found


def positions(way: str, length: int, world: World) -> Tensor:
    if way == "ring":
        return ring.zigzag_positions(length, world.rank, world.world_size)
    return torch.arange(length).chunk(world.world_size)[world.rank]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("ranks", [2, 4])
def test_it_is_plain_attention_forward_and_backward(ranks: int) -> None:
    for found in run_ranks(of_everyone, ranks, 48, 5, torch.float64):  # tiles of 5 queries, the last one ragged
        assert len(found) == 2 * 2 * 2 * 4
        assert {name: error for name, error in found.items() if not error <= 1e-12} == {}


def test_in_16_bits_it_is_as_near_as_16_bits_can_be() -> None:
    for found in run_ranks(of_everyone, 2, 32, 1024, torch.bfloat16):
        assert {name: error for name, error in found.items() if not error <= 0.02} == {}


def test_every_rank_has_an_early_and_a_late_chunk_and_all_have_equal_work() -> None:
    for size in (1, 2, 4):
        dealt = [ring.zigzag_positions(8 * size, place, size) for place in range(size)]
        assert sorted(torch.cat(dealt).tolist()) == list(range(8 * size))
        if size > 1:
            assert len({int(mine.sum()) for mine in dealt}) == 1, "as many keys in all for the queries of each rank"
    assert ring.zigzag_positions(8, 0, 2).tolist() == [0, 1, 6, 7]


def _late_key(world: World) -> list[Any]:
    """What changes on rank 0 and 1 when the last position's key and value, rank 0's, do."""
    group = dist.group.WORLD
    assert group is not None
    mine = ring.zigzag_positions(8, world.rank, 2)
    outs = []
    for change in (0.0, 1.0):
        torch.manual_seed(0)
        query, key, value = torch.randn(3, 1, 2, 8, 4, dtype=torch.float64)
        key[:, :, 7] += change
        value[:, :, 7] += change
        outs.append(ring.ring_attention(query[:, :, mine], key[:, :, mine], value[:, :, mine], group))
    return [int(mine[at]) for at in range(4) if not torch.equal(outs[0][:, :, at], outs[1][:, :, at])]


def test_no_query_sees_a_later_key() -> None:
    assert run_ranks(_late_key, 2) == [[7], []]
