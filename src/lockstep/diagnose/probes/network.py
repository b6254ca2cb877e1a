"""The way to the other hosts: interfaces, names, ports and clocks."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path

import torch
import torch.distributed as dist

from lockstep.diagnose.findings import Facts, Findings
from lockstep.diagnose.probes.ranks import differences, first_rank_of_hosts, ranks_by_host, value_or_error
from lockstep.distributed.collectives import gather_objects
from lockstep.distributed.interfaces import interface_towards
from lockstep.distributed.process_group import World
from lockstep.utils.text import count

CLOCK_PINGS = 10
REACH_SECONDS = 5.0  # in which a host must accept a connection
SKEW_SECONDS = 0.5  # from which clocks are said to differ


# Interfaces and ports -----------------------------------------------------------------------------------------------


def probe_network(world: World) -> Facts:
    """By which interface this rank reaches other hosts, and which ports its kernel hands out."""
    away = [host for host in world.hosts if host != world.hosts[world.rank]]
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="utf-8").split())
    found: Facts = {
        "backend": world.backend,
        "master": [os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")],
        "agent": "TORCHELASTIC_RUN_ID" in os.environ,  # a launcher has chosen the port
        "kernel_ports": [low, high],
        "variables": {name: value for name, value in os.environ.items() if name.startswith(("NCCL_", "GLOO_"))},
        "infiniband": sorted(path.name for path in Path("/sys/class/infiniband").glob("*")),
    }
    name = interface_towards(away[0]) if away else None
    if name:
        about = Path("/sys/class/net", name)
        found |= {"interface": name, "mtu": int((about / "mtu").read_text(encoding="utf-8"))}
        with contextlib.suppress(OSError, ValueError):  # a virtual one has no speed
            speed = int((about / "speed").read_text(encoding="utf-8"))
            found["megabits"] = speed if speed > 0 else None
    return found


def judge_network(ranks: list[Facts]) -> Findings:
    """What carries the tensors."""
    found, about = Findings("network"), [each["network"] for each in ranks]
    first, several = about[0], len(ranks_by_host(ranks)) > 1
    for name, unit in (("mtu", ""), ("megabits", " Mbit/s")):
        if several and (figure := differences(ranks, "network", name)):
            remedy = "the same network for all: set GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"
            found.warning(f"{name}{unit}: {figure}", remedy)
    if several and first["infiniband"]:
        off = first["backend"] == "gloo" and ranks[0]["device"].get("type") == "cuda"
        if off or first["variables"].get("NCCL_IB_DISABLE") == "1":
            figure = f"InfiniBand ({', '.join(first['infiniband'])}) is there and not used"
            found.warning(figure, "set backend=nccl" if off else "unset NCCL_IB_DISABLE")
    if not found:
        names = list(dict.fromkeys(one["interface"] for one in about if one.get("interface")))
        by = f" over {', '.join(names)}" if names else (" over this host" if not several else "")
        speed = f", {first['megabits'] / 1000:g} Gbit/s" if first.get("megabits") else ""
        fast = f", InfiniBand {', '.join(first['infiniband'])}" if first["infiniband"] else ""
        found.ok(f"{first['backend']}{by}{speed}{fast}")
    return found


def judge_ports(ranks: list[Facts]) -> Findings:
    """Where the ranks met, and whether another process may take that port first the next time."""
    found, about = Findings("ports"), ranks[0]["network"]
    (address, port), (low, high) = about["master"], about["kernel_ports"]
    figure = f"met at {address}:{port}"
    if port is None:
        return found
    if not about["agent"] and low <= int(port) <= high:
        figure += f"; the kernel hands out {low}–{high} to any process"
        found.warning(figure, f"set a MASTER_PORT below {low}")
    else:
        found.ok(figure + (", chosen by the launcher" if about["agent"] else ""))
    return found


# Names --------------------------------------------------------------------------------------------------------------


def probe_reach(world: World) -> Facts:
    """{host: address and seconds, or an error}: each host's first rank resolves and connects to every host by name."""
    here = first_rank_of_hosts(world.hosts)
    listening: socket.socket | None = None
    port = 0
    if world.rank in here:
        with contextlib.suppress(OSError):
            listening = socket.create_server(("", 0), backlog=len(here) + 8)  # the kernel answers for it
            port = listening.getsockname()[1]
    ports = gather_objects(port, world.control)
    found: Facts = {}
    for first in here if world.rank in here else ():
        host = world.hosts[first]
        found[host] = value_or_error(lambda host=host, first=first: connect_to(host, ports[first]))  # type: ignore[misc]
    dist.barrier(world.control)
    if listening:
        listening.close()
    return found


