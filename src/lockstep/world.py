"""Who am I among the ranks, and on which device: from the launcher's environment to a process group.

Every launcher gives every rank torchrun's environment (https://docs.pytorch.org/docs/stable/elastic/run.html):
RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. Nothing else is needed to join. A bare `srun` gives its own
variables instead, from which these follow.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from lockstep.errors import UserError
from lockstep.pulse import Pulse

T = TypeVar("T")
NCCL_SPARE_SECONDS = 60  # what NCCL waits longer: it ends the process without a word (lockstep.inquest)
IMPATIENCE_SECONDS = 60.0  # after that, rank 0 says whom it is waiting for


@dataclass(frozen=True)
class Place:
    """What a launcher says about this process."""

    rank: int
    world_size: int
    master_addr: str
    master_port: int
    agent_store: bool  # torchrun's agent holds the store at master_port, so rank 0 must not
    attempt: int  # how often the agent has restarted the ranks
    nodes: tuple[str, ...] = ()  # where the launcher has put each rank, if it says


def discover(env: Mapping[str, str]) -> Place | None:
    """Read this process's place from its environment; None where no launcher started it.

    Raises:
        UserError: the variables are incomplete or contradict each other.
    """
    if "RANK" not in env:
        if in_a_step_of_many(env):
            env = {**env, **from_srun(env)}
        elif "WORLD_SIZE" in env:
            raise UserError(
                f"WORLD_SIZE={env['WORLD_SIZE']} is set but RANK is not: set RANK to 0…WORLD_SIZE−1 in each process, "
                "or unset WORLD_SIZE"
            )
        else:
            return None
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in env]
    if missing:
        raise UserError(
            f"RANK={env['RANK']} is set but not {', '.join(missing)}: a rank needs all four, or none of them"
        )
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not env[name].isdecimal():
            raise UserError(f"{name}={env[name]}: allowed are whole numbers from 0 up")
        numbers[name] = int(env[name])
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        raise UserError(
            f"RANK={env['RANK']}: allowed are 0…{numbers['WORLD_SIZE'] - 1} (WORLD_SIZE={env['WORLD_SIZE']})"
        )
    if not 0 < numbers["MASTER_PORT"] < 2**16:
        raise UserError(f"MASTER_PORT={env['MASTER_PORT']}: allowed are 1…65535")
    return Place(
        rank=numbers["RANK"],
        world_size=numbers["WORLD_SIZE"],
        master_addr=env["MASTER_ADDR"],
        master_port=numbers["MASTER_PORT"],
        agent_store=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=int(env.get("TORCHELASTIC_RESTART_COUNT", "0")),
        nodes=nodes_of_tasks(env) if in_a_step_of_many(env) else (),
    )


def in_a_step_of_many(env: Mapping[str, str]) -> bool:
    """Whether this process is one of several that one `srun` started.

    Not so the shell of an allocation or the script of a batch job: they know the job's tasks, and are none of them. A
    step of a single task is taken for a shell too (`srun --pty bash`). The job's name says nothing.
    """
    return "SLURM_STEP_ID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def from_srun(env: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables from those of a step; rank 0 is on the step's first node.

    Raises:
        UserError: WORLD_SIZE is set too, to something else.
    """
    tasks = env["SLURM_STEP_NUM_TASKS"]
    if env.get("WORLD_SIZE", tasks) != tasks:
        raise UserError(
            f"WORLD_SIZE={env['WORLD_SIZE']}: srun started {tasks} tasks, and each is a rank; unset WORLD_SIZE, or "
            f"start {env['WORLD_SIZE']} with srun --ntasks={env['WORLD_SIZE']}"
        )
    found = {"RANK": env["SLURM_PROCID"], "WORLD_SIZE": tasks}
    if "MASTER_ADDR" not in env:
        found["MASTER_ADDR"] = expand(env["SLURM_STEP_NODELIST"])[0]
    if "MASTER_PORT" not in env:  # the same on all ranks without a word between them, another one in each step
        found["MASTER_PORT"] = str(15000 + (int(env["SLURM_JOB_ID"]) * 7 + int(env["SLURM_STEP_ID"])) % 15000)
    return found


def expand(nodes: str) -> list[str]:
    """The names in a list of Slurm's, such as `gpu[01-03],big7`."""
    done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
    return done.stdout.split() or [nodes]


