"""Looks at every operation of a step as it is issued: memory, floating-point operations, collectives, time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lockstep.distributed.traffic import COLLECTIVES, SEND_NOTHING, takes_dtensors
from lockstep.plan.clock import ClockEvent, DeviceClock, StepTimes
from lockstep.plan.hardware import Hardware
from lockstep.plan.known_numbers import KnownNumbers
from lockstep.plan.links import Collective, collective_kind
from lockstep.plan.measured_seconds import operation_class
from lockstep.plan.memory import StorageLedger

WHOLE = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool)
PRECISIONS = {torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
OVERWRITING = ("copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_", "split_with_sizes_copy", "chunk_cat")
MAKING = ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")  # what is given is not read
FREE = ("empty", "new_empty", "empty_like", "new_empty_strided", "empty_strided", "lift_fresh", "detach")


@dataclass(frozen=True)
class StageMessage:
    """One that a rank of a pipeline sends or receives.

    Attributes:
        peer: the other rank.
        seconds: that it travels; None: it is received.
        began, ended: seconds of its own work that the rank had done before it, and when it had sent it.
    """

    peer: int
    seconds: float | None
    began: float
    ended: float


@dataclass
class StepTrace:
    """One step of one rank.

    Attributes:
        collectives: in the order in which they were issued.
        flops: floating-point operations.
        times: on the hardware that was asked for.
        events: what the clock was told, to be told once more.
        messages: from one rank to another, in order.
    """

    collectives: list[Collective] = field(default_factory=list)
    flops: int = 0
    times: StepTimes = field(default_factory=StepTimes)
    events: list[ClockEvent] = field(default_factory=list)
    messages: list[StageMessage] = field(default_factory=list)

    def traffic(self) -> dict[tuple[str, str], int]:
        """{(kind, link): bytes that are reduced, gathered, scattered or sent}."""
        found: dict[tuple[str, str], int] = {}
        for each in self.collectives:
            if each.ranks > 1 and each.kind != "receive":
                found[each.kind, each.link] = found.get((each.kind, each.link), 0) + each.size
        return found


class StepWatch(TorchDispatchMode):
    """Entered around a training on fake tensors; `begin` and `end` mark a step.

    It also makes such a training possible. Whole numbers that the host wants to know, such as the ranks of a device mesh,
    are real: what takes no fake tensor and makes whole numbers is computed. A number that the host reads from a fake
    tensor is what KnownNumbers says. An all-reduce's handle has a result, which DistributedDataParallel asks for and
    torch's fake process group does not give.
    """

    def __init__(self, hardware: Hardware) -> None:
        super().__init__()
        self.ledger, self.clock, self._per_node = StorageLedger(), DeviceClock(hardware), hardware.per_node
        self.steps: list[StepTrace] = []
        self.known = KnownNumbers()
        self._step: StepTrace | None = None
        self.offloads = False  # whether a host holds something
        self.copies_hide = False  # whether copies have streams of their own
        self._crossing: bool | None = None  # whether what is copied now goes to the device, or from it
        self._brought: set[int] = set()  # storages on the device that were copied there

    def begin(self) -> None:
        self.clock.begin()
        self._step = StepTrace()

    def end(self) -> None:
        assert self._step
        self._step.times, self._step.events = self.clock.end(), self.clock.events
        self.steps.append(self._step)
        self._step = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if takes_dtensors(types):
            if self._step:
                self.clock.host("dtensor")
            return NotImplemented  # it makes operations on local tensors of it, which come by here once more
        given = [*tensors_in(args), *tensors_in(kwargs)]
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(given[0], FakeTensor):
            return self.known.of(given[0])
        if func is torch.ops.c10d.allreduce_.default:
            future: Any = torch.futures.Future()
            future.set_result(args[0])
            result: Any = (args[0], _create_work_from_future(future).boxed())
        elif not any(isinstance(each, FakeTensor) for each in given) and (given or makes_whole_numbers(func, kwargs)):
            with unset_fake_temporarily():
                result = func(*args, **kwargs)
            if func.namespace not in COLLECTIVES:
                return result
        else:
            result = func(*args, **kwargs)
        made = list(tensors_in(result))
        if func.namespace not in COLLECTIVES:
            self.known.learn(func, args, kwargs, given, made)
        elif collective_kind(func._opname) in ("all-gather", "all-to-all", "receive"):
            self.known.forget([*given, *made])
        self.ledger.see(each for each in given if takes_memory(each))
        on_host = self.offloads and func.namespace not in COLLECTIVES and self._is_on_host(func, given)
        self.ledger.see((each for each in made if takes_memory(each)), on_host)
        if func.namespace in COLLECTIVES:
            if func._opname not in SEND_NOTHING:
                self._collective(func, args, given, made)
        elif self.offloads and self._crosses(func, given):
            self._copy(given, made)
        elif self._step and on_host:
            reads, writes = set(keys_of(given)), set(keys_of(made))
            if not is_free(func, reads, writes):
                self.clock.on_host(bytes_moved(func, args, kwargs, given, made), reads, writes)
        elif self._step:
            self._operation(func, args, kwargs, given, made, result)
        return result

    def cross(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor on the other side: on the device what the host holds, and the reverse."""
        self._crossing = self.ledger.is_hosted(tensor)
        try:
            with torch.no_grad():
                return tensor.clone()
        finally:
            self._crossing = None

    def _is_on_host(self, func: Any, given: list[Tensor]) -> bool:
        """Whether an operation is the host's, and what it makes: where its largest tensor is, or the one it copies to."""
        if self._crossing is not None:
            return not self._crossing
        largest = given[:1] if func._opname == "copy_" else sorted(given, key=lambda each: -each.nbytes)[:1]
        return any(self.ledger.is_hosted(each) for each in largest)

    def _crosses(self, func: Any, given: list[Tensor]) -> bool:
        """Whether it copies from the host to the device, or from the device to the host."""
        if self._crossing is not None:
            return func._opname == "clone"
        return func._opname == "copy_" and self.ledger.is_hosted(given[0]) != self.ledger.is_hosted(given[1])

    def _copy(self, given: list[Tensor], made: list[Tensor]) -> None:
        to_device = not self.ledger.is_hosted(made[0])
        self._brought.update(keys_of(made) if to_device else ())
        if self._step:
            self.clock.copy(given[-1].nbytes, to_device, self.copies_hide, keys_of(given[-1:]), keys_of(made))

    def _collective(self, func: Any, args: Any, given: list[Tensor], made: list[Tensor]) -> None:
        sizes = [sum(each.nbytes for each in tensors_in(side)) for side in args]
        size = max([*sizes, sum(each.nbytes for each in made) if func.namespace != "c10d" else 0])
        if func._opname == "alltoall_base_":  # (output, input, …): they may be unequal, and what is sent counts
            size = args[1].nbytes
        kind, ranks = collective_kind(func._opname), ranks_of(args)
        if kind in ("send", "receive"):
            ranks = [dist.get_rank(), ranks[args[2]] if len(args) > 2 else dist.get_rank()]
        each = Collective.among(kind, size, ranks, self._per_node)
        self.ledger.call([*given, *made], "communication")
        if self._step:
            self._step.collectives.append(each)
            if func.namespace == "_c10d_functional":
                self.clock.host("functional")
            began = self.clock.times.step
            self.clock.collective(each, keys_of(given), keys_of([*given, *made]))
            if kind in ("send", "receive"):
                seconds = each.seconds(self.clock.hardware) if kind == "send" else None
                self._step.messages.append(StageMessage(ranks[1], seconds, began, self.clock.times.step))

    def _operation(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], made: list[Tensor], out: Any) -> None:
        reads, writes = set(keys_of(given)), set(keys_of(made))
        name = func._opname
        if func.namespace == "fsdp":
            self.clock.host("fsdp")
            if name == "split_with_sizes_copy":  # weights that were gathered; FSDP frees and takes their memory itself
                gathered = list(tensors_in(kwargs.get("out", ())))
                self.ledger.call(gathered, "communication")
            if name == "all_gather_copy_in":
                self.ledger.call(made, "communication")
                return self.clock.passed_on(reads, writes)
        if name == "_to_copy" and reads and reads <= self._brought:
            return self.clock.passed_on(reads, writes)  # FSDP's cast of what came from the host: on its queue, too
        self._brought -= writes - reads  # new memory, which may have an old address
        if is_free(func, reads, writes):
            if func.namespace == "aten":
                self.clock.host("view")
            self.clock.forget(writes - reads)
            return None
        assert self._step
        formula = flop_registry.get(func.overloadpacket)
        flops = int(formula(*args, **kwargs, out_val=out)) if formula else 0
        self._step.flops += flops
        size = bytes_moved(func, args, kwargs, given, made)
        dtype = PRECISIONS.get(next((each.dtype for each in given if each.is_floating_point()), torch.float32), "fp32")
        kind = "matmul" if flops else "memory"
        self.clock.operation(
            kind,
            flops,
            dtype,
            size,
            reads,
            writes | reads if func._schema.is_mutable else writes,
            operation_class(name, flops, given[0].shape[-1] if given and given[0].dim() else 0),
        )
        return None


