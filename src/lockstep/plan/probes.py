"""What is timed to know a machine: classes of operations and kinds of collectives by size, and what the host takes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce, wait_tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lockstep.distributed.dtensor import full_tensor
from lockstep.distributed.process_group import World
from lockstep.distributed.traffic import takes_dtensors
from lockstep.models.gpt import GPT, GPTConfig
from lockstep.parallel.tensor import layer_styles, share_layers
from lockstep.parallel.tensor_plan import tensor_parallel_plan
from lockstep.plan.hardware import MEASURED_KINDS
from lockstep.plan.measured_seconds import HEAD_DIMS
from lockstep.tasks.language import Language

RESULT_NUMBERS = (16, 2**14, 2**17, 2**19, 2**21, 2**23)  # float32 numbers of an operation's result
MATRIX_SIDES = (4, 32, 64, 128, 256, 512)  # widths of linear layers
TOKENS_PER_WIDTH = 8  # rows of what these layers are given, for each column
IN_TURN, MOST_IN_TURN = 2**25, 63  # bytes of the tensors that an operation takes in turn, and at most so many more
UPDATED_IN_TURN = 2**27  # of those that are updated in place: an optimizer's state was last touched a step before
BETWEEN_MESSAGES = 256  # side of the matrices that are multiplied between two collectives: about a layer's work
MESSAGES = (2**10, 2**14, 2**17, 2**20, 2**23)  # bytes of a collective
GPU_MESSAGES = (*MESSAGES, 2**26, 2**28)


@dataclass(frozen=True)
class Probe:
    """Something that is timed.

    Attributes:
        name: a class of operations, or a kind of collectives.
        work: floating-point operations or bytes.
        before: what a rank does before each call, and is not timed: collectives come between operations.
        counted: operations that a call issues, by way.
    """

    name: str
    work: float
    run: Callable[[], Any]
    before: Callable[[], Any] | None = None
    counted: dict[str, int] = field(default_factory=dict)


class ProbeResults:
    """Results that are kept for a while, all probes' together, so that what is written lies in no cache before."""

    def __init__(self) -> None:
        self._held: deque[tuple[int, Any]] = deque()
        self._size = 0

    def keep(self, result: Any) -> None:
        size = sum(each.nbytes for each in tree_leaves(result) if isinstance(each, Tensor))
        self._held.append((size, result))
        self._size += size
        while self._size > IN_TURN or len(self._held) > MOST_IN_TURN:
            self._size -= self._held.popleft()[0]


PROBE_RESULTS = ProbeResults()


