"""`profile=N`: N steps recorded by torch.profiler on every rank, and what they were spent on.

Imported only where it is asked for. A run without it is not hooked in any way.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from lockstep.callbacks.base import Callback, CallbackContext
from lockstep.callbacks.communication import HOSTS, Event, Node, exposed, forest, is_work, length, union
from lockstep.callbacks.step_time import StepTimeMonitor
from lockstep.distributed.collectives import gather_objects
from lockstep.training.timing import warm_up
from lockstep.utils.files import write_json
from lockstep.utils.text import count

DATA = "lockstep: waiting for data"
STEP = "ProfilerStep#"  # by which other tools know a step
ROWS = 40  # operations in profile.json
# What an operation or a kernel is for, by its name, or by the name of what it runs within. The first that fits decides.
CLASSES = {
    "data": re.compile(re.escape(DATA)),
    "optimizer": re.compile(r"^Optimizer\.|_fused_(sgd|adam)|multi_tensor_apply"),
    "communication": re.compile(r"^(gloo|nccl|mpi|ucc|c10d|_c10d_functional):|^nccl"),
    "normalisation": re.compile(r"(batch|group|layer|instance)_?norm|NormBackward|bn_(fw|bw)", re.I),
    "activation": re.compile(r"relu|threshold|clamp_min|gelu|silu|sigmoid|hardtanh", re.I),
    "convolution": re.compile(r"conv|fprop|dgrad|wgrad|implicit_gemm", re.I),
    "copies": re.compile(
        r"copy|contiguous|::clone|::to$|::cat$|reorder|memcpy|memset|transpose|nchwToNhwc|nhwcToNchw", re.I
    ),
    "compiled": re.compile(r"CompiledF|^triton_|^cpp_fused"),  # of torch.compile, where its name tells no more
}
OUTER = ("data", "optimizer")  # all that runs within belongs to it


class Profiler:
    """Records the steps from `first` on, `steps` of them.

    Args:
        first: number of the first, from 1 up.
        path: of the trace that is written then, for chrome://tracing or https://ui.perfetto.dev.
    """

    def __init__(self, device: torch.device, first: int, steps: int, path: Path) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or each rank says when it begins, and that it has no GPU
        self.first, self.steps, self.path, self._device = first, steps, path, device
        self.active = False
        cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
        self._profile = profile(activities=[ProfilerActivity.CPU, *cuda])

    def before_step(self, step: int) -> None:
        """Begin to record where it is time."""
        if step == max(1, self.first - 1):
            self._profile.prepare_trace()
        if step == self.first:
            self._profile.start_trace()
            self.active = True
        if self.active:
            self._range = record_function(f"{STEP}{step}")
            self._range.__enter__()

    def after_step(self, step: int) -> bool:
        """End a step; whether it was the last one to record. On a GPU, its kernels have ended too."""
        if not self.active:
            return False
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._range.__exit__(None, None, None)
        if step < self.first + self.steps - 1:
            return False
        self._profile.stop_trace()
        self.active = False
        return True

    def waiting(self) -> AbstractContextManager[Any]:
        """The range within which a rank waits for its next batch."""
        return record_function(DATA)

    def report(self) -> dict[str, Any]:
        """Write the trace, and say what this rank's steps were spent on, in seconds per step."""
        self._profile.export_chrome_trace(str(self.path))
        del self._profile
        return step_costs(read_trace(self.path))


