"""What runs on the same work tell of each other, as rows of figures.

A row is a recipe on a number of ranks, over all its rounds: each figure is the median of the rounds. Ratios are taken
round by round, between runs that met the same machine at about the same time, and then their median.

**Scaling is strong scaling**: the global batch, and so the work of a step, is the same for every number of ranks. A row
is set against one row: `single` where it is there, else the same recipe on its fewest ranks. `speedup` is samples/s over
that row's. `efficiency` is the speedup over how many times as many devices it has: GPUs; on a machine without, the
cores that its ranks may use. 1 is ideal.

**A step is taken apart** into seconds, as means over the ranks: waiting for data; parts that wait for other parts
(`idle`, of recipes that cut the model); communication that is exposed, during which the rank computes nothing; and the
rest, which is compute. Where a recipe reports idle parts, their waits for each other are idle and not communication.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lockstep.compare.cases import Case

Result = dict[str, Any]  # a run's result.json, `start_seconds` and `folder`


@dataclass(frozen=True)
class RunPlan:
    """What recipes.plan predicts of a run.

    Attributes:
        seconds: of a step.
        sent: bytes that the rank that sends most hands to its collectives per step.
        peak: bytes of torch's tensors on the rank that holds most.
        state: of them weights, gradients and optimizer; 0: not known.
        device: what torch calls the hardware.
    """

    seconds: float
    sent: int
    peak: int
    state: int
    device: str


@dataclass
class ComparisonRow:
    """A case's figures; None, or nothing, where none of its runs has them. Lists are in rank order."""

    recipe: str
    label: str
    ranks: int
    devices: int
    rounds: int
    samples_per_second: float
    slowest: float
    fastest: float
    step_seconds: float
    step_seconds_p95: float
    tokens_per_second: float | None = None
    model_flops_per_second: float | None = None
    mfu: float | None = None
    against: str | None = None
    speedup: float | None = None
    speedup_from: float | None = None
    speedup_to: float | None = None
    efficiency: float | None = None
    communication_seconds: float | None = None  # a step, mean over ranks
    exposed_seconds: float | None = None
    exposed_share: float | None = None
    sent_bytes: float | None = None  # per step, by the rank that sends most
    data_wait_share: float | None = None
    idle_shares: list[float] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)  # seconds of a step, by what they went to
    memory_bytes: list[float] = field(default_factory=list)
    memory_imbalance: float | None = None
    state_bytes: list[float] = field(default_factory=list)
    cores_busy: float | None = None  # over all ranks
    main_threads_busy: float | None = None
    threads_busy: float | None = None
    unit: str = "images"  # what a sample is called, in the plural
    metric: str = "accuracy"  # what `reached` is
    reached: float | None = None  # on the evaluation set, at the end
    start_seconds: float | None = None
    cores_of_others: float | None = None  # of this machine's, that other work had meanwhile
    folders: list[str] = field(default_factory=list)
    planned: RunPlan | None = None

    @property
    def planned_ratios(self) -> dict[str, float]:
        """What is planned over what was measured: seconds of a step, bytes sent, state, peak. A peak was measured of
        torch's tensors on GPUs alone: on a CPU it is the process's, with interpreter and libraries."""
        if not self.planned:
            return {}
        state, peak = (max(sizes, default=0.0) for sizes in (self.state_bytes, self.memory_bytes))
        pairs = {
            "seconds": (self.planned.seconds, self.step_seconds),
            "sent": (self.planned.sent, self.sent_bytes),
            "state": (self.planned.state, state),
            "peak": (self.planned.peak if self.planned.device == "cuda" else 0, peak),
        }
        return {name: plan / measured for name, (plan, measured) in pairs.items() if plan and measured}


def comparison_rows(
    found: dict[Case, list[Result]], metric: str = "eval_accuracy", unit: str = "images"
) -> list[ComparisonRow]:
    """A row for each case that has a run.

    Args:
        found: the results by round.
        metric: what is best for the task; where that is its loss, and it has a metric, the first of these is shown.
        unit: what a sample is called, in the plural.
    """
    return [comparison_row(case, found, metric, unit) for case, results in found.items() if results]


