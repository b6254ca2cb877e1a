"""Expert parallelism: experts cut over ranks train what one process trains, and ranks send what the recipe says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lockstep.verify.trace import difference
from recipes import expert_parallel, single, verify
from tests.helpers import expert_task
from tests.helpers.changed_recipe import put_changed_recipe
from tests.helpers.harness import execute, lines, result, train, verify_rows
from tests.helpers.traffic import count_traffic
from tests.ranks.test_resume import assert_meshes_share, assert_same_in_two_parts

LAYERS, WIDTH, HIDDEN, LENGTH, BATCH, EXPERTS, CHOICES = 4, 64, 192, 16, 12, 4, 2  # of GPT nano
WORDS = ("task=language", "task.data=text", f"task.experts={EXPERTS}", "task.balance=0.1", "precision=fp64")
WORDS += (f"global_batch_size={BATCH}", "log_every=1", "threads=1", "epochs=3", "optim.warmup_steps=2", "eval_every=0")


@pytest.fixture
def words(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog, and over it again. " * 16)
    return (*WORDS, f"task.text={tmp_path}/text.txt", "task.samples=0", f"task.sequence_length={LENGTH}")


def test_it_trains_what_one_process_trains_with_everything_on(words: tuple[str, ...], tmp_path: Path) -> None:
    """Clipping is by the norm of all experts together; what is logged of gradients counts everything once."""
    words += ("task.samples=1", "task.sample_tokens=5", "max_steps=3", "task.capacity=1.0", "eval_batch_size=1")
    words += ("accumulate=5", "gradients.clip_norm=0.3", "checkpoint.best=true")  # micro-batches of 2, 2, 2
    words += ("gradients.log=true", "gradients.stop_on_nan=true", "logger.histograms=1", "memory=report")
    whole = train(single.train, tmp_path / "whole", 1, *words)
    mine = train(expert_parallel.train, tmp_path / "mine", 2, *words, "checkpoint_activations=full")
    assert difference(mine, whole) <= 1e-10
    best = [torch.load(tmp_path / run / "best.pt", weights_only=True) for run in ("mine", "whole")]
    assert difference(*best) <= 1e-10
    found, expected = result(tmp_path / "mine"), result(tmp_path / "whole")
    for name in ("train_loss", "eval_loss", "eval_bits_per_token", "parameters"):
        assert found[name] == pytest.approx(expected[name], rel=1e-10), name
    cut = 3 * LAYERS * EXPERTS * WIDTH * HIDDEN
    share = 1 - cut / expected["parameters"] / 2
    assert max(found["state_bytes_by_rank"]) == pytest.approx(share * found["state_bytes_unsharded"], rel=1e-3)
    assert (tmp_path / "mine" / "shown.txt").read_text() == (tmp_path / "whole" / "shown.txt").read_text()
    logged = [[each for each in lines(tmp_path / run) if "gradient_norm" in each] for run in ("mine", "whole")]
    assert len(logged[0]) == 3
    for own, theirs in zip(*logged, strict=True):
        norms = {name: value for name, value in theirs.items() if name.startswith(("gradient_norm", "update_ratio"))}
        assert len(norms) > 4 * LAYERS
        assert {name: own[name] for name in norms} == pytest.approx(norms, rel=1e-9)


@pytest.mark.soak
def test_biases_balance_alike_on_any_ranks_and_are_resumed(words: tuple[str, ...], tmp_path: Path) -> None:
    """From the whole batch's choices, in micro-batches and recomputed blocks; a step on each mesh, one after the other."""
    words += ("balance=bias", "bias_rate=0.03", "task.balance=0", "checkpoint.every=1", "optim=adamw", "optim.lr=0.001")
    whole = train(expert_parallel.train, tmp_path / "whole", 1, *words, "expert=1", "max_steps=4")
    for step, (ranks, expert) in enumerate(((2, 2), (4, 2), (1, 1), (4, 4)), 1):
        own = ("accumulate=2", "checkpoint_activations=full", f"expert={expert}", f"max_steps={step}")
        mine = train(expert_parallel.train, tmp_path / "parts", ranks, *words, *own)
    assert difference(mine, whole) <= 1e-10
    biases = [whole[f"blocks.{number}.mlp.bias"] for number in range(LAYERS)]
    assert all(bias.abs().max() >= 0.03 for bias in biases)
    steps = torch.stack(biases) / 0.03  # each step moves one by a whole rate, or not at all
    assert torch.allclose(steps, steps.round(), atol=1e-9)
    assert result(tmp_path / "parts")["eval_loss"] == pytest.approx(result(tmp_path / "whole")["eval_loss"], rel=1e-10)
    with pytest.raises(AssertionError, match=r"holds blocks\.0\.mlp\.bias, which .* resume it with"):
        train(single.train, tmp_path / "single", 1, *words[:-6], f"resume={tmp_path / 'parts'}", "max_steps=5")
    by_loss = train(expert_parallel.train, tmp_path / "loss", 1, *words, "balance=loss", "expert=1", "max_steps=4")
    assert difference({name: whole[name] for name in by_loss}, by_loss) > 1e-6, "the biases do choose"