class ProfileSteps(Callback):
    """Records `profile=N` steps after the warm-up; they do not count as steps of the run's speed.

    Args:
        step_time: what is not to count them either.
    """

    def __init__(self, steps: int, step_time: StepTimeMonitor) -> None:
        self._steps, self._step_time = steps, step_time
        self._profiler: Profiler | None = None

    @property
    def distorts_time(self) -> bool:  # type: ignore[override]
        return self._profiler is not None and self._profiler.active

    def on_train_begin(self, context: CallbackContext) -> None:
        left = context.total_steps - context.step
        if warm_up(left) + self._steps > left:
            context.say(f"profile={self._steps}: left out, for only {count(left, 'step')} are left to take")
            return
        path = context.out / "ranks" / f"{context.rank}.trace.json"
        self._profiler = Profiler(context.device, context.step + warm_up(left) + 1, self._steps, path)

    def on_step_begin(self, context: CallbackContext) -> None:
        if self._profiler:
            if context.step + 1 == self._profiler.first:
                self._since = self._step_time.now()
            self._profiler.before_step(context.step + 1)

    def on_fetch_begin(self, context: CallbackContext) -> None:
        self._waiting = self._profiler.waiting() if self._profiler and self._profiler.active else nullcontext()
        self._waiting.__enter__()

    def on_fetch_end(self, context: CallbackContext) -> None:
        self._waiting.__exit__(None, None, None)

    def on_step_end(self, context: CallbackContext) -> None:
        if self._profiler and self._profiler.after_step(context.step):
            self._report(context, self._profiler)
            self._profiler = None

    def _report(self, context: CallbackContext, profiler: Profiler) -> None:
        """Write down what the recorded steps were spent on, by rank."""
        began = time.perf_counter()
        ranks = gather_objects(profiler.report(), context.world.control)
        context.note(
            f"profile: {profile_summary(ranks)}",
            profiled_steps=profiler.steps,
            communication_seconds_by_rank=[each["communication"] for each in ranks],
            exposed_communication_seconds_by_rank=[each["exposed"] for each in ranks],
        )
        if context.rank == 0:
            operations = most_expensive(ranks)
            shown = [{name: value for name, value in each.items() if name != "operations"} for each in ranks]
            facts = {"steps": profiler.steps, "ranks": shown, "operations": operations}
            write_json(context.out / "profile.json", facts)
        self._step_time.leave_out(profiler.steps, self._since)
        context.pause(time.perf_counter() - began)


def read_trace(path: Path) -> list[Event]:
    """The events of a trace."""
    found = []
    for each in json.loads(path.read_text(encoding="utf-8"))["traceEvents"]:
        if each.get("ph") == "X" and each.get("cat") not in ("Trace", "gpu_user_annotation"):
            start, arguments = each["ts"] / 1e6, each.get("args", {})
            thread = f"{each['pid']}/{each['tid']}"
            end, link = start + each["dur"] / 1e6, arguments.get("External id")
            found.append(Event(each["name"], each.get("cat", ""), start, end, thread, link))
    return found


def step_costs(events: list[Event]) -> dict[str, Any]:
    """What the recorded steps were spent on, in seconds per step.

    Returns:
        seconds; communication, and the part of it that is exposed; `shares` of the step by class, among them `outside`,
        the time outside of any operation; `operations`: name → [seconds without those inside it, calls].
        Shares are of the host's time, or of a GPU's where there is one.
    """
    spans = union((event.start, event.end) for event in events if event.name.startswith(STEP))
    steps = sum(event.name.startswith(STEP) for event in events)
    inside = [event for event in events if any(start <= event.start < end for start, end in spans)]
    roots = forest(inside)
    whole = length(spans)
    talk, alone = exposed(inside, roots, spans)
    costs = list(of_device(inside, roots) if any(event.on_device for event in inside) else of_host(inside, roots))
    operations: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    shares = dict.fromkeys([*CLASSES, "other"], 0.0)
    for name, kind, seconds in costs:
        operations[name][0] += seconds
        operations[name][1] += 1
        shares[kind] += seconds
    shares["communication"] = alone  # what goes on beside the computation takes no time of its own
    unit = max(whole, sum(shares.values()))  # of several threads or streams, all of their time
    shares = {kind: seconds / unit for kind, seconds in shares.items()}
    return {
        "seconds": whole / steps,
        "communication": talk / steps,
        "exposed": alone / steps,
        "shares": shares | {"outside": 1 - sum(shares.values())},
        "operations": {name: [cost / steps for cost in costs] for name, costs in operations.items()},
    }


