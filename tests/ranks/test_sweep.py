"""A sweep's closing table: a row per point, with what is its own, its result or its error, and its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lockstep.launch.run_records import RunRecord, apart, read_record, settings_of, show_sweep
from recipes import ddp
from tests.helpers.harness import command, compose_config

WORDS = ("data=synthetic", "data.size=24", "data.image_size=8", "global_batch_size=12", "epochs=1")


def rows_of(said: str) -> list[str]:
    """The lines of the table that a command ends with."""
    table = said[said.rindex(" runs in ") :].splitlines()[3:]
    return [line.rstrip() for line in table if line.strip()]


def test_a_sweep_ends_with_a_table_in_which_a_failed_point_has_its_error(tmp_path: Path) -> None:
    """The other points are trained all the same, and the exit code is not 0."""
    words = ("-m", "optim.lr=1e30,0.02", "optim.warmup_steps=0", "out=sweep", *WORDS)
    done = command("-m", "tests.helpers.quick", "recipes.single", *words, cwd=tmp_path)
    assert done.returncode == 1
    rows = rows_of(done.stdout)
    assert max(map(len, rows)) <= 80
    result = json.loads((tmp_path / "sweep" / "1" / "result.json").read_text())
    assert rows[0].split()[:4] == ["0", "optim.lr=1e+30", "failed:", "rank"]
    assert "is not finite" in " ".join(" ".join(rows).split())
    last = f"{result['eval_loss']:.4g} {result['eval_accuracy']:.2%} finished"
    assert " ".join(rows[-1].split()) == f"1 optim.lr=0.02 {last}"
    assert "2 runs in sweep\n" in "".join(line.rstrip() + "\n" for line in done.stdout.splitlines())


def test_many_settings_and_long_errors_stay_within_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = [compose_config(ddp.train, f"optim.lr={lr}", f"seed={seed}") for lr in (0.1, 0.25) for seed in (1, 12345)]
    labels = apart([settings_of(config) for config in every])
    assert labels[1] == "optim.lr=0.1 seed=12345"
    good = {"status": "finished", "eval_loss": 0.123456, "eval_accuracy": 0.98, "eval_f1": 0.9}
    records = [RunRecord(tmp_path / str(number), good) for number in range(3)]
    (tmp_path / "3").mkdir()
    records.append(read_record(tmp_path / "3", "a/very/long/path" * 8 + " [no markup] of a mistake"))
    show_sweep(labels, records, "eval_accuracy")
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert "98.00%" in said
    assert "0.1235" in said
    assert "F1" not in said
    assert "[no markup]" in said
    assert "failed:" in said
    show_sweep(
        labels[:1],
        [RunRecord(tmp_path / "0", {"status": "finished", "train_loss": 1.5, "eval_loss": None})],
        "eval_loss",
    )
    said = capsys.readouterr().out
    assert "train loss" in said
    assert "1.5" in said
    assert "end" not in said