def nodes_of_tasks(env: Mapping[str, str]) -> tuple[str, ...]:
    """The node of each task of a step, as srun spreads them by default: the first tasks on the first node."""
    counts: list[int] = []  # a node
    for count, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(times or 1)
    nodes = expand(env.get("SLURM_STEP_NODELIST", ""))
    return tuple(node for node, count in zip(nodes, counts, strict=False) for _ in range(count))


def open_store(place: Place, timeout_seconds: float) -> dist.Store:
    """Connect to the key-value store where ranks meet; rank 0 serves it unless torchrun's agent already does.

    Raises:
        UserError: the port is taken, or nobody answers there.
    """
    serves = place.rank == 0 and not place.agent_store
    where = f"MASTER_ADDR={place.master_addr} MASTER_PORT={place.master_port}"
    if not serves and not answers(place.master_addr, place.master_port, timeout_seconds):
        raise UserError(
            f"rank {place.rank} could not reach rank 0 at {where} within {timeout_seconds:g} s: "
            "start rank 0, or correct the address, or raise timeout_seconds"
        )

    def connect() -> dist.Store:
        return dist.TCPStore(
            place.master_addr,
            place.master_port,
            is_master=serves,
            timeout=timedelta(seconds=timeout_seconds),
            wait_for_workers=False,  # it would wait without saying who is missing; check_in names them
        )

    # Before something that listens but is no store, TCPStore waits for ever, whatever its timeout.
    try:
        return dist.PrefixStore("lockstep", within(timeout_seconds, connect))
    except TimeoutError:
        raise UserError(f"{where}: something answers there that is no store; set a free MASTER_PORT") from None
    except (RuntimeError, ValueError) as error:  # DistNetworkError among them
        text = str(error).lower()
        if "eaddrinuse" in text or "address already in use" in text:
            raise UserError(f"{where}: the port is in use on {socket.gethostname()}; set a free MASTER_PORT") from None
        raise UserError(f"{where}: no store there ({str(error).splitlines()[0]}); set another MASTER_PORT") from None


def within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns, or raises.

    Raises:
        TimeoutError: it takes longer; the thread it is in is left alone.
    """
    done: Future[T] = Future()

    def call() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return done.result(seconds)


def answers(host: str, port: int, timeout_seconds: float) -> bool:
    """Wait until something listens at host:port. TCPStore would wait too, and print a page of C++ when it gives up."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic())).close()
            return True
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)


def wait_for(store: dist.Store, keys: list[str], timeout_seconds: float) -> bool:
    """Whether all keys were set within the time. Asks again and again, because Store.wait logs C++ warnings."""
    deadline = time.monotonic() + timeout_seconds
    pause = 0.001
    while True:
        try:
            if store.check(keys):
                return True
        except dist.DistNetworkError:
            return False  # whoever served the store has gone
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.02)


