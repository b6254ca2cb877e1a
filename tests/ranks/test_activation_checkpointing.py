"""Blocks that compute again what they did not keep: the same bits, less memory, no more traffic."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from lockstep.memory.predict import predict_memory
from lockstep.training import activation_checkpointing
from recipes import activation_checkpointing as technique
from recipes import ddp, single
from tests.helpers.harness import compose_config, execute, lines, result, run_ranks, train
from tests.helpers.traffic import count_traffic

pytestmark = pytest.mark.usefixtures("narrow")

SHORT = ("max_steps=3", "log_every=1", "threads=1", "memory=report", "eval_batch_size=360")
IMAGES = ("global_batch_size=24",)  # with BatchNorm, whose statistics a second forward must not touch
TOKENS = ("task=language", "task.dropout=0.1", "global_batch_size=12")  # dropout draws the same numbers twice
MODES = ("full", "selective", "2")
CASES: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "single": ("single", 1, IMAGES),
    "ddp": ("ddp", 2, TOKENS),
    "ddp in bf16": ("ddp", 2, (*TOKENS, "precision=bf16")),
    "ddp in fp16": ("ddp", 2, (*IMAGES, "precision=fp16", "loss_scale=256", "max_steps=1")),
    "ddp in micro-batches": ("ddp", 2, (*IMAGES, "accumulate=2", "gradients.clip_norm=0.5")),
    "sync_batchnorm": ("sync_batchnorm", 2, IMAGES),
    "fsdp": ("fsdp", 2, IMAGES),
    "fsdp in bf16": ("fsdp", 2, (*IMAGES, "precision=bf16")),
    "fsdp in copies": ("fsdp", 4, (*TOKENS, "replicate=2", "reshard_after_forward=false")),
    "parallel_mesh": ("parallel_mesh", 2, TOKENS),
    "1f1b": ("pipeline_parallel", 2, IMAGES),
    # Cut alike in each run: measured, the cut would move, and with it what each stage draws.
    "interleaved": ("pipeline_parallel", 2, (*TOKENS, "schedule=interleaved", "cut=even")),
    "zero bubble": ("pipeline_parallel", 2, (*TOKENS, "schedule=zero_bubble", "cut=even")),
    "model_parallel": ("model_parallel", 1, IMAGES),
    "transfer_learning": ("transfer_learning", 2, (*IMAGES, "weights=random", "freeze=[conv1.*,*bn*,layer2.*]")),
    "comm_hooks": ("comm_hooks", 2, (*TOKENS, "compress=bf16")),
    "lora": ("lora", 2, (*TOKENS, "weights=random")),
    "deepspeed_zero": ("deepspeed_zero", 2, (*TOKENS, "stage=3")),
    "lightning_fabric": ("lightning_fabric", 2, (*IMAGES, "accumulate=2", "sync_batchnorm=true")),
    "lightning_trainer": ("lightning_trainer", 2, (*IMAGES, "accumulate=2")),
}


@pytest.mark.slow_except("ddp")
@pytest.mark.soak_for(
    "parallel_mesh",
    "ddp in bf16",
    "deepspeed_zero",
    "fsdp in bf16",
    "fsdp in copies",
    "interleaved",
    "lightning_trainer",
    "lora",
)
@pytest.mark.parametrize("name", CASES)
def test_the_bits_are_those_of_keeping_everything(name: str, tmp_path: Path) -> None:
    """Weights, buffers and logs, evaluation included; and what is held for backward shrinks."""
    module, ranks, words = CASES[name]
    recipe = importlib.import_module(f"recipes.{module}").train
    expected = train(recipe, tmp_path / "none", ranks, *SHORT, *words)
    for mode in MODES:
        if (name, mode) == ("zero bubble", "selective"):
            continue  # is refused
        found = train(recipe, tmp_path / mode, ranks, *SHORT, *words, f"checkpoint_activations={mode}")
        assert lines(tmp_path / mode) == lines(tmp_path / "none")
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        # DeepSpeed's gathered weights are counted where they are kept; LoRA keeps what is added to each result as well.
        if mode != "selective" or name not in ("deepspeed_zero", "lora"):
            assert held(tmp_path / mode) < held(tmp_path / "none")


def held(out: Path) -> int:
    """Bytes kept for backward, over all ranks."""
    ranks = json.loads((out / "memory.json").read_text())["ranks"]
    return sum(rank["total"]["activations"] for rank in ranks)


def test_without_its_buffers_put_back_batch_norm_would_count_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mistake that the tests above are to see."""
    monkeypatch.setattr(activation_checkpointing, "buffers_of", lambda block: [])
    words = ("max_steps=2", "global_batch_size=24", "checkpoint_activations=full")
    weights = train(single.train, tmp_path / "run", 1, *words)
    assert weights["layer1.0.bn1.num_batches_tracked"] == 4
    assert weights["bn1.num_batches_tracked"] == 2, "the stem is no block"