def of_host(events: list[Event], roots: list[Node]) -> Iterator[tuple[str, str, float]]:
    """(name, class, seconds) of all that a CPU did: operations without those inside them."""
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        kind = class_of(node.event.name)
        if kind in OUTER:
            begins = own_from(node, events)
            late = [each for each in node.inside if each.event.start >= begins]
            seconds = sum(each.event.seconds for each in late) if begins > node.event.start else node.event.seconds
            yield node.event.name, kind, seconds
            waiting += [each for each in node.inside if each.event.start < begins]
            continue
        waiting += node.inside
        if is_work(node):
            yield node.event.name, kind, node.own_seconds
    for event in events:
        if event.communicates:
            yield event.name, "communication", event.seconds


def of_device(events: list[Event], roots: list[Node]) -> Iterator[tuple[str, str, float]]:
    """(name, class, seconds) of a GPU's kernels and copies; what one is for, its launching operation may tell."""
    nodes = [node for root in roots for node in root]
    launched = {node.event.link: node for node in nodes if node.event.link is not None}
    starts = {id(node): own_from(node, events) for node in nodes if class_of(node.event.name) in OUTER}
    for event in events:
        if event.on_device:
            yield event.name, kernel_class(event, launched.get(event.link or -1), starts), event.seconds


def kernel_class(event: Event, node: Node | None, begins: Mapping[int, float]) -> str:
    """What a kernel is for: what all is that runs within an optimizer; else by its name, or by its operation's.

    Args:
        node: the operation that launched it.
        begins: from when on what runs within a node belongs to it, by the node's id; for those of a class in OUTER.
    """
    kinds, launched = [class_of(event.name)], node.event.start if node else 0.0
    while node is not None:
        kind = class_of(node.event.name)
        if kind not in OUTER:
            kinds.append(kind)
        elif launched >= begins[id(node)]:
            return kind
        node = node.within
    return next((kind for kind in kinds if kind != "other"), "other")


def own_from(node: Node, events: list[Event]) -> float:
    """From when on what runs within an optimizer's step belongs to it: it may be handed forward and backward to run."""
    start, end = node.event.start, node.event.end
    backward = [each.end for each in events if start < each.start < end and each.name.startswith(HOSTS)]
    return max(backward, default=start)


def class_of(name: str) -> str:
    return next((kind for kind, pattern in CLASSES.items() if pattern.search(name)), "other")


def most_expensive(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The most expensive operations over all ranks: of each its cost on the rank where it costs most."""
    found: dict[str, dict[str, Any]] = {}
    for rank, each in enumerate(ranks):
        for name, (seconds, calls) in each["operations"].items():
            if name not in found or seconds > found[name]["seconds"]:
                share = seconds / each["seconds"]
                found[name] = {
                    "name": name,
                    "class": class_of(name),
                    "seconds": seconds,
                    "share": share,
                    "calls": calls,
                    "rank": rank,
                }
    return sorted(found.values(), key=lambda row: -float(row["seconds"]))[:ROWS]


def profile_summary(ranks: list[dict[str, Any]]) -> str:
    """What the profile says, for the summary."""
    most = max(ranks, key=lambda each: float(each["exposed"]))
    shares = {kind: sum(each["shares"][kind] for each in ranks) / len(ranks) for kind in ranks[0]["shares"]}
    largest = sorted(shares, key=lambda kind: -shares[kind])[:5]
    named = ", ".join(f"{kind} {shares[kind]:.0%}" for kind in largest)
    where = f"{named}; profile.json, ranks/*.trace.json"
    if not most["communication"]:
        return where
    talk = f"{1000 * most['communication']:.3g} ms of communication a step on rank {ranks.index(most)}, of which "
    return f"{talk}{1000 * most['exposed']:.3g} exposed; {where}"