def check_in(
    store: dist.Store,
    rank: int,
    world_size: int,
    timeout_seconds: float,
    note: str = "",
    nodes: tuple[str, ...] = (),
) -> tuple[dist.Store, list[str], list[str]]:
    """Wait until every rank is there; return the part of the store that is theirs, their host names and their notes.

    init_process_group would wait as well, but its time-out does not say which rank it waited for, and in a store that
    outlives its ranks, as an elastic agent's does, it takes a dead rank's address for a new one's. Here rank 0 opens a
    round under a fresh name, and lists in the end who came to it; who is not in that list has read an older name.

    Args:
        note: a word to all other ranks.
        nodes: where each rank should be, to say where to look for one that is missing.

    Raises:
        UserError: some ranks did not come; all the ranks that did come get their numbers.
    """
    me = uuid.uuid4().hex
    here = json.dumps([me, socket.gethostname(), note])
    everyone: list[Any] | None = None
    if rank == 0:
        room = dist.PrefixStore(me, store)
        room.set("0", here)
        store.set("round", me)
        keys = [str(r) for r in range(world_size)]
        if not wait_for(room, keys, min(timeout_seconds, IMPATIENCE_SECONDS)) and timeout_seconds > IMPATIENCE_SECONDS:
            late = [r for r, key in enumerate(keys) if not room.check([key])]
            print(f"still waiting for {named(late, nodes)} of {world_size}", file=sys.stderr, flush=True)
            wait_for(room, keys, timeout_seconds - IMPATIENCE_SECONDS)
        everyone = [json.loads(room.get(key)) if room.check([key]) else None for key in keys]
        room.set("list", json.dumps(everyone))
    else:
        # Rank 0 answers when its own wait is over; the others may have come a moment before it.
        deadline, seen = time.monotonic() + timeout_seconds + 30, ""
        while everyone is None and wait_for(store, ["round"], deadline - time.monotonic()):
            current = store.get("round").decode()
            room = dist.PrefixStore(current, store)
            if current != seen:
                room.set(str(rank), here)
                seen = current
            if wait_for(room, ["list"], 0.2):
                listed = json.loads(room.get("list"))
                everyone = listed if listed[rank] and listed[rank][0] == me else None
            if everyone is None and time.monotonic() > deadline:
                break
    if everyone is None:
        raise UserError(f"rank 0 did not join within timeout_seconds={timeout_seconds:g}: start it, or look at its log")
    missing = [r for r, entry in enumerate(everyone) if entry is None]
    if missing:
        farewell(room, rank, world_size - len(missing))
        raise UserError(
            f"{named(missing, nodes)} of {world_size} did not join within timeout_seconds={timeout_seconds:g}: start "
            f"{'them' if len(missing) > 1 else 'it'}, or set WORLD_SIZE to the number of processes you start"
        )
    return room, [entry[1] for entry in everyone], [entry[2] for entry in everyone]


def named(ranks: list[int], nodes: tuple[str, ...]) -> str:
    """`ranks 2 (node2), 3 (node2)`, without the nodes where nobody knows them."""
    words = [f"{rank} ({nodes[rank]})" if rank < len(nodes) else str(rank) for rank in ranks]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(words)}"


def farewell(store: dist.Store, rank: int, readers: int) -> None:
    """Let rank 0, which may serve the store, outlive the moment in which the other readers read from it."""
    store.add("read", 1)
    if rank == 0:
        deadline = time.monotonic() + 5
        while store.add("read", 0) < readers and time.monotonic() < deadline:
            time.sleep(0.01)


def resolve_device(device: str, backend: str) -> tuple[str, str]:
    """Turn `auto` into what this machine has: ("cuda" | "cpu", "nccl" | "gloo").

    Raises:
        UserError: cuda was asked for and is not there, or nccl for the CPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no CUDA device here; allowed are device=cpu and device=auto")
    if backend == "auto":
        backend = "nccl" if device == "cuda" else "gloo"
    if backend == "nccl" and device == "cpu":
        raise UserError(
            "backend=nccl: it carries CUDA tensors only; with device=cpu allowed are backend=gloo and backend=auto"
        )
    return device, backend


def default_nproc(device: str) -> int:
    """Ranks to start on this machine when nobody says: one per GPU, or 2 on CPU."""
    return torch.cuda.device_count() if device == "cuda" else 2


def check_nproc(nproc: int, device: str, backend: str) -> None:
    """Refuse more NCCL ranks than GPUs: two ranks on one GPU dead-lock or fail inside NCCL."""
    if device == "cuda" and backend == "nccl" and nproc > torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(
            f"nproc={nproc}: this machine has {count} CUDA devices and a rank needs one of its own; "
            f"allowed are 1…{count} (or backend=gloo, whose ranks may share a device)"
        )


def share_of_cores(ranks_here: int, env: Mapping[str, str]) -> int:
    """The cores for one rank. Slurm may have bound each of its tasks to its own already, which must not be shared."""
    cores = len(os.sched_getaffinity(0))
    if "SLURM_STEP_ID" in env and "SLURM_CPUS_PER_TASK" in env and ranks_here > 1:
        return min(int(env["SLURM_CPUS_PER_TASK"]), cores)
    return max(1, cores // ranks_here)


def interface_towards(host: str) -> str | None:
    """The network interface by which this machine reaches another; None where that cannot be said.

    Gloo takes the one that this host's own name stands for, which is often loopback, or the wrong one of several.
    """
    SIOCGIFADDR = 0x8915  # linux/sockios.h
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing
        except OSError:
            return None
        mine = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            try:
                request = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                continue  # it has no IPv4 address
            if request[20:24] == mine:
                return name
    return None


def lost_link() -> str:
    """The interface that this rank's gloo groups use where it has no link: a pulled cable, a dead switch; else
    nothing."""
    SIOCGIFFLAGS, IFF_RUNNING = 0x8913, 0x40  # linux/sockios.h, linux/if.h
    name = os.environ.get("GLOO_SOCKET_IFNAME", "")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            about = fcntl.ioctl(probe, SIOCGIFFLAGS, struct.pack("256s", name.encode()))
        except OSError:
            return ""  # none is set, or several are
    return "" if struct.unpack_from("H", about, 16)[0] & IFF_RUNNING else name


def patience(timeout_seconds: float, backend: str) -> timedelta:
    """After which time a collective is to give up."""
    return timedelta(seconds=timeout_seconds + (NCCL_SPARE_SECONDS if backend == "nccl" else 0))


def limit_waits(timeout_seconds: float) -> None:
    """Give the groups that others make, such as a mesh's, this limit where torch's would be 10 or 30 minutes, and have
    torch's flight recorder keep their collectives."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    distributed_c10d.default_pg_timeout = patience(timeout_seconds, "gloo")
    distributed_c10d.default_pg_nccl_timeout = patience(timeout_seconds, "nccl")


