"""`recipes.compare RUN_A RUN_B`: finished runs side by side, from their records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lockstep.config.schema import to_yaml
from lockstep.recipe import Recipe
from recipes import compare, ddp, fsdp
from tests.helpers.command_line import assert_one_line, run_main
from tests.helpers.harness import compose_config

RESULT = {"status": "finished", "world_size": 2, "device": "cpu", "steps": 30, "train_loss": 0.2, "eval_loss": 0.25}
RESULT |= {"eval_accuracy": 0.975, "eval_f1": 0.9, "samples_per_second": 100.0, "step_seconds_p50": 0.0416}
RESULT |= {"peak_memory_bytes": 800 * 2**20, "wall_seconds": 61.26, "resumed_from": None}


def leave(out: Path, recipe: Recipe, *words: str, **result: object) -> str:
    """What a run that has ended leaves in its folder."""
    out.mkdir(parents=True)
    (out / "config.yaml").write_text(f"# recipe: {recipe.name}\n{to_yaml(compose_config(recipe, *words))}")
    (out / "result.json").write_text(json.dumps(RESULT | result))
    return str(out)


def rows(said: str) -> list[list[str]]:
    return [line.split() for line in said.splitlines()]


def test_settings_result_and_cost_are_side_by_side_in_80_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    a = leave(tmp_path / "a", ddp.train, "optim.lr=0.1", "out=here", "checkpoint.every=3", "nproc=2")
    b = leave(
        tmp_path / "b",
        fsdp.train,
        "optim=adamw",
        "optim.lr=0.1",
        samples_per_second=150.0,
        resumed_from="x",
        eval_loss=0.125,
    )
    assert run_main(compare.train, [a, b], monkeypatch) == 0
    said = capfd.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    found = rows(said)
    assert ["1", "ddp", "optim.name=sgd", "0.25", "97.50%"] in found, "of what adamw brings with it nothing is said"
    assert ["2", "fsdp", "optim.name=adamw", "0.125", "97.50%"] in found
    assert ["1", "2", "×", "cpu", "100", "1.00", "41.6", "800", "30", "61.3"] in found
    assert ["2", "2", "×", "cpu", "150", "1.50", "41.6", "800", "30", "61.3+"] in found
    assert "+ it was resumed" in said


def test_runs_that_are_alike_and_many_of_them_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ("data=synthetic", "data.size=96", "model.norm=group", "optim.arguments.dampening=0.25", "seed=12345")
    runs = [leave(tmp_path / f"{number}-{'long' * 30}", ddp.train, *words) for number in range(3)]
    runs.append(leave(tmp_path / "other", ddp.train, eval_accuracy=None, samples_per_second=None))
    assert run_main(compare.train, runs, monkeypatch) == 0
    said = capfd.readouterr().out
    assert max(len(line) for line in said.splitlines() if "/" not in line) <= 80
    assert "data.size" not in said, "data.name says it"
    assert run_main(compare.train, runs[:2], monkeypatch) == 0
    assert "settings" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["good"], ["runs=[good]", "two or more"]),
        (["good", "nowhere"], ["nowhere: no such folder"]),
        (["ddp", "fsdp"], ["ddp: no such folder", "recipes=[ddp,"]),
        (["good", "empty"], ["empty: holds no run"]),
        (["good", "broken"], ["broken: holds no run"]),
        (["good", "stopped"], ["stopped: has not finished (preempted)", "out=stopped"]),
        (["good", "killed"], ["killed: has not finished (it left no result.json)"]),
        (["good", "tool"], ["tool: is a tool's"]),
        (["good", "good", "sed=1"], ["unknown key sed"]),
    ],
)
def test_what_is_no_finished_run_is_refused_in_a_line(
    words: list[str],
    parts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    leave(tmp_path / "good", ddp.train)
    leave(tmp_path / "stopped", ddp.train, status="preempted")
    leave(tmp_path / "killed", ddp.train)
    leave(tmp_path / "broken", ddp.train)
    leave(tmp_path / "tool", compare.train)
    (tmp_path / "empty").mkdir()
    (tmp_path / "killed" / "result.json").unlink()
    (tmp_path / "broken" / "config.yaml").write_text("a: [")
    (tmp_path / "tool" / "result.json").write_text('{"status": "finished"}')
    before = sorted(tmp_path.rglob("*"))
    assert run_main(compare.train, words, monkeypatch) == 2
    assert_one_line(capfd, parts)
    assert sorted(tmp_path.rglob("*")) == before
