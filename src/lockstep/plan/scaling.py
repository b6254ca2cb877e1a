"""A strategy from 8 to 16,384 devices: how fast, how full, where it stops scaling, and why.

The recipe takes its steps on up to four nodes. Beyond, its last two steps are held side by side, operation by operation and
collective by collective: what doubled with the devices (the ranks of a group), halved (a rank's part) or stayed goes on doing
so, and the clock is told the step that results. Where a formula says how many bytes a technique sends, it has the word: FSDP
fills tensors up to a multiple of the ranks. tests/unit/test_plan_scaling.py holds it to steps that were taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from lockstep.plan.clock import ClockEvent, DeviceClock
from lockstep.plan.config import PlanConfig
from lockstep.plan.dry_run import DryRun
from lockstep.plan.formulas import expected_traffic
from lockstep.plan.hardware import Hardware
from lockstep.plan.links import BETWEEN, Collective
from lockstep.plan.pipeline import dry_training
from lockstep.plan.rows import PlanRow
from lockstep.registry import is_file

TAKEN_NODES = 4  # up to which steps are taken; the last two numbers of them are on more than one node each
LEAST_GAIN = 1.5  # a strategy scales while twice the devices are so many times as fast


@dataclass(frozen=True)
class CurvePoint:
    """A strategy on so many devices.

    Attributes:
        samples_per_second: of all devices.
        seconds, exposed: of a step, and of them those in which a rank waits for collectives.
        memory: bytes of a rank at the peak.
        why: what communication goes into most: a kind of collective, and whether its bytes or its hops.
    """

    ranks: int
    samples_per_second: float
    seconds: float
    exposed: float
    memory: float
    why: str


@dataclass(frozen=True)
class ScalingCurve:
    """A strategy on ever more devices.

    Attributes:
        room: bytes that torch can have on a device.
    """

    label: str
    points: tuple[CurvePoint, ...]
    room: float

    def efficiency(self, point: CurvePoint) -> float:
        """Speed per device, over that on the fewest devices."""
        first = self.points[0]
        return point.samples_per_second / point.ranks / (first.samples_per_second / first.ranks)

    @property
    def end(self) -> CurvePoint | None:
        """The last point before twice the devices are not LEAST_GAIN times as fast; None: it scales to the last."""
        for point, more in zip(self.points, self.points[1:], strict=False):
            if more.samples_per_second < LEAST_GAIN * point.samples_per_second:
                return point
        return None

    def verdict(self) -> str:
        """One line for people."""
        last = self.points[-1]
        fits = next((point.ranks for point in self.points if point.memory <= self.room), None)
        memory = "" if fits == self.points[0].ranks else f"; fits from {fits:,}" if fits else "; fits on none of these"
        if self.end is None:
            return f"{self.label}: scales to {last.ranks:,}, {self.efficiency(last):.0%} of linear{memory}"
        after = self.points[self.points.index(self.end) + 1]
        waits = f"{after.exposed / after.seconds:.0%} of a step waits for {after.why}"
        if after.exposed < 0.2 * after.seconds:
            waits = "a rank's share is too little to keep it busy"
        return f"{self.label}: stops at {self.end.ranks:,}: on {after.ranks:,} {waits}{memory}"

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        points = [asdict(point) | {"efficiency": self.efficiency(point)} for point in self.points]
        return {
            "label": self.label,
            "stops_at": self.end and self.end.ranks,
            "points": points,
            "verdict": self.verdict(),
        }


def curve_ranks(most: int, per_node: int) -> list[int]:
    """A node, two, four, … up to `most` devices."""
    found = [per_node]
    while found[-1] * 2 <= most:
        found.append(found[-1] * 2)
    return found


def scaled(config: PlanConfig, ranks: int, first: int) -> PlanConfig:
    """The plan's config for so many devices: `global_batch_size` is that of `first` devices."""
    batch = config.global_batch_size
    if config.scaling == "weak" and not isinstance(batch, str):
        batch = batch * ranks // first
    return replace(config, gpus=ranks, global_batch_size=batch)


def scaling_curve(rows: list[PlanRow], ranks: list[int], weak: bool, hardware: Hardware) -> ScalingCurve:
    """A strategy's curve.

    Args:
        rows: of the same strategy on ranks[0], ranks[1], … devices; there may be fewer rows than ranks.
        weak: whether a rank's share of the batch stays the same.
    """
    taken = [dry_training(row.recipe, row.config, row.ranks, hardware) for row in rows]
    points = [
        point_of(row, found, int(row.config.global_batch_size), hardware)
        for row, found in zip(rows, taken, strict=True)
    ]
    last = rows[-1]
    batch = int(last.config.global_batch_size)
    known = len(rows) > 1 and bool(
        taken[-1].step.events
    )  # a pipeline's stages have been played, and are not played again
    for number, more in enumerate(ranks[len(rows) :] if known else [], start=1):
        samples = batch * 2**number if weak else batch
        if samples < more:
            break  # a rank would have less than one sample
        found = further(taken[-2], taken[-1], number, hardware, formula_of(last, more, samples))
        if found is None:
            break
        events, memory = found
        times = DeviceClock(hardware).replay(events)
        sent = [given[0] for name, given in events if name == "collective"]
        points.append(
            CurvePoint(more, samples / times.step, times.step, times.exposed, memory, slowest(sent, hardware))
        )
    return ScalingCurve(name_of(rows), tuple(points), hardware.memory - hardware.reserved)


