"""Copies, shards, sequences and layers on one mesh train what one process trains, and send what the recipe says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lockstep.verify.trace import difference
from recipes import parallel_mesh, single
from tests.helpers.harness import lines, result, train
from tests.helpers.traffic import Traffic, count_traffic
from tests.ranks.test_resume import assert_meshes_share, assert_same_in_two_parts
from tests.ranks.test_tensor_parallel import BATCH, LAYERS, LENGTH, WIDTH, WORDS

VOCABULARY = 256
MESHES = {  # (ranks, words, dropout that all ranks draw alike: of those that see the same samples)
    "layers": (2, (), 0.2),
    "shard": (4, ("shard=2",), 0.0),
    "replicate": (4, ("replicate=2",), 0.0),
    "context": (4, ("context=2",), 0.2),
    "ulysses": (4, ("context=2", "by=ulysses"), 0.2),
    "slices": (4, ("context=2", "sequence_parallel=true"), 0.2),
    "stages": (4, ("pipeline=2",), 0.0),
    "stages and shards": (4, ("pipeline=2", "tensor=1", "schedule=interleaved"), 0.0),
    "stages and context": (4, ("pipeline=2", "tensor=1", "context=2", "schedule=gpipe"), 0.0),
    "stages, context and slices": (8, ("pipeline=2", "context=2", "by=ulysses", "sequence_parallel=true"), 0.0),
    "copies of stages": (8, ("replicate=2", "pipeline=2"), 0.0),
    "all four": (8, ("replicate=2", "context=2"), 0.0),
    "all without layers": (8, ("replicate=2", "shard=2", "context=2", "tensor=1"), 0.0),
}


@pytest.fixture
def words(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog, and over it again. " * 16)
    return (*WORDS, f"task.text={tmp_path}/text.txt", "task.samples=0", f"task.sequence_length={LENGTH}")


@pytest.mark.slow_except("layers")
@pytest.mark.soak_for(*(name for name in MESHES if name not in ("layers", "stages")))
@pytest.mark.parametrize("name", MESHES)
def test_it_trains_what_one_process_trains_with_everything_on(
    name: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    """Clipped by the norm over two kinds of shards; the ranks have unequally many evaluation batches, and gather alike."""
    ranks, mesh, dropout = MESHES[name]
    words += (f"task.dropout={dropout}", "task.samples=1", "task.sample_tokens=5", "max_steps=3", "eval_batch_size=3")
    words += (
        "checkpoint_activations=full",
        "gradients.clip_norm=0.3",
        "checkpoint.best=true",
    )
    words += ("gradients.log=true", "gradients.stop_on_nan=true", "logger.histograms=1", "memory=report")
    whole = train(single.train, tmp_path / "whole", 1, *words, "accumulate=2")  # masks are drawn by micro-batch
    pieces = "micro_batches=2" if "pipeline=2" in mesh else "accumulate=2"
    mine = train(parallel_mesh.train, tmp_path / "mine", ranks, *words, *mesh, pieces, timeout=240)
    assert difference(mine, whole) <= 1e-10
    best = [torch.load(tmp_path / run / "best.pt", weights_only=True) for run in ("mine", "whole")]
    assert difference(*best) <= 1e-10
    found, expected = result(tmp_path / "mine"), result(tmp_path / "whole")
    for each in ("train_loss", "eval_loss", "eval_bits_per_token", "parameters"):
        assert found[each] == pytest.approx(expected[each], rel=1e-10), each
    logged, wanted = lines(tmp_path / "mine"), lines(tmp_path / "whole")  # each layer's gradient norm, how far it moved
    assert "gradient_norm/blocks.0.attention.query" in wanted[0]
    for one, other in zip(logged, wanted, strict=True):
        assert one == pytest.approx(other, rel=1e-8)
    copies = 2 if "replicate=2" in mesh else 1
    assert max(found["state_bytes_by_rank"]) < 1.05 * copies / ranks * found["state_bytes_unsharded"]
    assert (tmp_path / "mine" / "shown.txt").read_text() == (tmp_path / "whole" / "shown.txt").read_text()


@pytest.mark.slow
@pytest.mark.soak_for("1-1-2-2-ulysses")
@pytest.mark.parametrize(
    ("replicate", "shard", "context", "tensor", "by"),
    [
        (1, 2, 1, 2, "ring"),
        (2, 1, 1, 2, "ring"),
        (1, 1, 2, 2, "ring"),
        (1, 2, 2, 1, "ulysses"),
        (1, 1, 2, 2, "ulysses"),
    ],
)
def test_each_rank_sends_what_the_recipe_says(
    replicate: int, shard: int, context: int, tensor: int, by: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    """Bytes handed to collectives in a step; all tensors here divide by their shards, so that nothing is filled up."""
    mesh = (f"replicate={replicate}", f"shard={shard}", f"context={context}", f"tensor={tensor}", f"by={by}")
    count = count_traffic(parallel_mesh.train, tmp_path / "run", 4, *words, *mesh, "max_steps=2")
    samples, tokens = BATCH // (replicate * shard), LENGTH // context
    activation = 8 * samples * tokens * WIDTH  # A; and K, as here there are as many heads of keys
    norms = 8 * WIDTH * (2 * LAYERS + 1)
    weights = (8 * int(result(tmp_path / "run")["parameters"]) - norms) // tensor + norms  # W
    outside = 2 * 8 * VOCABULARY * WIDTH // tensor + 8 * WIDTH  # V
    expected: Traffic = {"allreduce_": 8 * (replicate * shard > 1)}  # the tokens of all samples: one number
    if shard * context > 1:
        expected |= {"_allgather_base_": 2 * weights - outside, "_reduce_scatter_base_": weights}
    if replicate > 1:
        expected["allreduce_"] += weights // (shard * context)
    if tensor > 1:
        expected["all_reduce"] = (4 * LAYERS + 2) * activation + 3 * 8 * samples * tokens
    if context > 1 and by == "ring":
        expected |= dict.fromkeys(("send", "recv_"), LAYERS * (context - 1) * 6 * activation // tensor)
    elif context > 1:
        expected |= {"alltoall_base_": LAYERS * 8 * activation // tensor}
    for *_, last in count:
        assert last == {name: size for name, size in expected.items() if size}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "schedule"), [(("shard=2", "tensor=1"), "1f1b"), (("tensor=2", "sequence_parallel=true"), "gpipe")]
)
def test_each_rank_of_a_pipeline_sends_what_the_recipe_says(
    mesh: tuple[str, ...], schedule: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    """Two stages of two blocks; the first has the embedding too, the second the last norm, the output and the loss."""
    asked = ("pipeline=2", f"schedule={schedule}", "micro_batches=3", "max_steps=2", *mesh)
    count = count_traffic(parallel_mesh.train, tmp_path / "run", 4, *words, *asked)
    tensor, shard = (2, 1) if "tensor=2" in mesh else (1, 2)
    activation, tokens = 8 * BATCH // shard * LENGTH * WIDTH, BATCH // shard * LENGTH
    embedding = 8 * VOCABULARY * WIDTH
    blocks = (8 * int(result(tmp_path / "run")["parameters"]) - 2 * embedding - 8 * WIDTH) // 2
    for rank, (*_, last) in enumerate(count):
        stage = rank // tensor % 2
        outside = embedding + stage * 8 * WIDTH
        crossed = activation // tensor
        expected: Traffic = {"send": crossed, "recv_": crossed}
        if shard > 1:
            weights = blocks + outside
            expected |= {
                "allreduce_": 8,
                "_allgather_base_": 4 * weights - 3 * outside,
                "_reduce_scatter_base_": weights,
            }
        else:
            shared = (4 * LAYERS // 2 + 1) * activation
            expected |= {"all_gather_into_tensor": shared, "reduce_scatter_tensor": shared}
            expected["all_reduce"] = 8 * WIDTH * (LAYERS + stage) + stage * 3 * 8 * tokens
        assert last == expected


@pytest.mark.slow
@pytest.mark.soak_for("layers")
@pytest.mark.parametrize("mesh", [(), ("pipeline=2", "micro_batches=2")], ids=["layers", "stages"])
def test_a_run_in_two_parts_is_the_run_in_one(mesh: tuple[str, ...], words: tuple[str, ...], tmp_path: Path) -> None:
    assert_same_in_two_parts(parallel_mesh.train, tmp_path, 4, *words, *mesh, "optim=adamw")


@pytest.mark.soak
def test_any_mesh_shares_what_one_process_trains_and_ddp_ends_it(tmp_path: Path) -> None:
    """A checkpoint has whole tensors by their names; digits have 18 tokens, which divide by no mesh of these."""
    words = (
        "task=language",
        "task.kv_heads=4",
        "task.samples=0",
        "precision=fp64",
        "global_batch_size=12",
        "threads=1",
    )
    words += ("log_every=1", "optim.warmup_steps=2", "eval_every=0", "optim=adamw", "optim.lr=0.001")
    starts = [(4, ("shard=2",)), (4, ("tensor=1",)), (4, ("tensor=4",)), (1, ("tensor=1",)), (4, ("context=2",))]
    starts += [(4, ("pipeline=2", "micro_batches=2")), (2, ("pipeline=2", "tensor=1", "schedule=gpipe"))]
    assert_meshes_share(parallel_mesh.train, tmp_path, [*starts, (2, ())], *words)
