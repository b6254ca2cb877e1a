"""Who am I among the ranks, and on which device: from the launcher's environment to a process group.

Every launcher gives every rank torchrun's environment (https://docs.pytorch.org/docs/stable/elastic/run.html):
RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. Nothing else is needed to join. A bare `srun` gives its own
variables instead, from which these follow.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from lockstep.distributed.environment import check_nproc, resolve_device, share_of_cores
from lockstep.distributed.heartbeat import Heartbeat
from lockstep.distributed.rendezvous import check_in

NCCL_SPARE_SECONDS = 60  # what NCCL waits longer: it ends the process without a word (lockstep.diagnose.watchdog)


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
    heartbeat: Heartbeat = field(default_factory=Heartbeat)  # where this rank is, for whoever waits for it

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
    heartbeat: Heartbeat | None = None,
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
    return World(rank, world_size, local_rank, hosts, where, backend, threads, control, heartbeat or Heartbeat())
