"""verify.json, and what `recipes.verify against=OTHER.json` says has changed since."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lockstep.errors import UserError
from lockstep.registry import choose, get_recipe
from lockstep.verify.archive import (
    SCHEMA,
    WRITTEN_BY,
    facts_of,
    read_archived,
    rows_of,
    statement_lines,
    write_text_report,
)
from lockstep.verify.changes import change_parts, changes_between
from lockstep.verify.proofs import proof_cases
from lockstep.verify.report import verify_tables
from lockstep.verify.rows import VerifyRow
from recipes import verify
from tests.helpers.command_line import assert_one_line, run_main
from tests.helpers.harness import compose_config

Record = dict[str, Any]
HOST = {
    "driver": "570.86",
    "cuda": "12.8",
    "nccl": "2.26.2",
    "cudnn": None,
    "python": "3.12.1",
    "packages": {"torch": "2.14.0"},
    "git_commit": None,
    "system": "Linux-6.1",
    "cpu": "EPYC",
    "cores": 8,
    "threads": 4,
    "memory_bytes": 2**34,
    "gpus": {"H100": 2},
}
TRAINING = {"model": "gpt", "data": "text", "global_batch_size": 28, "ranks": 4, "device": "cuda", "backend": "nccl"}


def row(recipe: str = "ddp", precision: str = "fp64", **more: Any) -> dict[str, Any]:
    figures = {"loss": 1e-16, "gradients": 2e-15, "weights": 3e-14, "buffers": 0.0, "evaluation": 1e-16}
    return asdict(VerifyRow(recipe, precision, 4, 5, **(figures | {"seconds": 2.0} | more)))


@pytest.fixture
def record() -> Record:
    rounded = row(precision="fp32", loss=1e-7, weights=1e-6, allowed={"loss": 1e-6, "weights": 2e-5})
    hosts = {"node1": copy.deepcopy(HOST), "node2": copy.deepcopy(HOST)}
    rows = [row(), rounded, row("fsdp"), row("deepspeed_zero", verdict="not run: precision=fp64: it has none")]
    return {
        "written_by": WRITTEN_BY,
        "schema": SCHEMA,
        "date": "2026-11-30T12:00:00Z",
        "seconds": 8.0,
        "training": dict(TRAINING),
        "hosts": hosts,
        "rows": rows,
    }


def test_nothing_has_changed_between_a_run_and_itself(record: Record) -> None:
    found = changes_between(record, record)
    assert (found.facts, found.rows) == ([], [])
    assert found.seconds[0] == ("ddp", "fp64", 2.0, 2.0)


def test_what_changed_of_the_machine_is_named_by_host_where_hosts_differ(record: Record) -> None:
    now = copy.deepcopy(record)
    now["hosts"]["node2"]["driver"] = "575.51"
    now["hosts"]["node3"] = now["hosts"]["node1"] | {"gpus": {"H200": 2}, "packages": {"torch": "2.15.0"}}
    assert changes_between(record, now).facts == [
        ("hosts", "2", "3"),
        ("driver", "570.86", "570.86 (2 hosts), 575.51 (1 host)"),
        ("gpus", "2 × H100", "2 × H100 (2 hosts), 2 × H200 (1 host)"),
        ("torch", "2.14.0", "2.14.0 (2 hosts), 2.15.0 (1 host)"),
    ]


ROWS: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], list[str]]] = {
    "a row is off now": (
        lambda rows: rows[0].update(verdict="OFF: loss"),
        ["was equal, is OFF: ddp in fp64: OFF: loss"],
    ),
    "a row can be run now": (
        lambda rows: rows[3].update(verdict="equal"),
        ["was not run, is equal: deepspeed_zero in fp64"],
    ),
    "a row is gone": (lambda rows: rows.pop(2), ["missing: fsdp in fp64, which was equal"]),
    "a row is new": (lambda rows: rows.append(row("lora")), ["new: lora in fp64: equal"]),
    "within what rounding explains": (lambda rows: rows[1].update(weights=5e-6), []),
    "in fp32 by more than rounding": (
        lambda rows: rows[1].update(weights=7e-6),
        ["grown: ddp in fp32: weights 1e-06, is 7e-06; rounding explains 5e-06 more"],
    ),
    "in fp64 by more than rounding": (
        lambda rows: rows[0].update(gradients=5e-12),
        ["grown: ddp in fp64: grads 2e-15, is 5e-12; rounding explains 1e-12 more"],
    ),
    "the same settings with other words": (
        lambda rows: rows[0].update(settings="model.norm=group"),
        ["new: ddp in fp64 (model.norm=group): equal", "missing: ddp in fp64, which was equal"],
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_what_changed_of_the_rows_is_named(case: str, record: Record) -> None:
    change, expected = ROWS[case]
    now = copy.deepcopy(record)
    change(now["rows"])
    assert changes_between(record, now).rows == expected


def test_the_differences_of_another_training_are_not_set_against_each_other(record: Record) -> None:
    now = copy.deepcopy(record)
    now["rows"][0]["gradients"], now["training"]["ranks"] = 5e-12, 8
    found = changes_between(record, now)
    assert (found.facts, found.rows) == ([("ranks", "4", "8")], [])


def test_the_report_says_which_train_correctly_and_how_time_changed(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    now = copy.deepcopy(record)
    now["rows"][2]["seconds"] = 5.0
    parts = change_parts(changes_between(record, now), "old.json", record["date"])
    write_text_report(tmp_path / "verify.txt", [*statement_lines(now), *verify_tables(rows_of(now)), *parts])
    said = (tmp_path / "verify.txt").read_text()
    for line in (
        "4 ranks on 2 hosts: node1, node2",
        "driver: 570.86",
        "in fp64, trains correctly here: ddp, fsdp",
        "in fp64, not run: deepspeed_zero",
        "in fp32, trains correctly here: ddp",
        "the machine, its versions and what is trained are the same",
    ):
        assert line in said
    assert [line.split() for line in said.splitlines() if line.endswith("2.50")] == [
        ["fsdp", "fp64", "2.0", "5.0", "2.50"]
    ]
    assert "[green]" not in said


def test_no_two_rows_of_a_run_have_one_name() -> None:
    """Else the next run would not know which is which."""
    recipes = [each for each in (get_recipe(name) for name in choose(None)) if each.proofs]
    cases = proof_cases(recipes, compose_config(verify.train, "global_batch_size=28"), "cuda")
    keys = [(case.recipe.name, case.precision, case.variant, case.words) for case in cases]
    assert len(set(keys)) == len(keys) > 90


# What is no verify.json -----------------------------------------------------------------------------------------------

FILES: dict[str, tuple[Callable[[Record], Any] | None, str]] = {
    "there is none": (None, "No such file or directory; allowed is the verify.json of an earlier run"),
    "no JSON": (lambda _: "{", "is not JSON; allowed is the verify.json of an earlier run"),
    "the list of 0.1.0": (lambda record: record["rows"], "is not the verify.json of a run of recipes.verify; name one"),
    "another tool's": (lambda _: {"status": "finished"}, "is not the verify.json of a run of recipes.verify; name one"),
    "another schema": (
        lambda record: record | {"schema": 7},
        "has schema 7; allowed is 1; run recipes.verify there once more",
    ),
    "no rows": (lambda record: record | {"rows": [1]}, "is damaged; name another verify.json"),
    "a number that is none": (
        lambda record: record | {"rows": [row(loss="x")]},
        "is damaged; name another verify.json",
    ),
    "no hosts": (lambda record: record | {"hosts": {"node1": 3}}, "is damaged; name another verify.json"),
}


@pytest.mark.parametrize("case", FILES)
def test_what_is_no_record_is_said_in_a_line(case: str, record: Record, tmp_path: Path) -> None:
    change, expected = FILES[case]
    file = tmp_path / "old.json"
    if change:
        content = change(record)
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as caught:
        read_archived(str(file))
    assert str(caught.value).startswith(f"against={file}: {expected}")
    assert "\n" not in str(caught.value)


def test_the_command_refuses_it_and_makes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_main(verify.train, ["against=none.json", "out=run"], monkeypatch) == 2
    assert_one_line(capfd, ["against=none.json: No such file or directory"])
    assert not (tmp_path / "run").exists()


def test_a_record_is_read_as_it_was_written(record: Record, tmp_path: Path) -> None:
    file = tmp_path / "old.json"
    file.write_text(json.dumps(record))
    found = read_archived(str(file))
    assert [asdict(each) for each in rows_of(found)] == record["rows"]
    assert facts_of(found)["torch"] == "2.14.0"
