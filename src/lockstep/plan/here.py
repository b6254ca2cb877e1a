"""These machines as a profile: what their ranks achieve together, measured. All ranks call `measure_hardware` together.

Everything is measured while all ranks do the same, each with the threads that it has: so a rank's share of a core, of the
memory's rate and of the caches is in each figure, and where there are more ranks than cores, the scheduler too. Machines are
seldom quiet, so nothing is measured in one go: all probes take their turn in several rounds, of which the medians count.
On a CPU with a thread per rank it is the processor's time that counts, which other programs lengthen little: so a profile
is that of the machine when nothing else is at work. What no processor works at, the wait for messages, is by the clock.
On several nodes collectives are measured twice: among the ranks of each node, all nodes at once, and among all ranks.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, groupby, islice

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lockstep.diagnose.bandwidth import message_device, slowest_time, synchronize
from lockstep.distributed.collectives import gather_numbers, gather_objects
from lockstep.distributed.cores import usable_cores
from lockstep.distributed.process_group import World
from lockstep.errors import UserError
from lockstep.memory.usage import free_bytes
from lockstep.plan.hardware import ACROSS, Hardware, Link
from lockstep.plan.probes import (
    MOST_IN_TURN,
    InTurn,
    Probe,
    collective_probes,
    host_costs,
    host_probes,
    operation_probes,
)
from lockstep.training.precision import DTYPES
from lockstep.utils.text import count

MATRIX_SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices that are multiplied
COPIED = {"cpu": 2**26, "cuda": 2**30}  # bytes of a copy
ROUNDS, WINDOW = 5, 0.02  # how often each probe takes its turn, and about so many seconds each time
UNKNOWN = Link(1e12, 1.0, 0.0)  # of one rank; plan/hardware.py refuses to plan more with it


@dataclass(frozen=True)
class Taken:
    """Seconds of a call: of the clock, and of this rank's processor."""

    clock: float
    work: float

    @property
    def own(self) -> float:
        """What it takes when nothing else is at work: several threads work at once, and one may be kept waiting."""
        return max(1e-9, min(self.clock, self.work) if self.work else self.clock)


