"""DeepSpeed: every ZeRO stage trains what DDP does, saves what it can go on from, and holds only its part."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lockstep.proof import difference
from recipes import ddp, deepspeed_zero
from tests.harness import train

pytestmark = pytest.mark.usefixtures("narrow", "loaded")

DATA = ("data=synthetic", "data.size=48", "data.image_size=8", "batch_size=12", "epochs=2", "model.norm=group")
SHORT = (*DATA, "log_every=1", "optim.warmup_steps=2", "checkpoint.every=3")


@pytest.fixture(scope="module")
def loaded() -> None:
    """Forked ranks inherit it."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401


def result(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "result.json").read_text()))


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def bitwise(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What DDP makes of it, with an optimizer."""
    done: dict[str, Any] = {}

    def of(*words: str) -> tuple[dict[str, Tensor], list[float]]:
        key = " ".join(words)
        if key not in done:
            out = tmp_path_factory.mktemp("ddp") / "run"
            done[key] = train(ddp.train, out, 2, *SHORT, *words), losses(out)
        return done[key]

    return of


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_trains_what_ddp_does(stage: int, optim: str, reference: Any, tmp_path: Path) -> None:
    found = train(deepspeed_zero.train, tmp_path / "run", 2, *SHORT, f"optim={optim}", f"zero.stage={stage}")
    weights, curve = reference(f"optim={optim}")
    assert losses(tmp_path / "run") == pytest.approx(curve, rel=1e-5)
    assert difference(found, weights) < 1e-4
    print(stage, optim, difference(found, weights), {k: v for k, v in result(tmp_path / "run").items() if "bytes" in k})


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_run_in_parts_is_the_run_in_one(stage: int, tmp_path: Path) -> None:
    words = (*SHORT, f"zero.stage={stage}", "optim=adamw")
    whole = train(deepspeed_zero.train, tmp_path / "whole", 2, *words)
    for stop in (3, 5, 8):
        parts = train(deepspeed_zero.train, tmp_path / "parts", 2, *words, f"max_steps={stop}")
    assert result(tmp_path / "parts")["resumed_from"] == "checkpoints/step-00000005"
    assert bitwise(parts, whole)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_other_ranks_go_on(stage: int, optim: str, tmp_path: Path) -> None:
    words = (*SHORT, f"zero.stage={stage}", f"optim={optim}")
    whole = train(deepspeed_zero.train, tmp_path / "whole", 2, *words)
    for ranks, stop in ((2, 3), (3, 5), (1, 6), (2, 8)):
        parts = train(deepspeed_zero.train, tmp_path / "parts", ranks, *words, f"max_steps={stop}")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert difference(parts, whole) < 1e-4
