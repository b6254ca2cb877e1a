"""Many ranks in one process: each is a thread, and they take turns; no network, no second interpreter.

torch has a process group whose ranks are threads, for its own tests (`torch.testing._internal`, private: nothing else here
touches it). Its collectives are kept. Added is what a recipe needs besides: ranks take turns, so that each can have random
generators, and DTensor settings, of its own, which a process has once; and point-to-point messages.

torch's LocalTensorMode, which runs a program once on tensors that are all ranks' at once, is no help here: what depends on
the rank's number in Python, as which chunks of a ring's keys are seen, is computed once there.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from lockstep.distributed.process_group import World
from lockstep.errors import UserError

MEANS = "threads of one process by torch's MultiThreadedPG"
Rank = Callable[[World], None]


class Simulation:
    """All ranks' turns and messages.

    Attributes:
        failed: (rank, error) of those that raised, the first of which stopped the others.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._awaited: set[threading.Event] = set()
        self._sent: dict[tuple[Any, ...], deque[torch.Tensor]] = defaultdict(deque)
        self._arrived: dict[tuple[Any, ...], threading.Event] = {}
        self.failed: list[tuple[int, BaseException]] = []

    def wait(self, event: threading.Event) -> None:
        """Let other ranks take their turns until it is set, or a rank has failed, which ends this one."""
        if not event.is_set() and not self.failed:
            state = state_of_process()
            self._awaited.add(event)
            self._turn.release()
            event.wait()
            self._turn.acquire()
            self._awaited.discard(event)
            set_state_of_process(state)
        if self.failed:
            raise SystemExit

    def fail(self, rank: int, error: BaseException) -> None:
        """Have every rank end that waits, or comes to wait."""
        self.failed.append((rank, error))
        for event in list(self._awaited):
            event.set()

    def send(self, where: tuple[Any, ...], tensor: torch.Tensor) -> None:
        self._sent[where].append(tensor.detach().clone())
        if event := self._arrived.pop(where, None):
            event.set()

    def receive(self, where: tuple[Any, ...], into: torch.Tensor) -> None:
        if not self._sent[where]:
            self.wait(self._arrived.setdefault(where, threading.Event()))
        into.detach().copy_(self._sent[where].popleft())

    def run_rank(self, rank: Rank, world: World, store: dist.Store) -> None:
        """One thread, from its first turn to its last."""
        with self._turn:
            try:
                dist.init_process_group("threaded", rank=world.rank, world_size=world.world_size, store=store)
                rank(world)
            except SystemExit:  # another rank's error is the one that is told
                pass
            except BaseException as error:
                self.fail(world.rank, error)
            finally:
                dist.destroy_process_group()


class Arrival:
    """One collective: who comes last does it for all. It stands in for torch's, whose ranks do not take turns."""

    def __init__(
        self, simulation: Simulation, work: Callable[[Any], Any], world_size: int, collective: Any, group: Any
    ) -> None:
        self._simulation, self._work = simulation, work
        self._collective, self._data, self._missing = collective, [None] * world_size, world_size
        self._complete = threading.Event()

    def join(self, rank: int, data: Any) -> Any:
        self._data[rank] = data
        self._missing -= 1
        if self._missing:
            self._simulation.wait(self._complete)
        else:
            self._collective.work(self._data)
            self._complete.set()
        return self._work(data)


