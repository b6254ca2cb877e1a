"""The benchmark of many ranks, in small: what a rank asks of the store does not grow with their number."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.helpers.harness import ROOT

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