class InTurn:
    """A call on other tensors each time, whose results are kept: in a step, what is read has been written some operations
    before, and what is written is read some operations later.

    Its tensors are made when it is first called, and once more after `release`: not all probes' are there at once.
    """

    def __init__(self, make: Callable[[], tuple[Any, ...]], run: Callable[..., Any], most: int = IN_TURN) -> None:
        self._make, self._run, self._most = make, run, most
        self._turns: Iterator[tuple[Any, ...]] | None = None

    def __call__(self) -> None:
        if self._turns is None:
            first = self._make()
            size = sum(each.nbytes for each in first if isinstance(each, Tensor))
            others = (self._make() for _ in range(min(MOST_IN_TURN, self._most // max(1, size))))
            self._turns = cycle([first, *others])
        PROBE_RESULTS.keep(self._run(*next(self._turns)))

    def release(self) -> None:
        self._turns = None


def operation_probes() -> list[Probe]:
    """One operation of each class at several sizes."""
    made = []
    for side in MATRIX_SIDES:
        made.append(Probe("matmul", 2 * TOKENS_PER_WIDTH * side**3, linear_products(side)))
    for number in RESULT_NUMBERS:
        size, wide = 4 * number, 4 if number < 2**14 else 64
        index = torch.arange(number // 16).flip(0)
        runs: dict[str, tuple[int, int, Callable[..., Any]]] = {
            "elementwise": (3, 2, torch.add),
            "update": (3, 2, lambda x, y: x.addcmul_(y, y, value=0.0)),
            "function": (2, 1, F.silu),
            "root": (2, 1, torch.sqrt),
            "reduction": (1, 1, lambda x, wide=wide: x.view(-1, wide).sum(1)),
            "copy": (2, 1, torch.clone),
            "lookup": (2, 1, lambda x, index=index: F.embedding(index, x.view(-1, 16))),
        }
        for name, (moved, given, call) in runs.items():
            make = partial(vectors, number, given)
            most = UPDATED_IN_TURN if name == "update" else IN_TURN
            made.append(Probe(name, moved * size, InTurn(make, call, most)))
    for dim in HEAD_DIMS:
        for length in (4, 64, 256, 512):
            made += attention_probes(dim, length)
    for side in (4, 16, 32):
        made += convolution_probes(side)
    return made


def matrices(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return torch.full((rows, columns), 0.5), torch.full((columns, rows), 0.5)


def vectors(number: int, count: int) -> tuple[Tensor, ...]:
    return tuple(torch.linspace(0.1, 2.0, number) for _ in range(count))


def linear_products(side: int) -> InTurn:
    """The three products of a linear layer, of its forward and its backward, one after the other."""
    rows = TOKENS_PER_WIDTH * side

    def run(x: Tensor, gradient: Tensor, weight: Tensor, turn: Any) -> Tensor:
        which = next(turn)
        if which == 0:
            return x @ weight.t()
        return gradient @ weight if which == 1 else gradient.t() @ x

    turn = cycle((0, 1, 2))
    return InTurn(lambda: (*matrices(rows, side)[:1], *matrices(rows, side)[:1], *matrices(side, side)[:1], turn), run)


def attention_probes(dim: int, length: int) -> list[Probe]:
    """Forward and backward of four heads' attention of so many numbers among so many tokens."""
    shape = (4, 4, length, dim if length > 4 else 4)
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

    def make() -> tuple[Any, ...]:
        q, k, v = (torch.full(shape, 0.1) for _ in range(3))
        return (q, k, v, *forward(q, k, v, 0.0, True))

    work = 4 * math.prod(shape) * length
    return [
        Probe(f"attention, {dim}", work, InTurn(make, lambda q, k, v, *_: forward(q, k, v, 0.0, True))),
        Probe(
            f"attention backward, {dim}",
            2.5 * work,
            InTurn(make, lambda q, k, v, out, sums: backward(out, q, k, v, out, sums, 0.0, True)),
        ),
    ]


def convolution_probes(side: int) -> list[Probe]:
    """Forward and backward of a 3 × 3 convolution between so many channels of images of so many pixels squared."""
    shape = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False])
    backward = torch.ops.aten.convolution_backward.default

    def make() -> tuple[Tensor, Tensor]:
        return torch.full((4, side, side, side), 0.1), torch.full((side, side, 3, 3), 0.1)

    work = 2 * 9 * 4 * side**4
    return [
        Probe("convolution", work, InTurn(make, lambda x, kernel: F.conv2d(x, kernel, padding=1))),
        Probe("convolution backward", 2 * work, InTurn(make, lambda x, kernel: backward(x, x, kernel, *shape))),
    ]


def collective_probes(group: dist.ProcessGroup, where: torch.device, place: str = "") -> list[Probe]:
    """Every kind of collective of MEASURED_KINDS among a group's ranks, at several sizes.

    Args:
        place: what is put behind the kinds' names.
    """
    made, between, ranks = [], product_between(where), group.size()
    for size in GPU_MESSAGES if where.type == "cuda" else MESSAGES:
        piece = max(1, size // 4 // ranks)
        whole, other = (torch.zeros(ranks * piece, device=where) for _ in range(2))
        mine = torch.zeros(piece, device=where)
        runs: dict[str, Callable[[], Any]] = {
            "all-reduce": partial(dist.all_reduce, whole, group=group),
            "all-gather": partial(dist.all_gather_into_tensor, whole, mine, group=group),
            "reduce-scatter": partial(dist.reduce_scatter_tensor, mine, whole, group=group),
            "all-to-all": partial(dist.all_to_all_single, other, whole, group=group),
            "broadcast": partial(dist.broadcast, whole, group=group, group_src=0),
            "send": partial(pass_round, whole, other, group),
        }
        made += [Probe(kind + place, whole.nbytes, runs[kind], between) for kind in MEASURED_KINDS]
    return made


def product_between(where: torch.device) -> InTurn:
    """What a rank computes before a collective."""
    sides = (BETWEEN_MESSAGES, BETWEEN_MESSAGES)
    return InTurn(lambda: tuple(each.to(where) for each in matrices(*sides)), torch.mm)


def pass_round(given: Tensor, taken: Tensor, group: dist.ProcessGroup) -> None:
    """Send to the next rank and receive from the one before."""
    rank, ranks = group.rank(), group.size()
    ways = [
        dist.P2POp(dist.isend, given, group=group, group_peer=(rank + 1) % ranks),
        dist.P2POp(dist.irecv, taken, group=group, group_peer=(rank - 1) % ranks),
    ]
    for work in dist.batch_isend_irecv(ways):
        work.wait()


class CountedOperations(TorchDispatchMode):
    """How many operations are issued while it is entered, by how; views count, as they take the host as long."""

    def __init__(self) -> None:
        super().__init__()
        self.ways = {"operation": 0, "dtensor": 0, "fsdp": 0, "collective": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if takes_dtensors(types):
            self.ways["dtensor"] += 1
            return NotImplemented
        names = {"fsdp": "fsdp", "c10d": "collective", "_c10d_functional": "collective"}
        self.ways["operation" if func._opname == "wait_tensor" else names.get(func.namespace, "operation")] += 1
        return func(*args, **(kwargs or {}))


def tiny_gpt(ranks: int) -> GPTConfig:
    """Of a GPT that computes nearly nothing, and that so many ranks can share."""
    return GPTConfig(2, 8 * ranks, heads=2 * ranks, kv_heads=ranks, hidden=16 * ranks, vocabulary=8 * ranks)


def host_probes(world: World) -> list[Probe]:
    """Steps of a tiny GPT: a plain one, and on several ranks one cut by tensor parallel, and FSDP's.

    An operation on DTensors takes the host longer where kernels have had the caches in between, half as long again or more.
    So it is measured on a GPT whose tensors fill a core's cache, against the same one without DTensors. It is cut for a mesh
    of one rank: no message is waited for.
    """
    ranks, device, task, tiny = world.world_size, world.device, Language(), tiny_gpt(world.world_size)
    wide = GPTConfig(2, 256, heads=4, kv_heads=2, hidden=512, vocabulary=64)

    def step(name: str, shape: GPTConfig, tokens: int, cut: Callable[[GPT], nn.Module]) -> Probe:
        run, counted = training_step(cut(GPT(shape).to(device)), tokens, task, device)
        return Probe(f"host, {name}", 1.0, run, counted=counted)

    made = [step("operation", tiny, 8, lambda model: model)]
    if ranks == 1:
        return made
    everyone = init_device_mesh(device.type, (ranks,))
    alone = init_device_mesh(device.type, (ranks, 1), mesh_dim_names=("each", "alone"))["alone"]

    def shared(mesh: DeviceMesh) -> Callable[[GPT], nn.Module]:
        def cut(model: GPT) -> nn.Module:
            plan = tensor_parallel_plan(task, "language", model, mesh.size(), False)
            return share_layers(model, plan, layer_styles(False), mesh, False)

        return cut

    def sharded(model: GPT) -> nn.Module:
        for block in model.blocks:
            fully_shard(block, mesh=everyone)
        fully_shard(model, mesh=everyone)
        return model

    def reduce_number() -> None:
        wait_tensor(all_reduce(torch.zeros(1, device=device), "sum", everyone))

    made += [
        step("dtensor, tiny", tiny, 8, shared(everyone)),
        step("fsdp", tiny, 8, sharded),
        step("plain", wide, 512, lambda model: model),
        step("dtensor", wide, 512, shared(alone)),
        Probe("host, functional", 1.0, reduce_number, product_between(device)),
    ]
    return made


def host_costs(probes: list[Probe], seconds: Callable[[Probe], float], least: float) -> dict[str, float]:
    """Seconds of the host, by how an operation is issued; each is what a GPT's steps take, less what is known.

    Args:
        least: seconds of the processor for a collective that sends nearly nothing.

    Returns:
        `operation`; `view`, the same; and besides them what `dtensor`, operations on DTensors, `fsdp`, FSDP's own, and
        `functional`, collectives that torch issues by way of its functional ones, take.
    """
    found = {probe.name.removeprefix("host, "): probe for probe in probes}
    operation = seconds(found["operation"]) / found["operation"].counted["operation"]
    costs = {"operation": operation, "view": operation}
    if len(found) == 1:
        return costs

    def per_operation(way: str, issued: str, known: dict[str, float], without: float = 0.0) -> float:
        counted = found[way].counted
        rest = seconds(found[way]) - without - sum(counted[name] * cost for name, cost in known.items())
        return max(0.0, rest) / max(1, counted[issued])

    known = {"operation": operation, "collective": least}
    in_tiny = per_operation("dtensor, tiny", "dtensor", known)
    costs["fsdp"] = per_operation("fsdp", "fsdp", known | {"dtensor": in_tiny})
    costs["functional"] = max(0.0, seconds(found["functional"]) - least)
    plain = seconds(found["plain"]) - found["plain"].counted["operation"] * operation
    known = {"operation": operation, "collective": costs["functional"]}
    costs["dtensor"] = per_operation("dtensor", "dtensor", known, plain)
    return costs


def training_step(
    model: nn.Module, tokens: int, task: Language, device: torch.device
) -> tuple[Callable[[], None], dict[str, int]]:
    """(a training step of a GPT on so many tokens, how many operations it issues by way)."""
    text = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def step() -> None:
        with loss_parallel(), implicit_replication():
            full_tensor(task.loss(model(text), text), device).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with CountedOperations() as counted:
        step()
    return step, counted.ways