class AllToAll:
    """One all-to-all of rows. It stands in for torch's, which counts all rows anew for each pair of ranks."""

    @torch.no_grad()
    def work(self, data: list[Any]) -> None:
        leaving = [given.split(sizes or len(given) // len(data)) for _, given, _, sizes in data]
        for rank, (taken, *_) in enumerate(data):
            taken.detach().copy_(torch.cat([parts[rank] for parts in leaving]))


class Message:
    """A tensor to come, as a Work."""

    def __init__(self, arrive: Callable[[], None]) -> None:
        self._arrive = arrive

    def wait(self, timeout: Any = None) -> bool:
        self._arrive()
        return True


def state_of_process() -> tuple[Any, ...]:
    """What a process has once and a rank must have for itself."""
    from torch.distributed.tensor import DTensor

    dispatcher: Any = DTensor._op_dispatcher
    return (
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state(),
        dispatcher._allow_implicit_replication,
        dict(dispatcher._custom_op_handlers),
    )


def set_state_of_process(state: tuple[Any, ...]) -> None:
    from torch.distributed.tensor import DTensor

    dispatcher: Any = DTensor._op_dispatcher
    torch_state, python_state, numpy_state, implicit, handlers = state
    torch.set_rng_state(torch_state)
    random.setstate(python_state)
    np.random.set_state(numpy_state)
    dispatcher._allow_implicit_replication = implicit
    if dispatcher._custom_op_handlers != handlers:
        dispatcher._custom_op_handlers.clear()
        dispatcher._custom_op_handlers.update(handlers)


def require_simulation(ranks: int) -> Any:
    """torch's module of ranks that are threads.

    Raises:
        UserError: the torch at hand has none like it.
    """
    try:
        from torch.testing._internal.distributed import multi_threaded_pg as threaded

        for owner, name in (
            (torch._C._distributed_c10d, "_set_thread_isolation_mode"),
            *((threaded, each) for each in ("ProcessLocalGroup", "Collective", "AllToAllBase", "_store_based_barrier")),
            *((threaded, each) for each in ("_install_threaded_pg", "_uninstall_threaded_pg", "ret_work")),
        ):
            getattr(owner, name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"simulate={ranks}: torch {torch.__version__} has no ranks as threads ({error}); leave it out, or set nproc"
        ) from None
    return threaded


def simulate(ranks: int, rank: Rank, threads: int) -> None:
    """Call `rank` as each of so many ranks, and return when all have returned.

    Args:
        threads: that torch computes with.

    Raises:
        UserError: the torch at hand lacks what this needs.
        Exception: whatever the first rank that failed has raised.
    """
    simulation, store = Simulation(), dist.HashStore()
    with threads_for_ranks(simulation, require_simulation(ranks)):
        started = []
        for number in range(ranks):
            hosts, device = ["simulated"] * ranks, torch.device("cpu")
            world = World(number, ranks, number, hosts, device, "gloo", threads, threads_by="simulate")
            started.append(threading.Thread(target=simulation.run_rank, args=(rank, world, store), daemon=True))
            started[-1].start()
        for thread in started:
            thread.join()
    if simulation.failed:
        number, error = simulation.failed[0]
        error.add_note(f"on simulated rank {number} of {ranks}")
        raise error


@contextlib.contextmanager
def threads_for_ranks(simulation: Simulation, threaded: Any) -> Iterator[None]:
    """Within it torch.distributed is one of threads, whose groups have what torch's lack."""

    def send(self: Any, tensors: list[torch.Tensor], to: int, tag: int) -> Any:
        simulation.send((self.pg_name, self.rank(), to, tag), tensors[0])
        return threaded.ret_work(tensors)

    def receive(self: Any, tensors: list[torch.Tensor], source: int, tag: int) -> Any:
        return Message(lambda: simulation.receive((self.pg_name, source, self.rank(), tag), tensors[0]))

    internals: Any = torch._C._distributed_c10d
    group, isolate = threaded.ProcessLocalGroup, internals._set_thread_isolation_mode
    arrival = partial(Arrival, simulation, threaded.ret_work)
    before, excepthook = state_of_process(), sys.excepthook
    comms = getattr(threaded.ThreadLocalWorld, "comms", [])  # which torch 2.11 asks it for, and does not give it
    with (
        shapes_in_common(),
        mock.patch.object(threaded.ThreadLocalWorld, "comms", comms, create=True),
        mock.patch.object(threaded, "Collective", arrival),
        mock.patch.object(threaded, "AllToAllBase", AllToAll),
        mock.patch.object(threaded, "_store_based_barrier"),  # groups are made in turns
        mock.patch.multiple(group, create=True, send=send, recv=receive, _get_backend=lambda self, device: self),
    ):
        isolate(True)
        threaded._install_threaded_pg()
        try:
            yield
        finally:
            threaded._uninstall_threaded_pg()
            isolate(False)
            group.reset()
            set_state_of_process(before)
            sys.excepthook = excepthook  # each rank that joined has put its number before it


@contextlib.contextmanager
def shapes_in_common() -> Iterator[None]:
    """Within it what an operation on DTensors gives, its shape and dtype, is worked out once and not by every rank.

    torch caches it by thread, since its key holds the mesh, which has the thread's groups. Of 64 ranks' time it is a third.
    """
    from torch.distributed.tensor import DTensor

    propagator: Any = DTensor._op_dispatcher.sharding_propagator
    name = "_propagate_tensor_meta_non_cached"
    if not hasattr(propagator, name):  # another torch's, which is only slower
        yield
        return
    found: dict[Any, Any] = {}
    work_out = getattr(propagator, name)

    def once(schema: Any) -> Any:
        key = (schema.op, without_mesh(schema.args_schema), without_mesh(tuple(schema.kwargs_schema.items())))
        if key not in found:
            found[key] = work_out(schema)
        return found[key]

    with mock.patch.object(propagator, name, once):
        yield


def without_mesh(value: Any) -> Any:
    """What a DTensor operation's result follows from, to be looked up by."""
    if hasattr(value, "tensor_meta"):
        return value.tensor_meta
    return tuple(map(without_mesh, value)) if isinstance(value, list | tuple) else (type(value), value)
