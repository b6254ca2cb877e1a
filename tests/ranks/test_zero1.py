"""ZeRO-1: the optimizer's state is divided among the ranks, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from recipes import ddp, fsdp, single, zero1
from tests.helpers.harness import assert_equal, execute, result, tensors_of, train
from tests.helpers.traffic import count_traffic

pytestmark = pytest.mark.usefixtures("narrow")

PROOF = ("data=synthetic", "data.size=48", "data.image_size=8", "global_batch_size=12", "epochs=3", "model.norm=group")
PROOF += ("precision=fp64", "log_every=1", "optim=adamw")
STEPS = 12


def test_the_state_is_dealt_out_and_the_bits_are_ddp_s(tmp_path: Path) -> None:
    """Two moments and a counter for each parameter, once over all ranks; on two ranks DDP's sums are the same bits."""
    words = (*PROOF, "max_steps=4")
    mine = train(zero1.train, tmp_path / "zero1", 2, *words)
    assert_equal(mine, train(ddp.train, tmp_path / "ddp", 2, *words))
    found, whole = result(tmp_path / "zero1"), result(tmp_path / "ddp")
    states = found["optimizer_bytes_by_rank"]
    weights = 8 * found["parameters"]
    assert sum(states) == pytest.approx(2 * weights, rel=0.01)
    assert max(states) < 0.55 * sum(states)
    assert found["state_bytes_unsharded"] == whole["state_bytes_by_rank"][0]
    assert found["state_bytes_by_rank"] == [2 * weights + state for state in states]


@pytest.mark.slow
def test_it_is_between_ddp_and_fsdp(tmp_path: Path) -> None:
    held = {}
    for recipe in (ddp.train, zero1.train, fsdp.train):
        execute(recipe, tmp_path / recipe.name, 2, *PROOF, "max_steps=1")
        held[recipe.name] = max(result(tmp_path / recipe.name)["state_bytes_by_rank"])
    weights = 8 * result(tmp_path / "ddp")["parameters"]
    assert held["ddp"] == pytest.approx(4 * weights, rel=0.01)
    assert held["zero1"] == pytest.approx(3 * weights, rel=0.03)
    assert held["fsdp"] == pytest.approx(2 * weights, rel=0.03)


def test_gradients_are_reduced_and_weights_broadcast(tmp_path: Path) -> None:
    """G into the all-reduce, and each weight into one broadcast, that of the rank that updated it."""
    ranks = count_traffic(zero1.train, tmp_path / "run", 2, *PROOF, "max_steps=3", "eval_every=0")
    size = 8 * result(tmp_path / "run")["parameters"]
    for *_, last in ranks:  # in the first two DDP also agrees on its buckets
        assert last == {"allreduce_": size, "broadcast_": size}


@pytest.mark.soak
def test_three_two_one_four_ranks_train_as_one(tmp_path: Path) -> None:
    """Each finds the states of its parameters in what others kept of others; the checkpoint holds every one of them."""
    words = (*PROOF, "checkpoint.every=1")
    whole = train(single.train, tmp_path / "whole", 1, *words)
    mine: dict[str, torch.Tensor] = {}
    for ranks, stop in ((3, 2), (2, 5), (1, 9), (4, STEPS)):
        mine = train(zero1.train, tmp_path / "parts", ranks, *words, f"max_steps={stop}")
    found: dict[str, Any] = result(tmp_path / "parts")
    assert (found["steps"], found["world_size"], found["resumed_from"]) == (STEPS, 4, "checkpoints/step-00000009")
    for name, tensor in whole.items():
        assert torch.allclose(mine[name], tensor, rtol=1e-8, atol=1e-10), name
    kept = [
        {name for name in tensors_of(tmp_path / run / "checkpoints" / "step-00000012") if name[:5] == "optim"}
        for run in ("parts", "whole")
    ]
    assert kept[0] == kept[1]


@pytest.mark.slow
def test_ddp_resumes_what_it_saved(tmp_path: Path) -> None:
    """The names are the whole model's, so another recipe can take it up."""
    train(zero1.train, tmp_path / "zero1", 2, *PROOF, "checkpoint.every=4", "max_steps=4")
    resumed = train(ddp.train, tmp_path / "ddp", 2, *PROOF, f"resume={tmp_path / 'zero1'}")
    whole = train(ddp.train, tmp_path / "whole", 2, *PROOF)
    assert_equal(resumed, whole)


@pytest.mark.slow
def test_muon_gets_whole_matrices(tmp_path: Path) -> None:
    """And a rank may have none of a kind of parameter."""
    words = (*PROOF, "optim=muon", "max_steps=3")
    assert_equal(train(zero1.train, tmp_path / "zero1", 2, *words), train(ddp.train, tmp_path / "ddp", 2, *words))
    train(zero1.train, tmp_path / "many", 4, *words)
