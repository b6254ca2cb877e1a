"""Which meshes there can be, and what a command that asks for another one is told."""

from __future__ import annotations

import pytest

from lockstep.errors import UserError
from lockstep.launch.validate import validate
from lockstep.parallel.context_plan import require_length
from recipes import parallel_mesh
from tests.helpers.harness import compose_config


@pytest.mark.parametrize(
    ("ranks", "words", "said"),
    [
        (
            4,
            "replicate=3",
            "replicate=3: pipeline=1 × context=1 × tensor=2 leave 2 groups of ranks for them; set nproc to the product",
        ),
        (
            4,
            "shard=4",
            "replicate=1 × shard=4: pipeline=1 × context=1 × tensor=2 leave 2 groups of ranks for them; set nproc to the",
        ),
        (
            2,
            "context=2",
            "pipeline × context × tensor=4: 4 ranks share a copy of the model, and 2 ranks cannot be divided into such",
        ),
        (4, "tensor=4", "tensor=4: does not divide kv_heads=2; allowed for this model are 1, 2$"),
        (4, "context=2 by=ulysses", "context=2: by=ulysses .* the 1 heads of keys and values do not divide"),
        (6, "context=3", "context=3: 64 tokens do not divide by the 6 equal chunks"),
        (2, "compile=true", "compile=true: is for what a rank computes by itself, and layers are shared here"),
        (
            2,
            "task.experts=4",
            "task.experts=4: its ranks share layers that all tokens go through; use recipes.expert_p",
        ),
        (2, "tensor=1 context=2 task.experts=4", "task.experts=4: their balance is of whole sequences"),
        (
            2,
            "task=images tensor=1",
            "task=images: its BatchNorm would normalise by each rank's share; use recipes.fsdp",
        ),
        (2, "task=images model.norm=group", "task=images: says nothing of how ranks could share its model's layers"),
        (2, "stages=2", "stages=2: the stages of a mesh are an axis of it, set pipeline=N; recipes.pipeline_parallel"),
        (2, "pipeline=2", "pipeline × context × tensor=4: 4 ranks share a copy of the model, and 2 ranks cannot be"),
        (2, "tensor=1 sequence_parallel=true", "sequence_parallel=true: is for ranks that share layers; set tensor=2"),
        (2, "micro_batches=8", "micro_batches=8: is for a pipeline; set pipeline=2 or more, or leave it out"),
        (2, "schedule=gpipe", "schedule=gpipe: is for a pipeline; set pipeline=2 or more, or leave it out"),
        (2, "tensor=1 pipeline=2 accumulate=2", "accumulate=2: a pipeline accumulates by itself; set micro_batches"),
        (2, "tensor=1 pipeline=2 micro_batches=1", "micro_batches=1: schedule=1f1b needs one for each of the 2 stages"),
        (
            7,
            "tensor=1 pipeline=7 micro_batches=8",
            "cut=balanced: the model has 6 blocks to cut between, too few for 7",
        ),
        (
            4,
            "tensor=1 pipeline=4 micro_batches=5",
            "global_batch_size=48: the global batch must divide by 1 copies × micro",
        ),
        (2, "tensor=1 pipeline=2 schedule=zero_bubble", "schedule=zero_bubble: allowed are gpipe, 1f1b, interleaved"),
        (2, "expert=2", "expert=2: experts on ranks of their own .*; use recipes.expert_parallel, .*recipes.fsdp"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_in_one_line(ranks: int, words: str, said: str) -> None:
    def command() -> None:
        config = compose_config(parallel_mesh.train, "global_batch_size=48", *words.split())
        validate(config, parallel_mesh.train, ranks)

    with pytest.raises(UserError, match=f"^{said}") as raised:
        command()
    assert "\n" not in str(raised.value)


def test_a_rank_s_positions_divide_by_the_slices_of_its_neighbours() -> None:
    require_length(24, 2, "ring", 4)
    with pytest.raises(UserError, match=r"^context=2: 20 tokens .* by=ring .* by tensor=4 slices .*; allowed .* of 8$"):
        require_length(20, 2, "ring", 4)


def test_a_mesh_has_as_many_places_as_there_are_ranks() -> None:
    for ranks, words in (
        (8, "pipeline=2 shard=2"),
        (8, "replicate=2 shard=2"),
        (8, "replicate=2 context=2"),
        (1, "tensor=1"),
        (4, "shard=2"),
    ):
        config = compose_config(parallel_mesh.train, "global_batch_size=48", *words.split())
        validate(config, parallel_mesh.train, ranks)
