"""`task=language` behind recipes: each way of cutting the work trains the GPT that one process trains."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from lockstep.recipe import Recipe
from recipes import ddp, fsdp, pipeline_parallel, single
from tests.helpers.harness import command, result, train

WORDS = ["task=language", "precision=fp64", "optim=adamw", "global_batch_size=24", "max_steps=3", "log_every=1"]


@pytest.fixture(scope="module")
def by_one(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], float]:
    out = tmp_path_factory.mktemp("single")
    return train(single.train, out, 1, *WORDS), result(out)["eval_bits_per_token"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "words"),
    [(ddp.train, ["accumulate=3"]), (fsdp.train, []), (pipeline_parallel.train, ["stages=2", "micro_batches=4"])],
    ids=["ddp", "fsdp", "pipeline_parallel"],
)
def test_two_ranks_train_the_gpt_of_one(
    tmp_path: Path, by_one: tuple[dict[str, torch.Tensor], float], recipe: Recipe, words: list[str]
) -> None:
    weights = train(recipe, tmp_path, 2, *WORDS, *words)
    assert weights.keys() == by_one[0].keys()
    gap = max(float((weights[name] - tensor).abs().max()) for name, tensor in by_one[0].items())
    assert gap < 1e-10
    assert result(tmp_path)["eval_bits_per_token"] == pytest.approx(by_one[1], abs=1e-10)


def test_a_text_of_one_s_own_is_trained_on_by_one_command(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("to be or not to be\n" * 300)
    words = ["task=language", "task.data=text", "task.text=text", "task.sequence_length=32", "optim=adamw"]
    done = command("-m", "recipes.ddp", *words, "global_batch_size=16", "max_steps=3", "out=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "text, 32 of 256 tokens a sequence, 160 sequences to train on, 17 to evaluate" in done.stdout
    found = result(tmp_path / "run")
    assert 0 < found["eval_bits_per_token"] < 9
    assert found["tokens_per_second"] == pytest.approx(32 * found["sequences_per_second"])
    assert found["model_flops_per_second"] == pytest.approx(found["flops_per_sample"] * found["sequences_per_second"])
    assert found["mfu"] is None, "of a CPU nothing is promised"
    assert re.search(r"speed .* [\d,]+ tokens/s, [\d.,]+ GFLOP/s\n", done.stdout)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert logged[0]["tokens_per_second"] == pytest.approx(32 * logged[0]["sequences_per_second"], rel=0.01)
