"""The bubble that recipes.pipeline_parallel names is the one in torch's own table of what each rank does when."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble

from lockstep.distributed.process_group import World
from recipes.pipeline_parallel import STAGES_A_RANK, bubble_share
from tests.helpers.harness import run_ranks

# Of one micro-batch on one stage: forward, backward, and backward in two halves, for the inputs and for the weights.
COSTS = {"F": 1, "B": 2, "I": 1, "W": 1}
KINDS = {
    "gpipe": ScheduleGPipe,
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
}
Order = dict[int, list[tuple[int, str, int]]]  # of each rank: (stage, what, micro-batch)


def torch_s_order(world: World, name: str, pieces: int) -> Order:
    ranks, per_rank = world.world_size, STAGES_A_RANK[name]
    stages = [
        PipelineStage(nn.Linear(2, 2), world.rank + ranks * turn, ranks * per_rank, torch.device("cpu"))
        for turn in range(per_rank)
    ]

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sum()

    schedule = KINDS[name](stages if per_rank > 1 else stages[0], pieces, loss_fn=loss)  # type: ignore[arg-type]
    order = schedule.pipeline_order if per_rank > 1 else schedule._get_pipeline_order()
    assert order is not None
    found = {
        rank: [re.fullmatch(r"(\d+)([FBIW])(\d+)", str(action)) for action in actions]
        for rank, actions in order.items()
    }
    return {rank: [(int(m[1]), m[2], int(m[3])) for m in matches if m] for rank, matches in found.items()}


def idle_shares(order: Order, stages: int) -> list[float]:
    """The share of a step in which each rank waits, when each starts a piece of work as soon as it is free and has what
    the piece needs."""
    ended: dict[tuple[int, str, int], int] = {}
    free, left = dict.fromkeys(order, 0), {rank: list(work) for rank, work in order.items()}
    while any(left.values()):
        before = sum(map(len, left.values()))
        for rank, work in left.items():
            while work:
                stage, what, piece = work[0]
                half = "B" if what in "BI" else what
                needs = [(stage, "F", piece)] if half == "B" else [(stage, "B", piece)] if what == "W" else []
                if half == "F" and stage:
                    needs.append((stage - 1, "F", piece))
                if half == "B" and stage < stages - 1:
                    needs.append((stage + 1, "B", piece))
                if any(each not in ended for each in needs):
                    break
                free[rank] = max([free[rank], *(ended[each] for each in needs)]) + COSTS[what]
                ended[stage, half, piece] = free[rank]
                work.pop(0)
        assert sum(map(len, left.values())) < before, "the table waits for itself"
    return [1 - sum(COSTS[what] for _, what, _ in order[rank]) / max(free.values()) for rank in order]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("ranks", "pieces"), [(2, 4), (2, 2), (4, 8)])
def test_the_bubble_is_the_one_of_torch_s_schedule(name: str, ranks: int, pieces: int) -> None:
    order = run_ranks(torch_s_order, ranks, name, pieces)[0]
    stages = ranks * STAGES_A_RANK[name]
    assert sum(map(len, order.values())) == stages * pieces * (3 if name == "zero_bubble" else 2)
    assert idle_shares(order, stages) == pytest.approx([bubble_share(name, ranks, pieces)] * ranks)


def order_run(world: World, name: str, pieces: int) -> list[tuple[int, str, int]]:
    """What this rank's stage really does in a step: torch's table of 1F1B names micro-batches that there are not."""
    ranks, found = world.world_size, []
    stage = PipelineStage(nn.Linear(2, 2), world.rank, ranks, torch.device("cpu"))

    def noted(what: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(piece: int, *args: Any, **options: Any) -> Any:
            found.append((world.rank, what, piece))
            return run(piece, *args, **options)

        return call

    stage.forward_one_chunk = noted("F", stage.forward_one_chunk)  # type: ignore[method-assign]
    stage.backward_one_chunk = noted("B", stage.backward_one_chunk)  # type: ignore[method-assign]
    schedule = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[name](stage, pieces, loss_fn=nn.MSELoss())
    batch = torch.ones(2 * pieces, 2)
    schedule.step(*[batch] * (world.rank == 0), **({"target": batch} if world.rank == ranks - 1 else {}))
    return found


@pytest.mark.parametrize(("ranks", "pieces"), [(2, 4), (3, 6)])
def test_one_forward_one_backward_runs_in_turns_and_waits_as_long_as_gpipe(ranks: int, pieces: int) -> None:
    orders = {name: dict(enumerate(run_ranks(order_run, ranks, name, pieces))) for name in ("gpipe", "1f1b")}
    for name, order in orders.items():
        assert all(
            sorted(work) == sorted((rank, what, n) for what in "FB" for n in range(pieces))
            for rank, work in order.items()
        )
        assert idle_shares(order, ranks) == pytest.approx([bubble_share(name, ranks, pieces)] * ranks)
    held = {name: most_held(order[0]) for name, order in orders.items()}
    assert held == {"gpipe": pieces, "1f1b": ranks}, "micro-batches whose activations the first stage keeps"


def most_held(work: list[tuple[int, str, int]]) -> int:
    return max(accumulate(1 if what == "F" else -1 for _, what, _ in work))
