"""A pipeline's step, from what each of its ranks does by itself: who waits for whom, and which rank holds most.

Each rank of one pipeline is planned alone. Its trace says how long it computes between its messages. These traces are
then played together: a rank that receives goes on when the message has arrived. So the bubble follows from the schedule
that torch issues, from stages of unequal cost and from the links, and not from a formula.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lockstep.config.copies import with_values
from lockstep.config.keys import AUTO
from lockstep.config.schema import Config
from lockstep.distributed.parallel_dims import ParallelDims
from lockstep.errors import UserError
from lockstep.parallel.partition import balance, split, units
from lockstep.plan.dry_run import DryRun, DryTraining, as_planned, dry_steps, dry_world
from lockstep.plan.hardware import Hardware
from lockstep.plan.watch import StageMessage, StepTrace
from lockstep.recipe import Recipe
from lockstep.tasks.build import blocks_of_task


@dataclass
class PlayedRank:
    """A rank while its step is played: when it is, when its link is free, and what it has still to do."""

    rest: deque[StageMessage]
    now: float = 0.0
    link: float = 0.0
    done: float = 0.0  # of its own work


def dry_training(recipe: Recipe, config: Config, world_size: int, hardware: Hardware) -> DryRun:
    """`dry_steps` of the rank that says most: of a pipeline all ranks are planned, and their steps played together.

    Memory is that of the rank that holds most, bytes those of the rank that sends most.
    """
    if not ParallelDims.of(0, world_size, config, recipe.ranks).in_stages:
        return dry_steps(recipe, config, world_size, hardware)
    config = with_cut(recipe, config, world_size, hardware)
    runs = [dry_steps(recipe, config, world_size, hardware, rank) for rank in range(config.model_parallel_size)]
    worst = max(range(len(runs)), key=lambda rank: runs[rank].peak_bytes)
    sender = max(runs, key=lambda run: sum(run.step.traffic().values()))
    busiest = max(runs, key=lambda run: run.step.times.step).step
    step = played([run.step for run in runs], hardware.overlaps)
    times = replace(busiest.times, bubble=max(0.0, step - busiest.times.step))
    trace = StepTrace(sender.step.collectives, busiest.flops, times)
    return replace(runs[worst], step=trace, where=f"rank {worst} of {len(runs)}", config=config)


def played(traces: Sequence[StepTrace], overlaps: bool) -> float:
    """Seconds until the last rank of a pipeline is done.

    Args:
        overlaps: whether a rank computes while its message travels.

    Raises:
        UserError: each waits for another's message.
    """
    ranks = [PlayedRank(deque(trace.messages)) for trace in traces]
    arrived: dict[tuple[int, int], deque[float]] = {}
    while any(rank.rest for rank in ranks):
        moved = False
        for number, rank in enumerate(ranks):
            while rank.rest:
                message = rank.rest[0]
                waiting = arrived.setdefault((message.peer, number), deque())
                if message.seconds is None and not waiting:
                    break
                rank.now += message.began - rank.done
                rank.done = message.ended
                if message.seconds is None:
                    rank.now = max(rank.now, waiting.popleft())
                else:
                    rank.link = max(rank.link, rank.now) + message.seconds
                    arrived.setdefault((number, message.peer), deque()).append(rank.link)
                    rank.now = rank.now if overlaps else rank.link
                rank.rest.popleft()
                moved = True
        if not moved:
            raise UserError("its ranks wait for messages that none of them sends")
    return max(rank.now + trace.times.step - rank.done for rank, trace in zip(ranks, traces, strict=True))


def with_cut(recipe: Recipe, config: Any, world_size: int, hardware: Hardware) -> Any:
    """The same config, with the cut that balanced parts would have on this hardware; nothing is measured."""
    if config.cut != "balanced" and (config.cut != AUTO or config.parts == 2):
        return config
    config = as_planned(config)
    with dry_world(config, world_size, hardware) as (world, watch, example):
        run = DryTraining(recipe, config, world, watch, example)
        model = run.place(run.task.build_model()).train()
        blocks = blocks_of_task(run.task, model)
        firsts = list(units(model, blocks))
        values: Any = run.data.example(run.samples // config.pipeline_micro_batches).inputs
        values = values if isinstance(values, tuple) else (values,)
        for part in split(model, firsts[1:], blocks):
            values = tuple(
                x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in values
            )
            watch.begin()
            with run.autocast():
                outputs = part(*values)
            values = outputs if isinstance(outputs, tuple) else (outputs,)
            if wanted := [x for x in values if isinstance(x, torch.Tensor) and x.requires_grad]:
                torch.autograd.backward([x.sum() for x in wanted])
            watch.end()
    if config.parts > len(firsts):
        raise UserError(f"cut: the model has {len(firsts)} blocks to cut between, too few for {config.parts} parts")
    starts = balance([trace.times.step for trace in watch.steps], config.parts)
    return with_values(config, {"cut": [firsts[start] for start in starts[1:]]})
