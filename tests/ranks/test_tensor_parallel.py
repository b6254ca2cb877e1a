"""Tensor parallelism: layers that several ranks share train what one process trains, and send what the recipe says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lockstep.verify.trace import difference
from recipes import single, tensor_parallel
from tests.helpers.harness import result, train
from tests.helpers.traffic import count_traffic
from tests.ranks.test_resume import assert_meshes_share, assert_same_in_two_parts

LAYERS, WIDTH, VOCABULARY, LENGTH, BATCH = 4, 64, 256, 16, 12  # of GPT nano on bytes
WORDS = ("task=language", "task.data=text", "task.kv_heads=4", f"global_batch_size={BATCH}", "precision=fp64")
WORDS += ("log_every=1", "threads=1", "epochs=3", "optim.warmup_steps=2", "eval_every=0")


@pytest.fixture
def words(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog, and over it again. " * 16)
    return (*WORDS, f"task.text={tmp_path}/text.txt", "task.samples=0", f"task.sequence_length={LENGTH}")


@pytest.mark.slow_except("true")
@pytest.mark.parametrize("sequence", ["false", "true"])
def test_it_trains_what_one_process_trains_with_everything_on(
    sequence: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    """Dropout drops the same, of activations that ranks share as of slices; sequences of 15 are filled up to 16."""
    words += ("task.sequence_length=15", "task.dropout=0.2", "task.samples=1", "task.sample_tokens=5", "max_steps=3")
    words += ("accumulate=2", "checkpoint_activations=full", "gradients.clip_norm=0.3", "checkpoint.best=true")
    words += ("gradients.log=true", "gradients.stop_on_nan=true", "logger.histograms=1", "memory=report")
    whole = train(single.train, tmp_path / "whole", 1, *words)
    mine = train(tensor_parallel.train, tmp_path / "mine", 2, *words, f"sequence_parallel={sequence}")
    assert difference(mine, whole) <= 1e-10
    best = [torch.load(tmp_path / run / "best.pt", weights_only=True) for run in ("mine", "whole")]
    assert difference(*best) <= 1e-10
    found, expected = result(tmp_path / "mine"), result(tmp_path / "whole")
    for name in ("train_loss", "eval_loss", "eval_bits_per_token", "parameters"):
        assert found[name] == pytest.approx(expected[name], rel=1e-10), name
    assert max(found["state_bytes_by_rank"]) < 0.52 * found["state_bytes_unsharded"]
    assert (tmp_path / "mine" / "shown.txt").read_text() == (tmp_path / "whole" / "shown.txt").read_text()


@pytest.mark.slow
def test_each_rank_sends_what_the_recipe_says(words: tuple[str, ...], tmp_path: Path) -> None:
    """Two ranks that share, in the second case two copies of them; bytes handed to collectives in a step."""
    for ranks, sequence in ((2, "false"), (4, "true")):
        out = tmp_path / f"run{ranks}"
        count = count_traffic(tensor_parallel.train, out, ranks, *words, "max_steps=2", f"sequence_parallel={sequence}")
        samples = BATCH // (ranks // 2)
        activation = 8 * samples * LENGTH * WIDTH
        loss = 3 * 8 * samples * LENGTH
        norms = 8 * WIDTH * (2 * LAYERS + 1)
        expected = {"all_reduce": (4 * LAYERS + 2) * activation + loss}
        if sequence == "true":
            moved = dict.fromkeys(("all_gather_into_tensor", "reduce_scatter_tensor"), (4 * LAYERS + 2) * activation)
            held = 8 * (result(out)["parameters"] - WIDTH * (2 * LAYERS + 1)) // 2 + norms
            tokens = 8  # that there are in all copies' samples: one number
            expected = {"all_reduce": loss + norms, "allreduce_": held + tokens, **moved}
        for *_, last in count:
            assert last == expected


@pytest.mark.slow
def test_a_run_in_two_parts_is_the_run_in_one(words: tuple[str, ...], tmp_path: Path) -> None:
    assert_same_in_two_parts(tensor_parallel.train, tmp_path, 2, *words, "sequence_parallel=true")


@pytest.mark.soak
def test_two_one_four_ranks_share_what_one_process_trains_and_ddp_ends_it(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    """A checkpoint has whole tensors by their names, so that any mesh, and any recipe, finds its part."""
    starts = [(ranks, (f"tensor={size}",)) for ranks, size in ((2, 2), (1, 1), (4, 4), (4, 2))]
    assert_meshes_share(tensor_parallel.train, tmp_path, starts, *words)