@pytest.mark.slow
def test_a_block_keeps_its_input_and_every_second_one_keeps_all(tmp_path: Path) -> None:
    """i bytes a block, tokens × width in fp32, and none inside; what K leaves alone is as it was."""
    tokens, width = 12 * 64, 64
    layers = {}
    for mode in ("none", "full", "2"):
        execute(single.train, tmp_path / mode, 1, *SHORT, *TOKENS, "task.dropout=0", f"checkpoint_activations={mode}")
        report = json.loads((tmp_path / mode / "memory.json").read_text())["ranks"][0]
        layers[mode] = {layer["name"]: layer["activations"] for layer in report["layers"]}
    inside = {
        mode: sum(held for name, held in found.items() if name.startswith("blocks.1")) for mode, found in layers.items()
    }
    assert inside["full"] == layers["full"]["blocks.1"] == 4 * tokens * width
    assert inside["2"] == inside["full"] < inside["none"] / 10
    first = {name: held for name, held in layers["none"].items() if name.startswith("blocks.0.mlp")}
    assert first
    assert all(layers["2"][name] == held for name, held in first.items())


@pytest.mark.slow
def test_it_sends_what_ddp_sends(tmp_path: Path) -> None:
    """The gradients' bytes into the all-reduce of each step, and nothing else."""
    words = ("max_steps=3", "global_batch_size=12", "model.norm=group", "eval_every=0")
    mine = count_traffic(technique.train, tmp_path / "mine", 2, *words)
    theirs = count_traffic(ddp.train, tmp_path / "theirs", 2, *words)
    parameters = result(tmp_path / "mine")["parameters"]
    for *_, last in [*mine, *theirs]:  # in the first two DDP also agrees on its buckets
        assert last == {"allreduce_": 4 * parameters}


def test_the_prediction_knows_of_it() -> None:
    run_ranks(_predicted, 1)


def _predicted(world: object) -> None:
    found = {}
    for mode in ("none", "selective", "full"):
        config = compose_config(
            single.train, f"checkpoint_activations={mode}", "model.num_classes=10", "model.image_size=16"
        )
        found[mode] = predict_memory(config, 12, peak=False).sums()
    kept = [found[mode]["activations"] for mode in ("full", "selective", "none")]
    assert kept == sorted(kept)
    assert kept[0] < kept[2]
    assert (kept[0] < kept[1]) == bool(activation_checkpointing.SHOWN), (
        "an older torch does not show what `selective` keeps"
    )
    assert found["full"]["parameters"] == found["none"]["parameters"]


def test_the_recipe_says_what_it_saves(tmp_path: Path) -> None:
    execute(technique.train, tmp_path / "run", 2, "max_steps=2", "global_batch_size=12")
    found = result(tmp_path / "run")
    assert 0 < found["saved_bytes"] < found["saved_bytes_without"]