def make_group(timeout_seconds: float) -> dist.ProcessGroup:
    """A gloo group of all ranks: for the CPU's affairs, whatever the tensors travel by."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
    assert isinstance(group, dist.ProcessGroup), "every rank is in it"
    return group


@dataclass(frozen=True)
class World:
    """All the ranks of one run, seen from one of them."""

    rank: int
    world_size: int
    local_rank: int
    hosts: list[str]  # host name of every rank
    device: torch.device
    backend: str
    threads: int
    control: dist.ProcessGroup | None = None  # a gloo group, for what ranks say to each other about the CPU's affairs
    pulse: Pulse = field(default_factory=Pulse)  # where this rank is, for whoever waits for it

    @property
    def device_ids(self) -> list[int] | None:
        """What DistributedDataParallel wants: this rank's device, or None on CPU."""
        return [self.device.index] if self.device.type == "cuda" else None


def join(
    store: dist.Store,
    rank: int,
    world_size: int,
    *,
    device: str,
    backend: str,
    timeout_seconds: float,
    threads: int | None = None,
    tf32: bool = True,
    local_rank: int | None = None,
    hosts: list[str] | None = None,
    pulse: Pulse | None = None,
) -> World:
    """Become a rank: check in unless `hosts` says that all have, bind the device, set the threads, make the group.

    Raises:
        UserError: a rank is missing, or this host lacks the device.
    """
    device, backend = resolve_device(device, backend)
    if hosts is None:
        store, hosts, _ = check_in(store, rank, world_size, timeout_seconds)
    mine = [r for r, host in enumerate(hosts) if host == hosts[rank]]
    if local_rank is None:
        local_rank = mine.index(rank)
    # Every rank would otherwise start a thread per core. Counted by host, not by agent, so that each way of starting
    # the same ranks gives each the same threads and with them the same bits.
    threads = threads or share_of_cores(len(mine), os.environ)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    timeout = patience(timeout_seconds, backend)
    limit_waits(timeout_seconds)
    group_store = dist.PrefixStore("group", store)
    away = [host for host in hosts if host != hosts[rank]]
    if away and (interface := interface_towards(away[0])):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if device == "cuda":
        if backend == "nccl" and torch.cuda.device_count() > 1:  # one visible GPU is one that was given to this rank
            check_nproc(local_rank + 1, device, backend)
        where = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(where)
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
        # Binding the device makes NCCL connect at once, so a broken link shows here and not in the first backward.
        bound = where if backend == "nccl" else None
        dist.init_process_group(
            backend, store=group_store, rank=rank, world_size=world_size, timeout=timeout, device_id=bound
        )
    else:
        where = torch.device("cpu")
        dist.init_process_group(backend, store=group_store, rank=rank, world_size=world_size, timeout=timeout)
    control = make_group(timeout_seconds) if backend != "gloo" else None
    return World(rank, world_size, local_rank, hosts, where, backend, threads, control, pulse or Pulse())
