"""From a place among the ranks to a process group: bind the device, set threads and timeouts, connect."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from lockstep.distributed.cores import threads_of_rank
from lockstep.distributed.devices import agree_on_devices, gpu_of
from lockstep.distributed.heartbeat import Heartbeat
from lockstep.distributed.interfaces import interface_towards
from lockstep.distributed.rendezvous import check_in

FULL_MESH_RANKS = 64  # up to which gloo connects all ranks with all
NCCL_SPARE_SECONDS = 60  # that NCCL waits longer: it ends the process without a message (lockstep.diagnose.watchdog)


def collective_timeout(timeout_seconds: float, backend: str) -> timedelta:
    """The time after which a collective gives up."""
    return timedelta(seconds=timeout_seconds + (NCCL_SPARE_SECONDS if backend == "nccl" else 0))


def connect_when_needed(world_size: int) -> None:
    """Of many ranks have gloo connect two when they first talk to each other, not all with all at the start.

    256 ranks then have 17 connections each, not 257. Of few, all are connected before anything is computed, so that a link
    that is broken is named at the start.
    Source: TORCH_GLOO_LAZY_INIT, torch/csrc/distributed/c10d/ProcessGroupGloo.cpp
    """
    if world_size > FULL_MESH_RANKS:
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")


def set_group_timeouts(timeout_seconds: float) -> None:
    """Make this the default of later groups, such as a device mesh's, where torch's would be 10 or 30 minutes, and have
    torch's flight recorder keep their collectives."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    distributed_c10d.default_pg_timeout = collective_timeout(timeout_seconds, "gloo")
    distributed_c10d.default_pg_nccl_timeout = collective_timeout(timeout_seconds, "nccl")


def new_gloo_group(timeout_seconds: float) -> dist.ProcessGroup:
    """A gloo group of all ranks: for what the CPUs have to agree on, whatever carries the tensors."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
    assert isinstance(group, dist.ProcessGroup), "every rank is in it"
    return group


def leave_in_time(seconds: float) -> None:
    """End this process, when all is done, even where a backend takes longer than that to give up its connections."""
    guard = threading.Timer(seconds, os._exit, [0])
    guard.daemon = True
    guard.start()


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
    control: dist.ProcessGroup | None = None  # a gloo group for objects and signals, where NCCL carries the tensors
    heartbeat: Heartbeat = field(default_factory=Heartbeat)  # where this rank is, for those who wait for it
    threads_by: str = ""  # who says how many threads, such as OMP_NUM_THREADS=2
    store: dist.Store | None = None  # where the ranks have met

    @property
    def device_ids(self) -> list[int] | None:
        """For DistributedDataParallel: this rank's device, or None on CPU."""
        return [self.device.index] if self.device.type == "cuda" else None

    @property
    def own_gpus(self) -> list[torch.device]:
        """The GPUs that this rank alone uses, its device first: those that are left over are dealt out to all ranks of
        the host. None on CPU."""
        if self.device.type != "cuda":
            return []
        ranks_here, count = self.hosts.count(self.hosts[self.rank]), torch.cuda.device_count()
        return [torch.device("cuda", number) for number in range(self.device.index, count, ranks_here)]


def join_process_group(
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
    heartbeat: Heartbeat | None = None,
) -> World:
    """Become a rank: check in unless `hosts` says that all have, bind the device, set the threads, make the group.

    Raises:
        UserError: a rank is missing, or has no device, or not the same kind as the others, or another rank's GPU.
    """
    if hosts is None:
        store, hosts, _ = check_in(store, rank, world_size, timeout_seconds)
    mine = [r for r, host in enumerate(hosts) if host == hosts[rank]]
    if local_rank is None:
        local_rank = mine.index(rank)
    device, backend = agree_on_devices(store, rank, hosts, local_rank, device, backend, timeout_seconds)
    # Every rank would otherwise start a thread per core. Counted by host, not by agent, so that each way of starting
    # the same ranks gives each the same threads and with them the same bits.
    threads, said_by = threads_of_rank(len(mine), threads, os.environ)
    # Also where there are as many: a forked rank's copy of torch's thread pool is dead, and two threads of backward that
    # come to replace it at once would abort the process ("Invalid thread pool!").
    torch.set_num_threads(threads)
    timeout = collective_timeout(timeout_seconds, backend)
    set_group_timeouts(timeout_seconds)
    connect_when_needed(world_size)
    group_store = dist.PrefixStore("group", store)
    away = [host for host in hosts if host != hosts[rank]]
    # On one machine that is loopback, where no other one can connect.
    if interface := interface_towards(away[0] if away else "127.0.0.1"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        if not away:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    if device == "cuda":
        where = gpu_of(local_rank)
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
    control = new_gloo_group(timeout_seconds) if backend != "gloo" else None
    return World(
        rank, world_size, local_rank, hosts, where, backend, threads, control, heartbeat or Heartbeat(), said_by, store
    )
