"""The benchmarks' own machinery: the clock in a process that somebody else wrote, turns, ratios, the table."""

from __future__ import annotations

import json
import statistics
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from benchmarks import common, plan_tables

PROGRAM = """
import sys, time, torch
weight = torch.zeros(1, requires_grad=True)
optimizer = torch.optim.SGD([weight], lr=0.1)
for step in range(6):
    time.sleep(0.2 if step < 3 else 0.02)
    (weight * 1).backward()
    optimizer.step()
"""


@pytest.mark.slow
def test_the_clock_counts_any_programs_updates(tmp_path: Path) -> None:
    """Three steps of 200 ms are the warm-up, three of 20 ms count."""
    (tmp_path / "program.py").write_text(PROGRAM)
    ran = common.run([tmp_path / "program.py"], tmp_path, clock=(3, 3))
    assert 0.02 <= ran.step(statistics.median) < 0.15
    assert ran.step(statistics.median) <= ran.step() * 1.5
    assert 0 < ran.cpu_a_step < ran.cpu_seconds
    assert 0.2 < ran.first_step < ran.seconds - 2 * 0.2


STEPS_FOR_EVER = """
import subprocess, sys, time
if len(sys.argv) == 2:  # a launcher with a rank
    sys.exit(subprocess.call([sys.executable, __file__, sys.argv[1], "rank"]))
import torch
weight = torch.zeros(1, requires_grad=True)
optimizer = torch.optim.SGD([weight], lr=0.1)
for step in range(1_000_000 if sys.argv[1] != "early" else 5):
    time.sleep({"slow": 0.02, "fast": 0.005, "early": 0.005}[sys.argv[1]])
    (weight * 1).backward()
    optimizer.step()
"""


@pytest.mark.slow
def test_in_slices_one_command_runs_at_a_time_and_none_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their ranks' updates, told apart by process, lie in turns of their own."""
    program = tmp_path / "program.py"
    program.write_text(STEPS_FOR_EVER)
    seen: list[list[list[common.Tick]]] = []
    read = common.Live.stretches
    monkeypatch.setattr(common.Live, "stretches", lambda *args: seen.append(read(*args)) or seen[-1])
    commands = {name: common.Command([program, name]) for name in ("slow", "fast")}
    found = common.in_slices(commands, ranks=1, warm=3, slices=4, seconds=0.3)
    assert 40 < found["fast"].speed <= 200
    assert 10 < found["slow"].speed <= 50
    assert all(0 < share.cpu_a_step < 0.02 for share in found.values())
    turns = sorted((rank[0].moment, rank[-1].moment) for stretches in seen for (rank,) in stretches if rank)
    assert len(turns) > 4
    assert all(before[1] < after[0] for before, after in pairwise(turns))
    assert not [one for one in psutil.process_iter(["cmdline"]) if str(program) in (one.info["cmdline"] or [])]


@pytest.mark.slow
def test_in_slices_a_command_that_ends_is_told(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(STEPS_FOR_EVER)
    with pytest.raises(RuntimeError, match="ended before its last turn: give it more steps"):
        common.in_slices({"early": common.Command([program, "early"])}, ranks=1, warm=5, slices=10_000, seconds=0.2)


def test_a_program_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("print('on the way')\nraise ValueError('the cause')")
    with pytest.raises(RuntimeError, match=r"ended with 1:\non the way\n(.*\n)*ValueError: the cause$"):
        common.run([tmp_path / "program.py"])


def test_all_take_turns_and_each_begins_once() -> None:
    calls: list[tuple[int, str]] = []
    names = {name: lambda number, name=name: calls.append((number, name)) or len(calls) for name in "abc"}
    found = common.in_turn(names, rounds=2, warm=1)
    assert ["".join(name for number, name in calls if number == turn) for turn in range(3)] == ["abc", "bca", "cab"]
    assert found == {"a": [6, 8], "b": [4, 9], "c": [5, 7]}  # without the warm round


def test_a_row_is_judged_by_its_median(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ratios = common.ratios([3.0, 1.0, 2.0], [1.0, 1.0, 1.0])
    rows = [
        common.Row("fast / slow", ratios, 1.5, note="[1, 2]", command="python -m benchmarks.x"),
        common.Row("small / large", ratios, 1.5, at_most=True),
        common.Row("only known", ratios),
        common.Row("mine / theirs", [], 1.5, note="does not run: [rank0] why"),
    ]
    assert [row.met for row in rows] == [True, False, None, None]
    common.show(rows)
    shown = capsys.readouterr().out
    assert "2.00   1.00 to 3.00  ≥ 1.5   met      [1, 2]" in shown
    assert "≤ 1.5   not met" in shown
    assert "does not run: [rank0] why" in shown
    common.write(rows, tmp_path / "bench.json")
    assert common.read(tmp_path / "bench.json") == rows
    assert json.loads((tmp_path / "bench.json").read_text())[0]["median"] == 2


def test_a_page_has_the_tables_that_were_measured() -> None:
    row = {
        "label": "ddp",
        "bytes_predicted": {"all-reduce": 8},
        "bytes_measured": {"all-reduce": 8},
        "peak_measured": 4e7,
    }
    row |= {
        "memory_error": -0.001,
        "seconds_measured": 0.06,
        "time_error": 0.2,
        "work_measured": 0.05,
        "work_error": -0.07,
    }
    lines = plan_tables.check_lines(
        [row, row | {"bytes_measured": {}, "work_error": None, "work_measured": 0.0}], "2 ranks"
    )
    assert "| ddp | equal | 40 MB | −0.1 % | 60.0 ms | +20 % | 50.0 ms | −7 % |" in lines
    assert "| ddp | differ | 40 MB | −0.1 % | 60.0 ms | +20 % |  |  |" in lines
    assert lines[-1].endswith("in 2, the step by the clock within 15 % in 0, and the processor's time in it in 1.")
    assert plan_tables.verdict([row, row], "Of all").startswith("Of all 2 cells, bytes are equal in 2. The peak")
    page = plan_tables.put("a\n<!-- check -->\nold\n<!-- end of check -->\nb\n", "check", ["new"])
    assert page == "a\n<!-- check -->\n\nnew\n\n<!-- end of check -->\nb\n"
    assert plan_tables.put(page, "check", ["new"]) == page
    found = plan_tables.PAGE.read_text(encoding="utf-8")
    assert all(f"<!-- {name} -->" in found for name in ("check", "published")), "their places"


def test_a_table_says_what_was_trained_and_where(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("task: {name: language, size: tiny}\nglobal_batch_size: 8\n")
    machine = {"hosts": ["a", "a"], "cores": 2, "cpu": "a processor", "versions": {"torch": "2.15"}}
    (tmp_path / "environment.json").write_text(json.dumps(machine))
    (tmp_path / "check.json").write_text("[]")
    said = "`task=language task.size=tiny global_batch_size=8`, 2 ranks on 2 cores of a processor, torch 2.15, "
    assert plan_tables.about_run(tmp_path).startswith(said)