class MachineProbes:
    """All probes of this machine; each round all of them take their turn once. All ranks call each method together.

    Rounds can be far apart: with one before each of several trainings, what is found is the machine as these trainings had
    it, and not at its best.
    """

    def __init__(self, world: World) -> None:
        self._world, kind = world, world.device.type
        self._rates = [rate_probe(name, dtype, MATRIX_SIDE[kind], world) for name, dtype in rated(kind).items()]
        source = torch.empty(COPIED[kind] // 4, device=world.device).zero_()
        target = torch.empty_like(source)
        self._copy = Probe("copied", 2 * source.nbytes, lambda: target.copy_(source))
        self._operations = operation_probes() if kind == "cpu" else []
        by_node, where = ranks_by_node(world.hosts), message_device(world)
        nodes, per_node = self._shape = len(by_node), len(by_node[0])
        mesh = init_device_mesh(where.type, (nodes, per_node), mesh_dim_names=("nodes", "node"))
        self._inside = collective_probes(mesh.get_group("node"), where) if per_node > 1 else []
        self._across = collective_probes(everyone(), where, ACROSS) if nodes > 1 else []
        self._host = host_probes(world)
        sent = [*self._inside, *self._across]
        self._probes = [*self._rates, self._copy, *self._operations, *sent, *self._host]
        self._repeats: list[int] = []
        self._rounds: list[list[Taken]] = []

    def take_rounds(self, number: int) -> None:
        """Time each probe so often."""
        if not self._repeats:
            for probe in self._probes:
                probe.run()  # the first one also makes connections and buffers
                once = slowest_time(self._world, window(self._world, probe, 1).clock)
                self._repeats.append(min(1000, max(1, int(WINDOW / once))))
        for _ in range(number):
            pairs = zip(self._probes, self._repeats, strict=True)
            self._rounds.append([window(self._world, *each) for each in pairs])

    def _taken(self, last: int) -> dict[tuple[str, float], Taken]:
        """What each probe's call takes on the slowest rank, by the medians of the last rounds; 0: of all.

        The medians are each rank's own: a rank that was kept waiting once is not the slowest one for that.
        """
        ranks = gather_objects(self._rounds[-last:], self._world.control)
        found = {}
        for number, probe in enumerate(self._probes):
            clock, work = (
                max(statistics.median(getattr(row[number], each) for row in rows) for rows in ranks)
                for each in ("clock", "work")
            )
            found[probe.name, probe.work] = Taken(clock, work)
        return found

    def hardware(self, last: int = 0) -> Hardware:
        """The profile of what the last so many rounds have found; 0: all of them."""
        world, kind, taken = self._world, self._world.device.type, self._taken(last)
        flops = {probe.name: probe.work / taken[probe.name, probe.work].own for probe in self._rates}
        if kind == "cpu":
            flops |= dict.fromkeys(("bf16", "fp16"), flops["fp32"])
        (nodes, per_node), ranks = self._shape, world.world_size
        collectives = collective_curves([*self._inside, *self._across], taken)
        least, inside = 0.0, UNKNOWN
        if self._inside:
            (_, least), *_ = collectives["all-reduce"]
            inside = link_of(collectives["all-reduce"], 2 * (per_node - 1) / per_node, 0.0)
        between = inside
        if self._across:
            hop = max(0.0, collectives["all-reduce" + ACROSS][0][1] - least) / (2 * math.log2(nodes))
            between = link_of(collectives["all-reduce" + ACROSS], 2 * (ranks - 1) / ranks / per_node, hop)
        free, _ = free_bytes(world.device)
        cores_of_a_rank = min(gather_numbers(usable_cores() / (per_node * world.threads), world.device))
        whole = "all-reduce" + (ACROSS if self._across else "")
        work = collectives[f"{whole}, work"][0][1] if ranks > 1 else 0.0
        costs = host_costs(self._host, lambda probe: taken[probe.name, probe.work].own, work)
        return Hardware(
            name=f"{'this machine' if nodes == 1 else 'these machines'}, {kind}, {count(world.threads, 'thread')} per rank",
            memory=min(gather_numbers(free / (per_node if kind == "cpu" else 1), world.device)),
            reserved=0.0,
            flops=flops,
            achieved=1.0,
            memory_bandwidth=self._copy.work / taken[self._copy.name, self._copy.work].own,
            memory_achieved=1.0,
            launch=costs["operation"],
            collective=least,
            per_node=per_node,
            inside=inside,
            between=between,
            overlaps=kind == "cuda",
            device=kind,
            measured=operation_curves(self._operations, taken) | collectives,
            ranks_per_core=max(1.0, 1 / cores_of_a_rank) if kind == "cpu" else 1.0,
            host=costs if kind == "cpu" else {},
            nodes=nodes,
        )


def measure_hardware(world: World, say: Callable[[str], None] = lambda _: None) -> Hardware:
    """A profile of so many ranks of these machines, all at work at once; the same on every rank.

    Args:
        say: is told of the progress.

    Raises:
        UserError: the hosts have unequal numbers of ranks, or ranks that are not in a row.
    """
    probes = MachineProbes(world)
    for number in range(1, ROUNDS + 1):
        probes.take_rounds(1)
        say(f"measured {number} of {ROUNDS} times")
    return probes.hardware()


def ranks_by_node(hosts: list[str]) -> list[list[int]]:
    """The ranks of each host, as many on each and in a row.

    Args:
        hosts: the host of each rank.

    Raises:
        UserError: they are not so, as no profile can say.
    """
    runs = [list(ranks) for _, ranks in groupby(range(len(hosts)), lambda rank: hosts[rank])]
    names = [hosts[ranks[0]] for ranks in runs]
    if len(set(names)) < len(names) or len({len(ranks) for ranks in runs}) > 1:
        shown = ", ".join(f"{count(number, 'rank')} on {host}" for host, number in islice(Counter(hosts).items(), 4))
        more = ", …" if len(set(hosts)) > 4 else ""
        raise UserError(f"a profile needs as many ranks on each host, in a row; there are {shown}{more}")
    return runs


def everyone() -> dist.ProcessGroup:
    """The group of all ranks."""
    group = dist.group.WORLD
    assert group
    return group


def link_of(curve: list[tuple[float, float]], share: float, hop: float) -> Link:
    """The rate of an all-reduce's large messages.

    Args:
        share: of its bytes that a device sends over this link.
        hop: seconds of latency.
    """
    (_, least), *_, (size, large) = curve
    return Link(share * size / max(1e-9, large - least), 1.0, hop)


def rated(kind: str) -> dict[str, torch.dtype]:
    """Precisions whose rate is measured; on a CPU those of 16 bits are taken as fp32."""
    return dict(DTYPES) | ({} if kind == "cpu" else {"bf16": torch.bfloat16, "fp16": torch.float16})


def rate_probe(name: str, dtype: torch.dtype, side: int, world: World) -> Probe:
    """A large matrix product."""
    a, b = (torch.full((side, side), 0.5, dtype=dtype, device=world.device) for _ in range(2))
    return Probe(name, 2 * side**3, lambda: a @ b)


def window(world: World, probe: Probe, times: int) -> Taken:
    """What a call takes, of so many in a row, begun by all ranks together; what comes before each is not timed."""
    for _ in range(0 if probe.before else min(times, MOST_IN_TURN)):  # until what it keeps is its own
        probe.run()
    dist.barrier(world.control)
    synchronize(world)
    clock = work = 0.0
    for _ in range(times if probe.before else 1):
        if probe.before:
            probe.before()
            synchronize(world)
        began, worked = time.perf_counter(), time.process_time()
        for _ in range(1 if probe.before else times):
            probe.run()
        synchronize(world)
        work += time.process_time() - worked if world.device.type == "cpu" else 0.0
        clock += time.perf_counter() - began
    for each in (probe.run, probe.before):
        if isinstance(each, InTurn):
            each.release()
    return Taken(clock / times, work / times)


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
