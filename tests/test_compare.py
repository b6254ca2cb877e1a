"""`recipes.compare` runs recipes as they are and sets their figures side by side."""

from __future__ import annotations

import json
from pathlib import Path

from tests.harness import command


def test_compare_reports_what_each_run_reported(tmp_path: Path) -> None:
    words = ["recipes=[data_parallel,model_parallel]", "max_steps=2", "batch_size=24", "out=run"]
    done = command("-m", "recipes.compare", *words, cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "run" / "compare.json").read_text())
    assert [row["recipe"] for row in rows] == ["data_parallel", "model_parallel"]
    for row in rows:
        run = json.loads((tmp_path / "run" / f"{row['recipe']}-0" / "result.json").read_text())
        assert run["steps"] == 2, "the runs got this config"
        assert row["slowest"] == row["fastest"] == run["images_per_second"]
        assert row["start_seconds"] > run["setup_seconds"] > 0
        assert row["state_bytes"] == 12 * run["parameters"], "weights, gradients and momentum in fp32"
    assert 0 < rows[0]["threads_busy"] <= 2.5
    assert len(rows[1]["idle_shares"]) == 2
    assert "data_parallel" in done.stdout


def test_a_recipe_that_fails_is_named(tmp_path: Path) -> None:
    done = command("-m", "recipes.compare", "recipes=[ddp]", "batch_size=33", "out=run", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert "recipes.ddp failed: error: batch_size=33: the global batch must divide by 2 ranks" in done.stderr
