"""torch's flight recorder: the collectives that this process has begun.

Source: https://docs.pytorch.org/tutorials/unstable/flight_recorder_tutorial.html
"""

from __future__ import annotations

import json
import time
from typing import Any


def recorded_collectives() -> list[dict[str, Any]]:
    """The collectives that this process has begun, the last one last. On gloo they are `retired` when they are over."""
    try:
        from torch._C._distributed_c10d import _dump_fr_trace_json

        return list(json.loads(_dump_fr_trace_json())["entries"])
    except (ImportError, RuntimeError, ValueError, KeyError):
        return []


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