WRONG = {  # by the mistake: what it does to the line that moves the biases
    "never": "",
    "the wrong way": "update_biases(mixtures, -run.config.bias_rate)",
    "by its own choices": "[each.chosen.mul_(run.world.rank == 0) for each in mixtures]; "
    "update_biases(mixtures, run.config.bias_rate)",
}


@pytest.mark.soak
@pytest.mark.parametrize("mistake", WRONG)
def test_verify_sees_biases_that_are_moved_wrongly(
    mistake: str, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_changed_recipe(
        monkeypatch,
        "expert_parallel",
        "update_biases(mixtures, run.config.bias_rate)",
        WRONG[mistake] or "pass",
        count=1,
    )
    with pytest.raises(AssertionError, match=r"not the training that recipes\.single computes: expert_parallel"):
        execute(verify.train, tmp_path / "run", 2, *words, "recipes=[expert_parallel]", "max_steps=5", timeout=200)
    verdicts = {row["variant"]: row["verdict"] for row in verify_rows(tmp_path / "run")}
    assert verdicts["balance=loss"] == "equal"
    assert verdicts["balance=bias bias_rate=0.03"].startswith("OFF")


@pytest.mark.slow
def test_a_run_with_biases_in_two_parts_is_the_run_in_one(words: tuple[str, ...], tmp_path: Path) -> None:
    assert_same_in_two_parts(expert_parallel.train, tmp_path, 2, *words, "balance=bias", "bias_rate=0.03")


@pytest.mark.slow
def test_a_model_of_one_s_own(tmp_path: Path) -> None:
    """Experts of another make, in a module of a module; three ranks that share, and three copies of one."""
    words = (
        f"task={expert_task.__file__}:Affine",
        "precision=fp64",
        "global_batch_size=12",
        "log_every=1",
        "max_steps=4",
    )
    whole = train(single.train, tmp_path / "whole", 1, *words)
    for expert in (3, 1):
        out = tmp_path / str(expert)
        assert difference(train(expert_parallel.train, out, 3, *words, f"expert={expert}"), whole) <= 1e-10
        for name in ("train_loss", "eval_loss"):
            assert result(out)[name] == pytest.approx(result(tmp_path / "whole")[name], rel=1e-10)


@pytest.mark.slow
def test_each_rank_sends_what_the_recipe_says(words: tuple[str, ...], tmp_path: Path) -> None:
    """Two ranks that share, and two copies of two: bytes handed to collectives in a step."""
    for ranks in (2, 4):
        out = tmp_path / str(ranks)
        count = count_traffic(expert_parallel.train, out, ranks, *words, "max_steps=2")
        tokens = 8 * BATCH * LENGTH * WIDTH  # S · B, of all ranks
        experts = 8 * 3 * LAYERS * EXPERTS * WIDTH * HIDDEN
        alike = 8 * int(result(out)["parameters"]) - experts
        told = 8  # how many tokens there are in all
        for step in zip(*count, strict=True):
            assert [each.keys() for each in step] == [{"alltoall_base_", "allreduce_"}] * ranks
            sent = sum(each["alltoall_base_"] for each in step)
            assert sent == LAYERS * (4 * CHOICES * tokens + ranks * 8 * EXPERTS)
            copies = experts // 2 if ranks == 4 else 0
            assert {each["allreduce_"] for each in step} == {alike + copies + told}


@pytest.mark.slow
def test_a_run_in_two_parts_is_the_run_in_one(words: tuple[str, ...], tmp_path: Path) -> None:
    assert_same_in_two_parts(expert_parallel.train, tmp_path, 2, *words, "optim=adamw", "task.dropout=0.1")


@pytest.mark.soak
def test_two_one_four_ranks_share_what_one_process_trains_and_ddp_ends_it(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    """A checkpoint has whole tensors by their names, so that any mesh, and any recipe, finds its part."""
    starts = [(ranks, (f"expert={size}",)) for ranks, size in ((2, 2), (1, 1), (4, 4), (4, 2))]
    assert_meshes_share(expert_parallel.train, tmp_path, starts, *words)