def comparison_row(case: Case, found: dict[Case, list[Result]], metric: str, unit: str) -> ComparisonRow:
    """One case's figures, and what they are against its baseline's."""
    if metric == "eval_loss":
        metric = next((name for name in found[case][0] if name.startswith("eval_") and name != metric), metric)
    results = found[case]
    speeds = [result["samples_per_second"] for result in results]
    step = statistics.median(result["step_seconds_p50"] for result in results)
    plain = [result for result in results if not result.get("profiled_steps")] or results
    memory = across(plain, "peak_by_device") or across(plain, "peak_memory_bytes_by_rank")
    idle = across(results, "idle_shares")
    waits = mean(across(results, "data_wait_share_by_rank"))
    exposed = mean(across(results, "exposed_communication_seconds_by_rank"))
    busy = across(results, "cores_busy_by_rank")
    threads = [result["thread_seconds"] / result["forward_seconds"] for result in results if "thread_seconds" in result]
    made = ComparisonRow(
        recipe=case.recipe,
        label=case.label,
        ranks=case.number,
        devices=case.devices,
        rounds=len(results),
        samples_per_second=statistics.median(speeds),
        slowest=min(speeds),
        fastest=max(speeds),
        step_seconds=step,
        step_seconds_p95=statistics.median(result["step_seconds_p95"] for result in results),
        tokens_per_second=median([result.get("tokens_per_second") for result in results]),
        model_flops_per_second=median([result.get("model_flops_per_second") for result in results]),
        mfu=median([result.get("mfu") for result in results]),
        communication_seconds=mean(across(results, "communication_seconds_by_rank")),
        exposed_seconds=exposed,
        sent_bytes=max(across(results, "sent_bytes_by_rank"), default=None),
        exposed_share=None if exposed is None else exposed / step,
        data_wait_share=waits,
        idle_shares=idle,
        parts=taken_apart(step, waits, mean(idle), exposed),
        memory_bytes=memory,
        memory_imbalance=max(memory) / statistics.mean(memory) if memory else None,
        state_bytes=across(results, "state_bytes_by_rank"),
        cores_busy=sum(busy) if busy else None,
        main_threads_busy=mean(across(results, "main_thread_busy_by_rank")),
        threads_busy=median(threads),
        unit=unit,
        metric=metric.removeprefix("eval_"),
        reached=median([result.get(metric) for result in results]),
        start_seconds=median([result.get("start_seconds") for result in results]),
        cores_of_others=median([result.get("cores_of_others") for result in results]),
        folders=[result["folder"] for result in results if "folder" in result],
    )
    base = baseline(case, found)
    if base is not None:
        # Round by round: both may have been slow in one of them.
        theirs = [result["samples_per_second"] for result in found[base]]
        ratios = [mine / other for mine, other in zip(speeds, theirs, strict=False)]
        made.against = base.label
        made.speedup, made.speedup_from, made.speedup_to = statistics.median(ratios), min(ratios), max(ratios)
        made.efficiency = made.speedup / (case.devices / base.devices)
    return made


def baseline(case: Case, found: dict[Case, list[Result]]) -> Case | None:
    """What a case is set against: `single`, else the same recipe on its fewest ranks; None where that is itself."""
    ended = [each for each, results in found.items() if results]
    for some in (
        [each for each in ended if each.recipe == "single"],
        [each for each in ended if each.recipe == case.recipe],
    ):
        if some:
            least = min(some, key=lambda each: each.number)
            return least if least != case else None
    return None


def across(results: list[Result], name: str) -> list[float]:
    """A list by rank that some results have: element by element the median of the rounds."""
    lists = [result[name] for result in results if result.get(name)]
    return [statistics.median(each) for each in zip(*lists, strict=False)]


def mean(values: list[float]) -> float | None:
    return statistics.mean(values) if values else None


def median(values: Sequence[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def taken_apart(step: float, waits: float | None, idle: float | None, exposed: float | None) -> dict[str, float]:
    """A step's seconds by what they went to; nothing where nothing but its length is known."""
    if waits is None and idle is None and exposed is None:
        return {}
    parts = {"waiting for data": (waits or 0) * step, "idle": (idle or 0) * step}
    parts["exposed communication"] = 0.0 if idle is not None else exposed or 0.0
    rest = max(0.0, step - sum(parts.values()))
    return {"compute": rest} | {name: seconds for name, seconds in parts.items() if seconds}
