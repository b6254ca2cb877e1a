"""Many ranks: what one asks of the store does not grow with their number, and its connections hardly do."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lockstep.distributed import process_group
from lockstep.distributed.collectives import gather_objects
from lockstep.distributed.process_group import World
from tests.helpers.harness import ROOT, run_ranks

PROGRAM = """
import json
from dataclasses import asdict
from lockstep.distributed import rendezvous
from benchmarks.scale import measure
rendezvous.LOOK_SECONDS = 3600  # a machine that stands still is to add no questions of those who wait
print(json.dumps([asdict(measure(size, 0.5)) for size in (16, 64)]))
"""


@pytest.mark.slow
def test_four_times_the_ranks_ask_the_store_as_often() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    few, many = json.loads(done.stdout)
    assert (few["ranks"], many["ranks"]) == (16, 64)
    assert few["operations"] == many["operations"] < 15
    assert few["operations_0"] == many["operations_0"] < 25
    for found in (few, many):
        assert found["bytes_sent"] < 300 * found["ranks"], "a host's name is sent once"
        assert found["verdict"].startswith(f"rank {found['ranks'] - 1} (node"), "who hangs is named"
        assert "does not answer" in found["verdict"]
        assert len(found["verdict"].splitlines()) == 5


def connections(world: World) -> int:
    """Sockets that a rank has once all have agreed on something."""
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == world.world_size
    assert gather_objects(world.rank, world.control) == list(range(world.world_size))
    return sum(os.readlink(each).startswith("socket:") for each in Path("/proc/self/fd").iterdir() if each.is_symlink())


def test_many_ranks_connect_to_those_they_talk_to(monkeypatch: pytest.MonkeyPatch) -> None:
    few = run_ranks(connections, 12)
    monkeypatch.setattr(process_group, "FULL_MESH_RANKS", 4)
    many = run_ranks(connections, 12)
    assert min(few) >= 11, "each is connected to all"
    assert statistics.median(many) < 0.8 * statistics.median(few), (many, few)
