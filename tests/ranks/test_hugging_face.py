"""A GPT goes to transformers and comes back: the same logits there, the same bits here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lockstep.errors import UserError
from lockstep.integrations.hugging_face import export_llama, import_llama, llama_config, our_name
from lockstep.models.gpt import GPT, gpt_config
from recipes import ddp
from tests.helpers.harness import assert_equal, command, train

WORDS = ("task=language", "max_steps=3", "eval_every=0", "task.samples=0", "precision=fp64", "task.kv_heads=1")


@pytest.mark.slow
def test_transformers_compute_the_same_logits_and_the_weights_come_back(tmp_path: Path) -> None:
    weights = train(ddp.train, tmp_path / "run", 2, *WORDS)
    done = command("-m", "lockstep", "export", "run", "llama", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "LlamaForCausalLM.from_pretrained('llama')" in done.stdout

    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float64)
    ours = GPT(replace(gpt_config("nano", weights["embedding.weight"].shape[0]), kv_heads=1)).double()
    ours.load_state_dict(weights)
    tokens = torch.randint(0, 18, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (theirs(tokens).logits - ours(tokens)).abs().max() < 1e-5  # their norms and angles are in fp32

    theirs.save_pretrained(tmp_path / "saved", max_shard_size="500KB")  # in several files
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    done = command("-m", "lockstep", "import", "saved", "back.pt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resume=back.pt task=language task.size=nano task.kv_heads=1" in done.stdout
    assert_equal(torch.load(tmp_path / "back.pt", weights_only=True), weights)
    resumed = train(ddp.train, tmp_path / "on", 2, *WORDS, f"resume={tmp_path / 'back.pt'}", "optim.lr=0")
    assert_equal(resumed, weights)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_type": "mistral"}, "model_type is mistral; task=language is a Llama with model_type llama"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "its rotary positions are scaled"),
        ({"hidden_size": 65}, "layers, width, heads, hidden are"),
        ({"rope_theta": 500000.0, "rope_parameters": None}, "all with rope_theta 10000"),
    ],
)
def test_another_model_is_refused(changed: dict[str, object], said: str, tmp_path: Path) -> None:
    config = llama_config(gpt_config("nano", 18), 64, torch.float32) | changed
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        import_llama(tmp_path, tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_what_cannot_be_exported_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="is no run's folder"):
        export_llama(tmp_path / "run", tmp_path / "out")
    (tmp_path / "run" / "config.yaml").write_text("task:\n  name: images\n")
    with pytest.raises(UserError, match="trained task=images"):
        export_llama(tmp_path / "run", tmp_path / "out")
    (tmp_path / "run" / "config.yaml").write_text("task:\n  name: language\n")
    with pytest.raises(UserError, match=r"model.pt: no such file; files of weights there: none"):
        export_llama(tmp_path / "run", tmp_path / "out")
    with pytest.raises(UserError, match="no tensor of a plain Llama"):
        our_name("model.layers.0.self_attn.q_norm.weight")
    assert not (tmp_path / "out").exists()
