"""What a strategy would need and take on some hardware: memory, bytes, seconds, money."""

from __future__ import annotations

import math
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lockstep.callbacks.model_flops import flops_per_sample
from lockstep.plan.config import PlanConfig
from lockstep.plan.dry_run import DryRun
from lockstep.plan.formulas import expected_traffic
from lockstep.plan.hardware import Hardware
from lockstep.plan.links import BETWEEN
from lockstep.plan.pipeline import dry_training
from lockstep.plan.rows import PlanRow
from lockstep.registry import is_file
from lockstep.tasks.build import known_task
from lockstep.utils.text import short

ALLOCATOR = "allocator"  # the part of the memory that holds no tensor


@dataclass(frozen=True)
class Estimate:
    """A row of the table.

    Attributes:
        memory: {part: bytes of the rank} at the peak of a step; of the rank that holds most.
        where: which rank that is, where they differ.
        room: bytes that torch can have on a device.
        host_memory: bytes of the rank in the host's memory, of what is offloaded.
        host_room: a rank's part of that memory; None: not known.
        traffic: bytes per step that are reduced, gathered, scattered or sent, as [kind, link, bytes].
        sent: bytes that a rank sends per step.
        as_formula: whether these are the bytes of lockstep.plan.formulas; None without a formula.
        seconds: of a step: compute, exposed communication, and the bubble of a pipeline.
        communication: seconds of all collectives, hidden or not.
        samples_per_second, tokens_per_second: of all devices; None without tokens.
        mfu: model FLOPs utilization; None where the model's cannot be counted.
        efficiency: samples per second and device, over those of one device that has a rank's share alone.
        limit: what most of the step goes into.
        hours, cost: device-hours of the whole training, and their price.
    """

    label: str
    command: str
    ranks: int
    global_batch_size: int
    memory: dict[str, int]
    where: str
    room: float
    host_memory: int
    host_room: float | None
    traffic: list[tuple[str, str, int]]
    sent: float
    as_formula: bool | None
    seconds: float
    compute: float
    communication: float
    exposed: float
    bubble: float
    samples_per_second: float
    tokens_per_second: float | None
    mfu: float | None
    efficiency: float | None
    limit: str
    hours: float
    cost: float | None

    @property
    def needed(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.needed <= self.room and self.host_over <= 0

    @property
    def host_over(self) -> float:
        """Bytes that the host lacks."""
        return 0.0 if self.host_room is None else max(0.0, self.host_memory - self.host_room)

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"peak_bytes": self.needed, "fits": self.fits}


def estimate(row: PlanRow, config: PlanConfig, hardware: Hardware) -> Estimate:
    """Plan a row; its efficiency is left to `against_one`."""
    found = dry_training(row.recipe, row.config, row.ranks, hardware)
    batch, times = int(row.config.global_batch_size), found.step.times
    rate = batch / times.step
    task = known_task(row.config)
    tokens = getattr(task, "tokens_per_sample", None)
    flops = flops_per_sample(task, row.config.seed)
    peak = hardware.flops[row.config.precision] * row.ranks
    samples = config.tokens / tokens if config.tokens and tokens else config.epochs * training_samples(task, batch)
    hours = math.ceil(samples / batch) * times.step * row.ranks / 3600
    return Estimate(
        label=row.label,
        command=command(row, hardware),
        ranks=row.ranks,
        global_batch_size=batch,
        memory=found.peak | {ALLOCATOR: found.slack},
        where=found.where,
        room=hardware.memory - hardware.reserved,
        host_memory=found.host_peak,
        host_room=hardware.offload.memory if hardware.offload else None,
        traffic=[(*which, size) for which, size in found.step.traffic().items()],
        sent=sum(each.sent for each in found.step.collectives),
        as_formula=agrees(row, found),
        seconds=times.step,
        compute=times.compute,
        communication=times.communication,
        exposed=times.exposed,
        bubble=times.bubble,
        samples_per_second=rate,
        tokens_per_second=tokens and rate * tokens,
        mfu=rate * flops / peak if flops else None,
        efficiency=None,
        limit=limit_of(found),
        hours=hours,
        cost=None if config.price is None else hours * config.price,
    )


def against_one(made: Estimate, alone: float | None) -> Estimate:
    """The same with its efficiency.

    Args:
        alone: seconds per sample of one device that has the whole model; None: not known.
    """
    if alone is None or made.ranks == 1:
        return made
    return replace(made, efficiency=made.samples_per_second * alone / made.ranks)


def agrees(row: PlanRow, found: DryRun) -> bool | None:
    """Whether the formula gives the bytes that were counted, to the byte."""
    expected = None if is_file(row.recipe.target) else expected_traffic(row.recipe.name, found.config, row.ranks)
    if expected is None:
        return None
    counted: dict[str, int] = {}
    for (kind, _), size in found.step.traffic().items():
        counted[kind] = counted.get(kind, 0) + size
    return counted == expected


def seconds_alone(row: PlanRow, ranks: int, hardware: Hardware) -> float:
    """Per sample, of one device with the whole model and with as many samples as each of `ranks` has."""
    share = max(1, int(row.config.global_batch_size) // ranks)
    config = replace(row.config, global_batch_size=share)
    return dry_training(row.recipe, config, 1, hardware).step.times.step / share


def training_samples(task: Any, batch: int) -> int:
    """Samples of an epoch; of a stream without a length a batch."""
    try:
        return len(task.train_set)
    except TypeError:
        return batch


def limit_of(found: DryRun) -> str:
    """What most of a step goes into: arithmetic, the device's memory, or links that nothing hides."""
    kinds = dict(found.step.times.kinds)
    across = any(each.link == BETWEEN for each in found.step.collectives)
    links = "node links" if across else "inner links"
    kinds["host link" if found.step.times.copies > found.step.times.communication else links] = found.step.times.exposed
    kinds["bubble"] = found.step.times.bubble
    return max(kinds, key=lambda kind: kinds[kind])


def command(row: PlanRow, hardware: Hardware) -> str:
    """What to type to have it run."""
    own = is_file(row.recipe.target)
    name = shlex.quote(short(Path(row.recipe.target))) if own else f"-m recipes.{row.recipe.name}"
    words = [
        word.replace("task.name=", "task=").replace('"', "") if word.startswith("task.name=") else word
        for word in row.words
    ]
    words.append(f"global_batch_size={row.config.global_batch_size}")
    if row.config.precision != "fp32" and not any(word.startswith("precision=") for word in words):
        words.append(f"precision={row.config.precision}")
    if row.ranks > hardware.per_node:
        nodes = -(-row.ranks // hardware.per_node)
        words += ["+cluster=slurm", f"cluster.nodes={nodes}", f"cluster.tasks_per_node={row.ranks // nodes}"]
    elif row.recipe.ranks is None:
        words.append(f"nproc={row.ranks}")
    return f"python {name} {shlex.join(words)}"
