"""Promise 1: any number of ranks computes the training that one process computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes import ddp, single
from tests.helpers.harness import train

pytestmark = pytest.mark.usefixtures("narrow")

PROOF = (
    "precision=fp64",
    "model.norm=group",
    "global_batch_size=24",
    "max_steps=20",
    "log_every=1",
    "optim.warmup_steps=0",
)


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("single") / "run"
    train(single.train, out, 1, *PROOF)
    return out


@pytest.mark.slow_except("3")
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ddp_has_the_loss_curve_of_one_process(world_size: int, reference: Path, tmp_path: Path) -> None:
    train(ddp.train, tmp_path / "run", world_size, *PROOF)
    ours, theirs = losses(tmp_path / "run"), losses(reference)
    assert len(ours) == len(theirs) == 20
    assert max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True)) <= 1e-10


@pytest.mark.slow
def test_evaluation_is_the_same_to_the_last_bit_on_any_number_of_ranks(tmp_path: Path) -> None:
    """Trained weights may differ in their last bits, so the models must not train: lr=0."""
    found = []
    for world_size in (1, 2, 3, 4):
        out = tmp_path / str(world_size)
        train(
            ddp.train,
            out,
            world_size,
            "global_batch_size=48",
            "max_steps=1",
            "optim.lr=0",
            "eval_batch_size=7",
            "model.norm=group",
        )
        result = json.loads((out / "result.json").read_text())
        found.append((result["eval_loss"], result["eval_accuracy"], result["eval_f1"]))
    assert len(set(found)) == 1
