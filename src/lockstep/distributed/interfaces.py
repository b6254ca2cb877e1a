"""This host's network interfaces, asked from the kernel."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Mapping

from lockstep.errors import UserError


def check_interfaces(env: Mapping[str, str], nccl: bool) -> None:
    """Hold the variables that name network interfaces to those this host has. Gloo would fail in each rank with a page,
    NCCL after it has waited.

    Args:
        nccl: whether NCCL carries the tensors; gloo carries what the CPUs agree on in any case.

    Raises:
        UserError: one of them names none.

    Source: https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html (prefixes, `=` for whole names, `^` for all
    others); torch/csrc/distributed/c10d/ProcessGroupGloo.cpp (whole names).
    """
    here = [name for _, name in socket.if_nameindex()]
    wanted = {"GLOO_SOCKET_IFNAME": env.get("GLOO_SOCKET_IFNAME", "")}
    if nccl:
        wanted["NCCL_SOCKET_IFNAME"] = env.get("NCCL_SOCKET_IFNAME", "")
    for variable, value in wanted.items():
        if not value or (nccl and value.startswith("^") and variable.startswith("NCCL")):
            continue
        names = [name.partition(":")[0] for name in value.lstrip("=").split(",")]  # eth0:1 is a second address of eth0
        if variable.startswith("GLOO"):
            missing = [name for name in names if name not in here]
        else:
            exact = value.startswith("=")
            there = any(each == name or (not exact and each.startswith(name)) for name in names for each in here)
            missing = [] if there else names
        if missing:
            raise UserError(
                f"{variable}={value}: this host has no interface {missing[0]}; allowed are {', '.join(here)}, or unset it"
            )


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
