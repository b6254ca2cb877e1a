"""What recipes.verify says of a machine: verify.json, which a later run of it is held to by against=, and verify.txt."""

from __future__ import annotations

import io
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lockstep.config.schema import Config
from lockstep.diagnose.probes.machine import probe_device
from lockstep.diagnose.probes.versions import probe_versions
from lockstep.distributed.collectives import gather_objects
from lockstep.distributed.process_group import World
from lockstep.errors import UserError
from lockstep.utils.files import write_atomically
from lockstep.utils.system import cpu_name
from lockstep.utils.tables import terminal_width
from lockstep.utils.text import count
from lockstep.verify.rows import COMPARED, VerifyRow

RECORD = "verify.json"
SCHEMA = 1
WRITTEN_BY = "lockstep recipes.verify"


def gather_hosts(world: World) -> dict[str, dict[str, Any]]:
    """What each host is and has, by its name, on every rank; `gpus`: those that its ranks use, each kind with its number."""
    device, versions = probe_device(world), probe_versions()
    mine = {
        "driver": device.get("driver"),
        "cuda": versions["cuda"],
        "nccl": versions["nccl"],
        "cudnn": torch.backends.cudnn.version() if world.device.type == "cuda" else None,
        "python": versions["python"],
        "packages": versions["packages"],
        "git_commit": versions["git_commit"],
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": world.threads,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    found = gather_objects((world.hosts[world.rank], device["name"], mine))
    hosts = {host: dict(facts) for host, _, facts in reversed(found)}  # the first rank of a host speaks for it
    for host, facts in hosts.items():
        gpus = [name for where, name, _ in found if where == host and world.device.type == "cuda"]
        facts["gpus"] = dict(Counter(gpus))
    return {host: hosts[host] for host in sorted(hosts)}


def verify_record(
    rows: Sequence[VerifyRow], hosts: dict[str, dict[str, Any]], world: World, config: Config, trained: tuple[str, str]
) -> dict[str, Any]:
    """verify.json without what has changed.

    Args:
        hosts: see `gather_hosts`.
        trained: the model and the data in words.
    """
    return {
        "written_by": WRITTEN_BY,
        "schema": SCHEMA,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(sum(row.seconds for row in rows), 3),
        "training": {
            "model": trained[0],
            "data": trained[1],
            "global_batch_size": config.global_batch_size,
            "ranks": world.world_size,
            "device": world.device.type,
            "backend": world.backend,
        },
        "hosts": hosts,
        "rows": [asdict(row) for row in rows],
    }


def rows_of(record: dict[str, Any]) -> list[VerifyRow]:
    """A record's rows, without where they part; raises TypeError, KeyError where they are none."""
    known = {entry.name for entry in fields(VerifyRow)} - {"parting"}
    rows = [VerifyRow(**{name: value for name, value in row.items() if name in known}) for row in record["rows"]]
    for row in rows:
        if not all(isinstance(getattr(row, name), int | float | None) for name in (*COMPARED, "seconds")):
            raise TypeError(row.label)
    return rows


def is_record(asked: str | None) -> bool:
    """Whether the key `against` names a file of an earlier run of verify, by its ending."""
    return asked is not None and asked.endswith(".json")


def read_archived(file: str) -> dict[str, Any]:
    """An earlier run's verify.json.

    Raises:
        UserError: there is none, it is something else, or of another schema.
    """
    path = Path(file).expanduser()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"against={file}: {error.strerror or error}; allowed is the {RECORD} of an earlier run"
        ) from None
    except ValueError:
        raise UserError(f"against={file}: is not JSON; allowed is the {RECORD} of an earlier run") from None
    if not isinstance(found, dict) or found.get("written_by") != WRITTEN_BY:
        raise UserError(f"against={file}: is not the {RECORD} of a run of recipes.verify; name one")
    if found.get("schema") != SCHEMA:
        raise UserError(
            f"against={file}: has schema {found.get('schema')}; allowed is {SCHEMA}; run recipes.verify there once more"
        )
    try:
        rows_of(found)
        facts_of(found)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"against={file}: is damaged; name another {RECORD}, or run recipes.verify once more") from None
    return found


def facts_of(record: dict[str, Any]) -> dict[str, str]:
    """What may change between two runs, each in words: `driver` → `570.1 (3 hosts), 575.2 (1 host)`."""
    training, hosts = record["training"], record["hosts"]
    found = {name: str(value) for name, value in training.items()} | {"hosts": str(len(hosts))}
    by_host = [flattened(facts) for facts in hosts.values()]
    for name in dict.fromkeys(name for facts in by_host for name in facts):
        values = Counter(facts.get(name) or "none" for facts in by_host)
        one = len(values) == 1
        found[name] = ", ".join(
            value if one else f"{value} ({count(times, 'host')})" for value, times in sorted(values.items())
        )
    return found


def flattened(facts: dict[str, Any]) -> dict[str, str]:
    """One host's facts in words, its packages among them."""
    plain = {name: value for name, value in facts.items() if name not in ("packages", "gpus", "memory_bytes")}
    plain |= {
        "gpus": ", ".join(f"{number} × {name}" for name, number in sorted(facts["gpus"].items())) or None,
        "memory": f"{facts['memory_bytes'] / 2**30:.0f} GiB",
        **facts["packages"],
    }
    return {name: str(value) for name, value in plain.items() if value is not None}


def statement_lines(record: dict[str, Any]) -> list[str]:
    """What the run says of the machine: where, when, with what; and which recipes train correctly, by precision."""
    facts, rows = facts_of(record), rows_of(record)
    training = record["training"]
    lines = [
        f"recipes.verify, {record['date']}: {training['model']} on {training['data']}, {record['seconds']:.0f} s",
        f"{count(training['ranks'], 'rank')} on {count(len(record['hosts']), 'host')}: {', '.join(record['hosts'])}",
    ]
    lines += [f"{name}: {value}" for name, value in facts.items() if name not in (*training, "hosts")]
    for precision in dict.fromkeys(row.precision for row in rows):
        own = [row for row in rows if row.precision == precision]
        for word, said in (("equal", "trains correctly here"), ("OFF", "OFF"), ("not run", "not run")):
            names = dict.fromkeys(row.label for row in own if row.verdict.partition(":")[0] == word)
            if names:
                lines.append(f"in {precision}, {said}: {', '.join(names)}")
    return lines


def write_text_report(path: Path, parts: Sequence[str | Table]) -> None:
    """Lines and tables into a text file, as the terminal shows them."""
    text = io.StringIO()
    console = Console(file=text, width=terminal_width(), highlight=False, color_system=None)
    for part in parts:
        if isinstance(part, str):
            console.print(part, markup=False, soft_wrap=True)
        else:
            console.print(part)
    write_atomically(path, text.getvalue())
