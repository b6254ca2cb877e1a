"""What of a step's communication is exposed: under way while nothing else of the rank computes.

Worked out from the events of a trace, as torch.profiler records them. Communication is what gloo does from the moment
an operation is handed over until it is complete, and the kernels of NCCL. It includes the wait for ranks that come
later, as those of a pipeline do. Computation is, on GPUs, every other kernel and copy on any stream; on the CPU, the
operations on any thread. A thread that waits for a collective computes nothing, so an operation that itself talks to
others, or that runs whatever hooks it is given, counts only by the operations inside it. Python between two operations
is no computation either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

Interval = tuple[float, float]
BRIDGE = 20e-6  # seconds between two operations that are bookkeeping, not waiting
COMMUNICATES = ("gloo:", "mpi:", "ucc:")  # what begins when an operation is handed over, and ends when it is complete
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")  # the kinds of event that a GPU's streams have
TALKS = ("c10d::", "_c10d_functional::", "c10d_functional::")  # hand operations over, or wait for them
HOSTS = ("autograd::engine::",)  # run hooks, such as those that FSDP waits in
COMPILED = ("## Call CompiledFxGraph", "CompiledFunction", "triton_", "cpp_fused")  # operations of torch.compile


@dataclass(frozen=True)
class Event:
    """Something of a trace that took time.

    Attributes:
        name: such as aten::add, gloo:all_reduce, or a kernel's.
        kind: the trace's category: cpu_op, user_annotation, kernel, gpu_memcpy, …
        start, end: in seconds.
        thread: on which it ran, or whose stream.
        link: the number that a kernel and the operation that launched it share.
    """

    name: str
    kind: str
    start: float
    end: float
    thread: str = ""
    link: int | None = None

    @property
    def seconds(self) -> float:
        return self.end - self.start

    @property
    def on_device(self) -> bool:
        return self.kind in KERNELS

    @property
    def communicates(self) -> bool:
        """Whether it is communication, and not only the call for it."""
        return self.name.startswith("nccl") if self.on_device else self.name.startswith(COMMUNICATES)


@dataclass
class Node:
    """An event with those that ran inside it, on the same thread."""

    event: Event
    inside: list[Node] = field(default_factory=list)
    within: Node | None = None
    talks: bool = False  # it, or what is inside it, calls for communication

    def __iter__(self) -> Iterator[Node]:
        yield self
        for each in self.inside:
            yield from each

    @property
    def own_seconds(self) -> float:
        """Without what is inside it."""
        return self.event.seconds - sum(each.event.seconds for each in self.inside)


# Intervals, sorted and apart ---------------------------------------------------------------------------------------


def union(intervals: Iterable[Interval], bridge: float = 0.0) -> list[Interval]:
    """The same time covered by as few intervals as can be; gaps no longer than `bridge` are covered too."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1] + bridge:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def minus(some: list[Interval], others: list[Interval]) -> list[Interval]:
    """What of a union another one does not cover."""
    found, at = [], 0
    for start, end in some:
        while at < len(others) and others[at][1] <= start:
            at += 1
        for from_, to in others[at:]:
            if from_ >= end:
                break
            if from_ > start:
                found.append((start, from_))
            start = max(start, to)
        if start < end:
            found.append((start, end))
    return found


def common(some: list[Interval], others: list[Interval]) -> list[Interval]:
    """What two unions both cover."""
    return minus(some, minus(some, others))


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


# Events ------------------------------------------------------------------------------------------------------------


def forest(events: Iterable[Event]) -> list[Node]:
    """The host's events that nothing encloses, of all threads, each with what ran inside it.

    Left out is what ends on another thread than it began on, and so lies inside nothing.
    """
    roots: list[Node] = []
    open_: dict[str, list[Node]] = {}
    mine = [event for event in events if not event.on_device and not event.communicates]
    for event in sorted(mine, key=lambda event: (event.start, -event.end)):
        stack = open_.setdefault(event.thread, [])
        while stack and stack[-1].event.end <= event.start:
            stack.pop()
        node = Node(event, within=stack[-1] if stack else None)
        (stack[-1].inside if stack else roots).append(node)
        stack.append(node)
        if event.name.startswith(TALKS):
            for each in stack:
                each.talks = True
    return roots


def is_work(node: Node) -> bool:
    """Whether an event of the host is an operation that computes from its beginning to its end."""
    name = node.event.name
    if node.talks or name.startswith(HOSTS):
        return False
    return name.startswith(COMPILED) or (node.event.kind == "cpu_op" and "::" in name)


def communication(events: Iterable[Event]) -> list[Interval]:
    """When this rank's communication was under way."""
    return union((event.start, event.end) for event in events if event.communicates)


def computation(events: list[Event], roots: list[Node]) -> list[Interval]:
    """When anything of this rank computed: its GPU, where it has used one, else its threads."""
    kernels = [event for event in events if event.on_device]
    if kernels:
        return union((event.start, event.end) for event in kernels if not event.communicates)
    found: list[Interval] = []
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        if is_work(node):
            found.append((node.event.start, node.event.end))
        else:
            waiting += node.inside
    return union(found, BRIDGE)


def exposed(events: list[Event], roots: list[Node], spans: list[Interval]) -> tuple[float, float]:
    """(seconds of communication, seconds of it that are exposed) within some spans of time.

    Args:
        roots: `forest(events)`.
    """
    talk = common(communication(events), spans)
    return length(talk), length(minus(talk, computation(events, roots)))