def connect_to(host: str, port: int) -> Facts:
    known = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)
    addresses = sorted({str(entry[4][0]) for entry in known})
    found: Facts = {"addresses": addresses}
    started = time.perf_counter()
    try:
        socket.create_connection((addresses[0], port), timeout=REACH_SECONDS).close()
        found["seconds"] = time.perf_counter() - started
    except OSError as error:
        found["refused"] = error.strerror or str(error) or type(error).__name__
    return found


def judge_names(ranks: list[Facts]) -> Findings:
    """Whether every host finds, and reaches, every host by its name."""
    found = Findings("names")
    looks = [(each["host"], host, look) for each in ranks for host, look in each["reach"].items()]
    for here, host, look in looks:
        if "error" in look:
            found.warning(f"{here} cannot resolve {host}: {look['error']}", "add it to DNS, or to /etc/hosts there")
        elif host != here and any(address.startswith("127.") for address in look["addresses"]):
            figure = f"{host} is {', '.join(look['addresses'])} on {here}, which is {here} itself"
            found.warning(figure, "correct /etc/hosts there")
        elif "refused" in look:
            figure = f"{here} cannot connect to {host} ({look['addresses'][0]}): {look['refused']}"
            found.warning(figure, "open all ports between the hosts in their firewall")
    if looks and not found:
        slow, hosts = max(look["seconds"] for *_, look in looks), count(len(ranks_by_host(ranks)), "host")
        found.ok(f"{hosts}, each reached by name from each; slowest in {1e3 * slow:.3g} ms")
    return found


# Clocks -------------------------------------------------------------------------------------------------------------


def probe_clock(world: World) -> Facts:
    """On rank 0, {host: seconds that its clock is ahead of rank 0's, within half the time of a round trip}.

    As in NTP: the other host's time belongs to the middle of the quickest round trip.
    """
    found: Facts = {}
    for first in first_rank_of_hosts(world.hosts)[1:]:
        if world.rank not in (0, first):
            continue
        number = torch.zeros(1, dtype=torch.float64)
        trips: list[tuple[float, float]] = []
        for _ in range(CLOCK_PINGS):
            if world.rank == 0:
                asked = time.time()
                dist.send(number, first, group=world.control)
                dist.recv(number, first, group=world.control)
                back = time.time()
                trips.append((back - asked, number.item() - (asked + back) / 2))
            else:
                dist.recv(number, 0, group=world.control)
                number.fill_(time.time())
                dist.send(number, 0, group=world.control)
        if world.rank == 0:
            trip, ahead = min(trips)
            found[world.hosts[first]] = {"ahead": ahead, "trip": trip}
    return found


def judge_clocks(ranks: list[Facts]) -> Findings:
    """Whether the hosts agree on the time."""
    found, looks = Findings("clocks"), ranks[0]["clock"]
    for host, look in looks.items():
        if abs(look["ahead"]) > SKEW_SECONDS + look["trip"] / 2:
            side = "ahead of" if look["ahead"] > 0 else "behind"
            figure = f"{host} is {abs(look['ahead']):.3g} s {side} {ranks[0]['host']}"
            found.warning(figure, "start chrony or ntpd there: times in logs cannot be compared")
    if looks and not found:
        widest = max(abs(look["ahead"]) + look["trip"] / 2 for look in looks.values())
        found.ok(f"{count(len(looks) + 1, 'host')} within {1e3 * widest:.2g} ms")
    return found
