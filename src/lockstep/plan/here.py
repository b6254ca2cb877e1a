"""This machine as a profile: what its ranks achieve together, measured. All ranks call `measure_hardware` together.

Everything is measured while all ranks do the same, each with the threads that it has: so a rank's share of a core, of the
memory's rate and of the caches is in each figure, and where there are more ranks than cores, the scheduler too. Machines are
seldom quiet, so nothing is measured in one go: all probes take their turn in several rounds.
On a CPU with a thread per rank it is the processor's time that counts, which other programs lengthen little: so a profile
is that of the machine when nothing else is at work. What no processor works at, the wait for messages, is by the clock.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist

from lockstep.diagnose.bandwidth import message_device, slowest_time, synchronize
from lockstep.distributed.collectives import gather_objects
from lockstep.distributed.cores import usable_cores
from lockstep.distributed.process_group import World
from lockstep.memory.usage import free_bytes
from lockstep.plan.hardware import Hardware, Link
from lockstep.plan.probes import Probe, collective_probes, host_costs, operation_probes
from lockstep.training.precision import DTYPES

MATRIX_SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices that are multiplied
COPIED = {"cpu": 2**26, "cuda": 2**30}  # bytes of a copy
ROUNDS, WINDOW = 5, 0.02  # how often each probe takes its turn, and about so many seconds each time


@dataclass(frozen=True)
class Taken:
    """Seconds of a call: of the clock, and of this rank's processor."""

    clock: float
    work: float

    @property
    def own(self) -> float:
        """What it takes when nothing else is at work: several threads work at once, and one may be kept waiting."""
        return max(1e-9, min(self.clock, self.work) if self.work else self.clock)


def measure_hardware(world: World) -> Hardware:
    """A profile of so many ranks of this machine, all at work at once."""
    kind = world.device.type
    rates = [rate_probe(name, dtype, MATRIX_SIDE[kind], world) for name, dtype in rated(kind).items()]
    source = torch.empty(COPIED[kind] // 4, device=world.device).zero_()
    target = torch.empty_like(source)
    copy = Probe("copied", 2 * source.nbytes, lambda: target.copy_(source))
    operations = operation_probes() if kind == "cpu" else []
    sent = collective_probes(world.world_size, message_device(world)) if world.world_size > 1 else []
    taken = in_rounds(world, [*rates, copy, *operations, *sent])
    flops = {probe.name: probe.work / taken[probe.name, probe.work].own for probe in rates}
    if kind == "cpu":
        flops |= dict.fromkeys(("bf16", "fp16"), flops["fp32"])
    measured = operation_curves(operations, taken) | collective_curves(sent, taken)
    least, link = 0.0, Link(1e12, 1.0, 0.0)
    if sent:
        (_, least), *_, (size, large) = measured["all-reduce"]
        share = 2 * (world.world_size - 1) / world.world_size
        link = Link(share * size / max(1e-9, large - least), 1.0, 0.0)
    free, _ = free_bytes(world.device)
    work = measured["all-reduce, work"][0][1] if sent else 0.0
    costs = host_costs(world, lambda run: least_seconds(world, run), work)
    return Hardware(
        name=f"this machine, {kind}, {world.threads} threads per rank",
        memory=free / (world.world_size if kind == "cpu" else 1),
        reserved=0.0,
        flops=flops,
        achieved=1.0,
        memory_bandwidth=copy.work / taken[copy.name, copy.work].own,
        memory_achieved=1.0,
        launch=costs["operation"],
        collective=least,
        per_node=world.world_size,
        inside=link,
        between=link,
        overlaps=kind == "cuda",
        device=kind,
        measured=measured,
        ranks_per_core=max(1.0, world.world_size * world.threads / usable_cores()) if kind == "cpu" else 1.0,
        host=costs if kind == "cpu" else {},
    )


def rated(kind: str) -> dict[str, torch.dtype]:
    """Precisions whose rate is measured; on a CPU those of 16 bits are taken as fp32."""
    return dict(DTYPES) | ({} if kind == "cpu" else {"bf16": torch.bfloat16, "fp16": torch.float16})


def rate_probe(name: str, dtype: torch.dtype, side: int, world: World) -> Probe:
    """A large matrix product."""
    a, b = (torch.full((side, side), 0.5, dtype=dtype, device=world.device) for _ in range(2))
    return Probe(name, 2 * side**3, lambda: a @ b)


def in_rounds(world: World, probes: list[Probe]) -> dict[tuple[str, float], Taken]:
    """What each probe's call takes when all ranks make it, on the slowest rank: the quickest by the clock, since other
    programs only ever lengthen it; the processor's time at the median."""
    repeats = []
    for probe in probes:
        probe.run()  # the first one also makes connections and buffers
        repeats.append(min(1000, max(1, int(WINDOW / slowest_time(world, window(world, probe.run, 1).clock)))))
    rounds = [
        [window(world, *each) for each in zip([p.run for p in probes], repeats, strict=True)] for _ in range(ROUNDS)
    ]
    ranks = gather_objects(rounds, world.control)
    found = {}
    for number, probe in enumerate(probes):
        clocks = [max(rows[turn][number].clock for rows in ranks) for turn in range(ROUNDS)]
        works = [max(rows[turn][number].work for rows in ranks) for turn in range(ROUNDS)]
        found[probe.name, probe.work] = Taken(min(clocks), statistics.median(works))
    return found


def window(world: World, run: Callable[[], Any], times: int) -> Taken:
    """What a call takes, of so many in a row, begun by all ranks together."""
    dist.barrier(world.control)
    synchronize(world)
    began, worked = time.perf_counter(), time.process_time()
    for _ in range(times):
        run()
    synchronize(world)
    work = (time.process_time() - worked) / times if world.device.type == "cpu" else 0.0
    return Taken((time.perf_counter() - began) / times, work)


def operation_curves(
    probes: list[Probe], taken: dict[tuple[str, float], Taken]
) -> dict[str, list[tuple[float, float]]]:
    """Points (work, seconds) of each class; its first one, nearly without work, is the host's and taken off."""
    found = points_of(probes, lambda probe: taken[probe.name, probe.work].own)
    return {
        name: never_less([(work, seconds - points[0][1]) for work, seconds in points]) for name, points in found.items()
    }


def collective_curves(
    probes: list[Probe], taken: dict[tuple[str, float], Taken]
) -> dict[str, list[tuple[float, float]]]:
    """Points (bytes, seconds) of each kind: of the clock, and of the processor."""
    found = points_of(probes, lambda probe: taken[probe.name, probe.work].clock)
    work = points_of(probes, lambda probe: taken[probe.name, probe.work].work)
    found |= {f"{name}, work": points for name, points in work.items()}
    return {name: never_less(points) for name, points in found.items()}


def points_of(probes: list[Probe], seconds: Callable[[Probe], float]) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for probe in probes:
        found.setdefault(probe.name, []).append((float(probe.work), seconds(probe)))
    return found


def never_less(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """By work; more work takes no less time, but for noise."""
    works, seconds = zip(*sorted(points), strict=True)
    return list(zip(works, accumulate((max(0.0, each) for each in seconds), max), strict=True))


def least_seconds(world: World, run: Callable[[], object]) -> float:
    """Of a call, on the slowest rank, when all of them make it: the median of the rounds."""
    run()
    times = max(1, math.ceil(WINDOW / slowest_time(world, window(world, run, 1).clock)))
    return statistics.median(slowest_time(world, window(world, run, times).own) for _ in range(ROUNDS))
