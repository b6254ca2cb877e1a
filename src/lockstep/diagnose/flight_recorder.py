"""torch's flight recorder: the collectives that this process has begun.

Source: https://docs.pytorch.org/tutorials/unstable/flight_recorder_tutorial.html
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

BACKENDS = ("gloo", "nccl", "nccl2", "nccl-lazy")  # each has a recorder of its own; torch's nccl is called nccl2 there


def recorded_collectives() -> list[dict[str, Any]]:
    """The collectives that this process has begun, on any backend, the last one last; `retired` when they are over."""
    found = {}
    for dump in _dumps():
        for entry in json.loads(dump).get("entries", []):
            numbers = entry["collective_seq_id"], entry["p2p_seq_id"], entry["time_created_ns"]
            found[group_name(entry), *numbers] = entry  # torch 2.11's two dumps may hold the same
    return sorted(found.values(), key=lambda entry: int(entry["time_created_ns"]))


def _dumps() -> Iterator[bytes]:
    """What each recorder holds, as JSON. Up to torch 2.14 NCCL's has a function of its own."""
    import torch._C._distributed_c10d as c10d

    one, of_nccl = getattr(c10d, "_dump_fr_trace_json", None), getattr(c10d, "_dump_nccl_trace_json", None)
    with contextlib.suppress(RuntimeError):
        try:
            yield from [one(backend=name) for name in BACKENDS] if one else []
        except TypeError:  # it knows gloo's alone
            yield from [dump() for dump in (one, of_nccl) if dump]


def has_overdue_collective(seconds: float) -> bool:
    """Whether a collective has been under way for so many seconds."""
    before = 1e9 * (time.time() - seconds)
    return any(not entry["retired"] and entry["time_created_ns"] < before for entry in recorded_collectives())


def group_name(entry: dict[str, Any]) -> str:
    return str(entry["process_group"][0])


def collective_summary(entry: dict[str, Any]) -> tuple[int, str, str]:
    """(its number within its group, its name, its sizes)."""
    number = entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]
    sizes = ", ".join(str(size) for size in entry["input_sizes"])
    return number, str(entry["profiling_name"]).partition(":")[2], sizes if len(sizes) < 100 else sizes[:97] + "..."