def takes_memory(tensor: Tensor) -> bool:
    """Whether a device holds it: it stands for numbers, and is not one of shapes alone, as DeepSpeed keeps them."""
    return isinstance(tensor, FakeTensor) and tensor.fake_device.type != "meta"


def is_free(func: Any, reads: set[int], writes: set[int]) -> bool:
    """Whether an operation moves no bytes: it makes a view, or memory that nothing is written to."""
    return func._opname in FREE or (writes <= reads and not func._schema.is_mutable)


def bytes_moved(func: Any, args: Any, kwargs: dict[str, Any], given: list[Tensor], made: list[Tensor]) -> int:
    """Bytes that an operation reads and writes; what it updates in place is both, and what it writes over is not read."""
    written = list(made)
    if func._schema.is_mutable:
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info and argument.alias_info.is_write:
                written += tensors_in(args[number] if number < len(args) else kwargs.get(argument.name))
    read = [] if func._opname in MAKING else given
    if func._opname in OVERWRITING:
        over = {id(each) for each in written}
        read = [each for each in given if id(each) not in over]
    return sum_of_bytes(read) + sum_of_bytes(written)


def makes_whole_numbers(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether what takes no tensor makes numbers that are for the host."""
    dtype = kwargs.get("dtype")
    return dtype in WHOLE or (dtype is None and func.overloadpacket is torch.ops.aten.arange)


def tensors_in(given: Any) -> Iterator[Tensor]:
    """The tensors among an operation's arguments or results, which are lists and mappings at most."""
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, list | tuple):
        for each in given:
            yield from tensors_in(each)
    elif isinstance(given, dict):
        for each in given.values():
            yield from tensors_in(each)


def sum_of_bytes(tensors: list[Tensor]) -> int:
    """Bytes of tensors, each counted once."""
    return sum({id(each): each.nbytes for each in tensors}.values())


def keys_of(tensors: list[Tensor]) -> Iterator[int]:
    return (each.untyped_storage()._cdata for each in tensors)


def ranks_of(args: Any) -> list[int]:
    """The ranks of the group among an operation's arguments: an object, or a name."""
    for each in args:
        if isinstance(each, torch.ScriptObject):
            try:
                group = dist.ProcessGroup.unbox(each)
            except RuntimeError:  # the operation of a reduction, say
                continue
            return dist.get_process_group_ranks(group)
        if isinstance(each, str) and each not in ("sum", "avg", "max", "min", "product"):
            return dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(dist.GroupName(each)))
    return list(range(dist.get_world_size()))
