"""Predictions for this machine against real steps on it: memory of torch's tensors, bytes, time, a row for each strategy."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from bisect import bisect
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table
from torch._C._profiler import _EventType as EventType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from lockstep.callbacks.base import Callback, CallbackContext
from lockstep.config.copies import with_values
from lockstep.distributed.collectives import gather_numbers, gather_objects
from lockstep.distributed.traffic import COLLECTIVES, SEND_NOTHING, takes_dtensors
from lockstep.plan.clock import StepTimes
from lockstep.plan.config import PlanConfig
from lockstep.plan.dry_run import STEPS
from lockstep.plan.hardware import PROFILE, Hardware
from lockstep.plan.here import MachineProbes
from lockstep.plan.pipeline import dry_training
from lockstep.plan.report import gigabytes, millisecond_cell
from lockstep.plan.rows import PlanRow, plan_rows, why_not
from lockstep.plan.watch import StepWatch
from lockstep.recipe import Recipe
from lockstep.registry import get_recipe
from lockstep.run import Run
from lockstep.utils.tables import terminal_tables

SETTLES = 1e-3  # seconds after which gloo's thread has let go of what was sent
AMONG_STEPS, MEASURED_EVERY = 3, 8  # rounds in which the machine is measured, and steps before each
TIMED = (AMONG_STEPS + 1) * MEASURED_EVERY - 1  # steps, after as many as a plan takes
MARK = "second step"
ALL_TO_ALL = "all-to-all"
QUIET_LOAD = 0.5  # processes that run or wait, on average over the last minute
QUIET: dict[str, Any] = {"eval_every": 0, "log_every": 1000, "epochs": 1000, "checkpoint.minutes": 0}


@dataclass(frozen=True)
class CheckRow:
    """A strategy on the ranks that are there: what was predicted, and what was measured.

    Attributes:
        bytes_predicted, bytes_measured: {kind: bytes per step} on the rank that sends most.
        peak_predicted, peak_measured: bytes of torch's tensors at the peak of the second and third step, on the rank
            that holds most. Where tokens travel to experts, it is the mean over the ranks, and so are the bytes of the
            all-to-all: how many tokens a rank's experts get is known on average alone.
        seconds_predicted, seconds_measured: of a step; the median, on the slowest rank.
        work_predicted, work_measured: of them, seconds in which a rank's CPU is at work; what other programs keep it from
            is not in it. 0: not known, as on a GPU.
    """

    label: str
    ranks: int
    bytes_predicted: dict[str, int]
    bytes_measured: dict[str, int]
    peak_predicted: int
    peak_measured: int
    seconds_predicted: float
    seconds_measured: float
    work_predicted: float = 0.0
    work_measured: float = 0.0

    @property
    def same_bytes(self) -> bool:
        return self.bytes_predicted == self.bytes_measured

    @property
    def memory_error(self) -> float:
        return self.peak_predicted / self.peak_measured - 1

    @property
    def time_error(self) -> float:
        return self.seconds_predicted / self.seconds_measured - 1

    @property
    def work_error(self) -> float | None:
        return self.work_predicted / self.work_measured - 1 if self.work_measured and self.work_predicted else None

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        errors = {"memory_error": self.memory_error, "time_error": self.time_error, "work_error": self.work_error}
        return asdict(self) | errors


class RealWatch(StepWatch):
    """Counts the collectives of real steps, and changes nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if takes_dtensors(types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        if func.namespace in COLLECTIVES and func._opname not in SEND_NOTHING:
            tensors = torch.utils._pytree.tree_leaves((args, result))
            given = [each for each in tensors if isinstance(each, torch.Tensor)]
            made = [each for each in torch.utils._pytree.tree_leaves(result) if isinstance(each, torch.Tensor)]
            self._collective(func, args, given, made)
        return result


class SettledCollectives(TorchDispatchMode):
    """Within it a rank goes on a moment after a collective has ended: gloo's thread has let go of its tensors by then.

    Else that thread may be the last to hold one, and torch's profiler, which looks at this thread, misses that it is freed.
    """

    def __enter__(self) -> SettledCollectives:
        self._wait = wait = dist.Work.wait

        def settled(work: dist.Work, *timeout: Any) -> bool:
            done = wait(work, *timeout)
            time.sleep(SETTLES)
            return done

        dist.Work.wait = settled  # type: ignore[method-assign,assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        dist.Work.wait = self._wait  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if takes_dtensors(types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        if func._opname == "wait_tensor":
            time.sleep(SETTLES)
        return result


class StepProbe(Callback):
    """Counts the third step's collectives, and tells the profiler when the second one begins and the third ends."""

    def __init__(self, hardware: Hardware, profiler: Any) -> None:
        self._watch, self._profiler, self.traffic = RealWatch(hardware), profiler, {}  # type: ignore[var-annotated]

    def on_step_begin(self, context: CallbackContext) -> None:
        if context.step == 1:
            with record_function(MARK):
                pass
        if context.step == STEPS - 1:
            self._watch.begin()
            self._watch.__enter__()

    def on_step_end(self, context: CallbackContext) -> None:
        if context.step == STEPS:
            self._watch.__exit__(None, None, None)
            self._watch.end()
            self.traffic = by_kind(self._watch.steps[0].traffic())
            self._profiler.stop()


class StepClock(Callback):
    """Times each step, by the clock and by the processor, and measures the machine every few steps.

    A step after that is not timed: the probes have had the caches.
    """

    def __init__(self, probes: MachineProbes) -> None:
        self.seconds: list[float] = []
        self.work: list[float] = []
        self._probes = probes

    def on_step_begin(self, context: CallbackContext) -> None:
        self._began, self._worked = time.perf_counter(), time.process_time()

    def on_step_end(self, context: CallbackContext) -> None:
        if context.device.type == "cuda":
            torch.cuda.synchronize(context.device)
        number = context.step - STEPS
        if number < 1:
            return
        if number % MEASURED_EVERY != 1:
            self.seconds.append(time.perf_counter() - self._began)
            self.work.append(time.process_time() - self._worked if context.device.type == "cpu" else 0.0)
        if number % MEASURED_EVERY == 0:
            self._probes.take_rounds(1)


def by_kind(traffic: dict[tuple[str, str], int]) -> dict[str, int]:
    """{kind: bytes}, over whichever links."""
    found: dict[str, int] = {}
    for (kind, _), size in traffic.items():
        found[kind] = found.get(kind, 0) + size
    return found


@dataclass(frozen=True)
class RealSteps:
    """What was measured.

    Attributes:
        traffic: bytes by kind of collective.
        peak: bytes of torch's tensors.
        seconds, work: of a step, by the clock and by the processor.
    """

    traffic: dict[str, int]
    peak: int
    seconds: float
    work: float


def measure_row(run: Run[Any], row: PlanRow, hardware: Hardware, probes: MachineProbes) -> tuple[RealSteps, Hardware]:
    """Take real steps, and measure the machine among and after them; all ranks call it together.

    Args:
        hardware: any profile of this machine, by which collectives are counted.

    Returns:
        what was measured, and the machine as it was before, among and after these steps.
    """
    out = run.out / row.label.replace(" ", "-").replace("=", "-")
    config = with_values(row.config, QUIET | {"max_steps": STEPS})
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it says when it begins, and that there is no GPU
    gc.collect()  # what another training has left would be freed among this one's steps
    with_memory = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    probe = StepProbe(hardware, with_memory)
    with SettledCollectives():
        train_quietly(run, row.recipe, config, out / "memory", [probe], with_memory.start)
    clock = StepClock(probes)
    train_quietly(run, row.recipe, with_values(config, {"max_steps": STEPS + TIMED}), out / "time", [clock])
    probes.take_rounds(1)
    seconds, work = (max(gather_numbers(median(each), run.device)) for each in (clock.seconds, clock.work))
    everyone = gather_objects((probe.traffic, peak_of(with_memory)), run.world.control)
    sent, peaks = most_sent([sent for sent, _ in everyone]), [peak for _, peak in everyone]
    peak = sum(peaks) // len(peaks) if ALL_TO_ALL in sent else max(peaks)
    return RealSteps(sent, peak, seconds, work), probes.hardware(last=1 + AMONG_STEPS + 1)


def most_sent(by_rank: list[dict[str, int]]) -> dict[str, int]:
    """The bytes of the rank that sends most, but of an all-to-all the mean over the ranks."""
    found = max(by_rank, key=lambda sent: sum(size for kind, size in sent.items() if kind != ALL_TO_ALL))
    if ALL_TO_ALL in found:
        found |= {ALL_TO_ALL: sum(each.get(ALL_TO_ALL, 0) for each in by_rank) // len(by_rank)}
    return found


def train_quietly(
    run: Run[Any], recipe: Recipe, config: Any, out: Path, callbacks: list[Callback], before: Any = lambda: None
) -> None:
    """Take a recipe's steps on the ranks that are there."""
    if run.world.rank == 0:
        (out / "ranks").mkdir(parents=True, exist_ok=True)
    dist.barrier(run.world.control)
    inner: Run[Any] = Run(
        recipe.name, config, run.world, out, shards=recipe.ranks, quiet=True, listener=run.listener, callbacks=callbacks
    )
    inner.data.limit_evaluation()
    before()
    recipe(inner)
    dist.barrier(run.world.control)


def peak_of(profiler: Any) -> int:
    """Bytes that torch's allocator had given out at most since the mark, of those since the profiler's start.

    What gloo's threads free is not recorded. It is seen to be free when its address is given out again.
    """
    events = list(all_events(profiler.profiler.kineto_results.experimental_event_tree()))
    mark = next(each.start_time_ns for each in events if each.name == MARK)
    starts: list[int] = []  # addresses of what is held, in order
    sizes: dict[int, int] = {}
    held = most = 0
    allocations = [each for each in events if each.tag == EventType.Allocation]
    for each in sorted(allocations, key=lambda each: int(each.start_time_ns)):
        begin, size = each.extra_fields.ptr, each.extra_fields.alloc_size
        place = bisect(starts, begin)
        if place and starts[place - 1] + sizes[starts[place - 1]] > begin:
            place -= 1
        while place < len(starts) and starts[place] < begin + abs(size):
            held -= sizes.pop(starts.pop(place))
        if size > 0:
            starts.insert(place, begin)
            sizes[begin] = size
            held += size
        if each.start_time_ns >= mark:
            most = max(most, held)
    return most


def all_events(events: list[Any]) -> Iterator[Any]:
    """The events of a profiler's tree."""
    waiting = list(events)
    while waiting:
        yield (each := waiting.pop())
        waiting += each.children


Prediction = tuple[dict[str, int], int, StepTimes]  # bytes by kind, peak, times


def predict_rows(words: list[str], ranks: int, machines: list[Hardware]) -> list[tuple[str, Prediction | str]]:
    """(label, what is predicted, or why nothing is) of each row; in a process that is no rank, for a rank has a process group.

    Args:
        machines: this one as it was found at each row.
    """
    from lockstep.config.compose import compose_another

    tool = get_recipe("plan")
    config = compose_another(tool, words)
    assert isinstance(config, PlanConfig)
    found: list[tuple[str, Prediction | str]] = []
    for row, hardware in zip(checked_rows(config, ranks, machines[0])[0], machines, strict=True):
        try:
            made = dry_training(row.recipe, row.config, row.ranks, hardware)
            prediction: Prediction | str = (by_kind(made.step.traffic()), made.peak_bytes, made.step.times)
        except Exception as error:  # what others have been measured for is not lost
            prediction = why_not(error)
        found.append((row.label, prediction))
    return found


def checked_rows(config: PlanConfig, ranks: int, hardware: Hardware) -> tuple[list[PlanRow], list[str]]:
    """The rows that run on exactly so many ranks."""
    from lockstep.plan.rows import USUAL

    names = config.recipes or list(USUAL)
    config = replace(config, precision="fp32") if config.precision == "auto" else config
    rows, left_out = plan_rows(config, get_recipe("plan"), [get_recipe(name) for name in names], ranks, hardware)
    taken = [row for row in rows if row.ranks == ranks and row.config.steps_between_exchanges == 1]
    left_out += [
        f"{row.label}: its ranks meet in one step of many" for row in rows if row not in taken and row.ranks == ranks
    ]
    return taken, left_out


def check_plan(run: Run[PlanConfig], words: list[str]) -> list[CheckRow]:
    """Measure and predict each strategy; all ranks call it together, rank 0 has the rows.

    The machine is measured before, among and after the steps of each strategy, and they are planned for what it was then: a
    processor that others use too is faster now and slower then.
    """
    ranks, file, probes = run.world.world_size, run.out / PROFILE, MachineProbes(run.world)
    probes.take_rounds(1)
    hardware = probes.hardware()
    rows, left_out = checked_rows(run.asked, ranks, hardware)
    measured, machines = [], []
    for number, row in enumerate(rows, start=1):
        real, machine = measure_row(run, row, hardware, probes)
        measured.append(real)
        machines.append(machine)
        run.report.line(f"{number} of {len(rows)}: {row.label}, {1e3 * real.seconds:,.1f} ms per step")
    found: list[CheckRow] = []
    hardware = probes.hardware()
    run.report.line(f"planning {len(rows)} rows")
    if run.world.rank == 0:
        file.write_text(hardware.as_yaml(), encoding="utf-8")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # no rank: that has a group already
            predicted = pool.submit(predict_rows, words, ranks, machines).result()
        for (label, plan), real in zip(predicted, measured, strict=True):
            if isinstance(plan, str):
                left_out.append(f"{label}: {plan}")
                continue
            sent, peak, times = plan
            held = (sent, real.traffic, peak, real.peak, times.step, real.seconds, times.work, real.work)
            found.append(CheckRow(label, ranks, *held))
        for each in left_out:
            run.report.line(f"left out: {each}")
    dist.barrier(run.world.control)
    return found


def unrest(load: float) -> str:
    """A warning where the machine had other work when the check began, by its load average; else nothing."""
    if load < QUIET_LOAD:
        return ""
    return f"not a quiet machine: a load of {load:.1f} when this began, so steps take longer than planned; CPU ms tell more"


def check_table(rows: list[CheckRow]) -> list[Table]:
    """What was predicted, what was measured, and by how much they differ."""
    columns = {
        "strategy": [row.label.replace(" ", "\n  ") for row in rows],
        "bytes": ["equal" if row.same_bytes else "differ" for row in rows],
        "peak": [gigabytes(row.peak_measured) for row in rows],
        "plan": [f"{row.memory_error:+.1%}" for row in rows],
        "step ms": [millisecond_cell(row.seconds_measured) for row in rows],
        "plan ": [f"{row.time_error:+.0%}" for row in rows],
        "CPU ms": [millisecond_cell(row.work_measured) if row.work_error is not None else "" for row in rows],
        "plan  ": [f"{row.work_error:+.0%}" if row.work_error is not None else "" for row in rows],
    }
    return terminal_tables("measured here, and by how much the plan is off", columns, ("strategy",))