def name_of(rows: list[PlanRow]) -> str:
    """`fsdp replicate=nodes`: what grows with the devices has no number."""
    first, last = rows[0].own, rows[-1].own
    words = [
        one if one == other else f"{other.partition('=')[0]}=nodes" for one, other in zip(first, last, strict=True)
    ]
    return " ".join([rows[0].recipe.name, *words])


def point_of(row: PlanRow, found: DryRun, batch: int, hardware: Hardware) -> CurvePoint:
    times = found.step.times
    why = slowest(found.step.collectives, hardware)
    return CurvePoint(row.ranks, batch / times.step, times.step, times.exposed, found.peak_bytes, why)


def slowest(collectives: list[Collective], hardware: Hardware) -> str:
    """`all-gather's hops between nodes`: the kind that takes longest, and what it takes longest for."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for each in collectives:
        whole = each.seconds(hardware)
        hops = min(whole, replace(each, size=1).seconds(hardware)) if each.size else 0.0
        so_far = seconds.setdefault((each.kind, each.link), [0.0, 0.0])
        so_far[0], so_far[1] = so_far[0] + whole, so_far[1] + hops
    if not seconds:
        return "nothing"
    (kind, link), (whole, hops) = max(seconds.items(), key=lambda pair: pair[1][0])
    place = "between nodes" if link == BETWEEN else "inside a node"
    return f"{kind}'s {'hops' if hops > whole / 2 else 'bytes'} {place}"


def formula_of(row: PlanRow, ranks: int, batch: int) -> tuple[dict[str, int], dict[str, int]] | None:
    """Bytes by kind by formula, on the last devices that were taken and on so many."""
    if is_file(row.recipe.target):
        return None
    config = row.config
    own = {"global_batch_size": batch}
    if getattr(config, "replicate", 1) > 1:
        own["replicate"] = config.replicate * ranks // row.ranks  # type: ignore[attr-defined]
    known, there = expected_traffic(row.recipe.name, config, row.ranks), None
    if known is not None:
        there = expected_traffic(row.recipe.name, replace(config, **own), ranks)  # type: ignore[arg-type]
    return (known, there) if known and there else None


def further(
    half: DryRun,
    last: DryRun,
    doublings: int,
    hardware: Hardware,
    formula: tuple[dict[str, int], dict[str, int]] | None,
) -> tuple[list[ClockEvent], float] | None:
    """(a step on 2^doublings times as many devices as `last`, bytes of its peak); None: the two steps are not alike."""
    one, two = half.step.events, last.step.events
    if [name for name, _ in one] != [name for name, _ in two]:
        return None
    events: list[ClockEvent] = []
    for (name, before), (_, now) in zip(one, two, strict=True):
        if name == "operation":
            kind, flops, dtype, size, reads, writes, operation = now
            flops, size = onward(before[1], flops, doublings), onward(before[3], size, doublings)
            events.append((name, (kind, flops, dtype, size, reads, writes, operation)))
        elif name == "collective":
            each, reads, writes = now
            events.append((name, (grown(before[0], each, doublings, hardware, formula), reads, writes)))
        elif name in ("on_host", "copy"):
            events.append((name, (onward(before[0], now[0], doublings), *now[1:])))
        else:
            events.append((name, now))
    memory = sum(onward(half.peak[part], size, doublings) for part, size in last.peak.items())
    return events, memory


def onward(before: float, now: float, doublings: int) -> float:
    """What doubled, halved or stayed goes on doing so; what is in between tends to a part that stays and one that halves."""
    if not before or before == now:
        return now
    if now > before:
        return float(now * (now / before) ** doublings)
    stays = max(0.0, 2 * now - before)  # now = stays + halves / 2, before = stays + halves
    return float(stays + (now - stays) / 2**doublings)


def grown(
    before: Collective,
    now: Collective,
    doublings: int,
    hardware: Hardware,
    formula: tuple[dict[str, int], dict[str, int]] | None,
) -> Collective:
    """A collective on so many more devices."""
    size = onward(before.size, now.size, doublings)
    if formula and formula[0].get(now.kind):
        size = now.size * formula[1][now.kind] / formula[0][now.kind]
    ranks = round(now.ranks * (now.ranks / before.ranks) ** doublings)
    nodes = now.nodes if ranks == now.ranks else round(now.nodes * (ranks / now.ranks))
    return replace(now, size=round(size), ranks=ranks, nodes=max(nodes, -(-ranks // hardware.per_node)))


def strategies(rows_by_ranks: list[list[PlanRow]]) -> Iterator[list[PlanRow]]:
    """The rows of one strategy on 1, 2, 4, … nodes, for each that runs on the first of these."""

    def key(row: PlanRow) -> tuple[str, tuple[str, ...]]:
        return row.recipe.target, tuple(each if "replicate=" not in each else "replicate" for each in row.own)

    tables = [{key(row): row for row in rows} for rows in rows_by_ranks]
    for name in dict.fromkeys(name for table in tables for name in table):
        found = [table[name] for table in tables if name in table]
        if len({row.ranks for row in found}) > 1:
            yield found
