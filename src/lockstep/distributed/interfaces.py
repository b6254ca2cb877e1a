"""This host's network interfaces, asked from the kernel."""

from __future__ import annotations

import fcntl
import os
import socket
import struct


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
