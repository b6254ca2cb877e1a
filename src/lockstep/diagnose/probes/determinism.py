"""Whether an all-reduce is right, the same on all ranks, and the same each time."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist

from lockstep.diagnose.findings import Facts, Findings
from lockstep.diagnose.probes.ranks import rank_and_host
from lockstep.distributed.process_group import World

NUMBERS = 2**16  # that are all-reduced
REPEATS = 4
ROUNDING = 1e-5  # relative error of an fp32 sum that rounding explains


def probe_determinism(world: World) -> Facts:
    """Of one all-reduce of random numbers, made several times: this rank's results, and the error of the last one."""
    exact, mine = torch.zeros(NUMBERS, dtype=torch.float64), torch.empty(0)
    for rank in range(world.world_size):
        drawn = torch.randn(NUMBERS, generator=torch.Generator().manual_seed(rank))
        exact += drawn
        mine = drawn if rank == world.rank else mine
    mine = mine.to(world.device)
    digests, total = [], mine
    for _ in range(REPEATS):
        total = mine.clone()
        dist.all_reduce(total)
        digests.append(hashlib.sha256(total.cpu().numpy().tobytes()).hexdigest())
    return {"digests": digests, "off": ((total.cpu().double() - exact).norm() / exact.norm()).item()}


def judge_determinism(ranks: list[Facts]) -> Findings:
    found = Findings("determinism")
    about = [each["determinism"] for each in ranks]
    wrong = [each for each in ranks if not each["determinism"]["off"] < ROUNDING]  # a NaN is not less than anything
    digests = about[0]["digests"]
    unequal = [each for each in ranks if each["determinism"]["digests"] != digests]
    if wrong:
        figure = f"an all-reduce is wrong by {wrong[0]['determinism']['off']:.1g} on {rank_and_host(wrong[0])}"
        found.fails(figure, "leave that host out: its memory, GPU or network is broken")
    elif unequal:
        figure = f"{rank_and_host(unequal[0])} gets other bits from an all-reduce than {rank_and_host(ranks[0])}"
        found.fails(figure, "take hosts that are alike, and the same versions: the ranks' weights would diverge")
    elif len(set(digests)) > 1:
        figure = f"{len(digests)} all-reduces of the same numbers give {len(set(digests))} different results"
        found.warning(figure, "set NCCL_ALGO=Ring: until then a run is not repeatable to the last bit")
    else:
        off = max(one["off"] for one in about)
        found.ok(f"{len(digests)} all-reduces give the same bits on all ranks; off by {off:.0e}, which is rounding")
    return found
