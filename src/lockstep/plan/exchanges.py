"""Replicas that meet in one step of many, such as local SGD's: the mean step, from a few of each kind.

A period may have hundreds of steps of which one or a few exchange weights. So a shorter one is taken, in which both kinds
of steps are, and each counts as often as in the real one.
"""

from __future__ import annotations

from typing import Any

from lockstep.config.copies import with_values
from lockstep.plan.clock import StepTimes
from lockstep.plan.links import Collective
from lockstep.plan.watch import StepTrace


def shortened(config: Any) -> Any:
    """The same with a period of as many steps that exchange, and no more than as many others."""
    if config.steps_between_exchanges == 1:
        return config
    return with_values(config, {"period": min(config.period, 2 * config.fragments)})


def mean_step(traces: list[StepTrace], config: Any) -> StepTrace:
    """The mean over a period's steps.

    Args:
        traces: of the steps of the shortened period.
        config: with the real period, in which each of `fragments` is exchanged once.
    """
    if config.steps_between_exchanges == 1:
        return traces[-1]
    period, exchanges = config.period, config.fragments
    most_first = sorted(traces, key=lambda trace: -sum(trace.traffic().values()))
    apart = len(most_first) - exchanges
    weights = [1 / period] * exchanges + [(period - exchanges) / period / max(1, apart)] * apart
    weighted = list(zip(weights, most_first, strict=True))
    sizes: dict[tuple[str, int, int], float] = {}
    kinds: dict[str, float] = {}
    for weight, trace in weighted:
        for each in trace.collectives:
            key = each.kind, each.ranks, each.nodes
            sizes[key] = sizes.get(key, 0.0) + weight * each.size
        for kind, seconds in trace.times.kinds.items():
            kinds[kind] = kinds.get(kind, 0.0) + weight * seconds
    times = {
        name: sum(weight * getattr(trace.times, name) for weight, trace in weighted)
        for name in ("compute", "communication", "exposed", "bubble", "work")
    }
    return StepTrace(
        [Collective(kind, round(size), ranks, nodes) for (kind, ranks, nodes), size in sizes.items()],
        round(sum(weight * trace.flops for weight, trace in weighted)),
        StepTimes(**times, kinds=kinds),
    )
