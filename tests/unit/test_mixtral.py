"""A GPT with experts goes to transformers' Mixtral and comes back: the same logits there, the same bits here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep.errors import UserError
from lockstep.integrations.hugging_face import export_llama, import_llama, llama_config
from lockstep.models.gpt import GPT, gpt_config
from tests.helpers.harness import assert_equal

SHAPE = replace(gpt_config("nano", 18), experts=4, experts_per_token=2)
TASK = "task: {name: language, size: nano, kv_heads: null, sequence_length: null, data: digits, tokenizer: null, "


def run_of(folder: Path, model: GPT, experts: int = 4, per_token: int = 2) -> Path:
    """What a finished run leaves of a model."""
    folder.mkdir()
    torch.save(model.state_dict(), folder / "model.pt")
    (folder / "config.yaml").write_text(f"{TASK}experts: {experts}, experts_per_token: {per_token}}}\n")
    return folder


def test_transformers_compute_the_same_logits_and_the_weights_come_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = GPT(SHAPE).double().eval()
    said = export_llama(run_of(tmp_path / "run", ours), tmp_path / "mixtral")
    assert f"MixtralForCausalLM.from_pretrained('{tmp_path / 'mixtral'}')" in said

    from transformers import MixtralForCausalLM

    plain: dict[str, Any] = {"experts_implementation": "eager"}  # its grouped product has no fp64
    theirs = MixtralForCausalLM.from_pretrained(tmp_path / "mixtral", dtype=torch.float64, **plain)
    tokens = torch.randint(0, 18, (3, 40))
    with torch.no_grad():
        assert (theirs(tokens).logits - ours(tokens)).abs().max() < 1e-5  # their router, norms and angles are in fp32

    theirs.save_pretrained(tmp_path / "saved", max_shard_size="500KB")  # in several files
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    words = import_llama(tmp_path / "saved", tmp_path / "back.pt")
    assert words.endswith("task.size=nano task.kv_heads=2 task.experts=4 task.experts_per_token=2")
    assert_equal(torch.load(tmp_path / "back.pt", weights_only=True), dict(ours.state_dict()))


def test_what_a_mixtral_would_compute_otherwise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task\.experts_per_token=1, whose output is weighed by the router"):
        export_llama(run_of(tmp_path / "run", GPT(SHAPE), per_token=1), tmp_path / "out")
    biased = GPT(SHAPE)
    for block in biased.blocks:
        block.mlp.balance_by_bias()  # type: ignore[union-attr,operator]
    with pytest.raises(UserError, match="trained balance=bias; a Mixtral's router has no biases"):
        export_llama(run_of(tmp_path / "biased", biased), tmp_path / "out")
    config = llama_config(SHAPE, 64, torch.float32)
    for changed, said in (
        ({"num_experts_per_tok": 1}, "num_experts_per_tok is 1"),
        ({"sliding_window": 8}, "a Mixtral with"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(UserError, match=said):
            import_llama(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
