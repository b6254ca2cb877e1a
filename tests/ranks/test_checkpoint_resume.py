"""The demonstration shows what it says: nothing forgotten, nothing differs; anything forgotten, something does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes import checkpoint_resume
from tests.helpers.harness import execute

pytestmark = pytest.mark.usefixtures("narrow")

SHORT = ("data=synthetic", "data.size=36", "data.image_size=8", "global_batch_size=12", "max_steps=8")


@pytest.mark.slow_except("optimizer", "null-2")
@pytest.mark.parametrize(
    ("forget", "ranks"),
    [("null", 2), ("null", 3), *((part, 2) for part in ("optimizer", "schedule", "step", "random")), ("buckets", 3)],
)
def test_only_what_is_forgotten_makes_a_difference(forget: str, ranks: int, tmp_path: Path) -> None:
    execute(checkpoint_resume.train, tmp_path / "run", ranks, *SHORT, f"forget={forget}")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["identical"] == (forget == "null"), result["differing"]
    assert bool(result["differing"]) == (forget != "null")
