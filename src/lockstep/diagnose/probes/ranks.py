"""Ranks and hosts, as probes and judges speak of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lockstep.diagnose.findings import Facts
from lockstep.utils.text import count, some_of


def value_or_error(probe: Callable[[], Any]) -> Any:
    """What a probe finds, or its error as {"error": text}: one rank's trouble must not keep the others waiting."""
    try:
        return probe()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def first_rank_of_hosts(hosts: list[str]) -> list[int]:
    """The first rank of each host."""
    return sorted({host: rank for rank, host in reversed(list(enumerate(hosts)))}.values())


def rank_and_host(rank: Facts) -> str:
    return f"rank {rank['rank']} ({rank['host']})"


def ranks_by_host(ranks: list[Facts]) -> dict[str, list[Facts]]:
    """{host: its ranks}, in order of ranks."""
    found: dict[str, list[Facts]] = {}
    for each in ranks:
        found.setdefault(each["host"], []).append(each)
    return found


def differences(ranks: list[Facts], section: str, name: str, missing: str | None = None) -> str:
    """`2.15.0 on node1, node2; 2.14.0 on node3` where not all ranks have the same value; else nothing."""
    hosts: dict[str, dict[str, None]] = {}
    for each in ranks:
        hosts.setdefault(str(each[section].get(name, missing)), {})[each["host"]] = None
    if len(hosts) < 2:
        return ""
    return some_of([f"{value} on {some_of(list(some))}" for value, some in hosts.items()], between="; ")


def on_all(ranks: list[Facts]) -> str:
    return f"on {count(len(ranks), 'rank')} of {count(len(ranks_by_host(ranks)), 'host')}"
