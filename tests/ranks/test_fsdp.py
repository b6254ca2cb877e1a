"""What FSDP promises beyond the same training: no rank holds the whole, and shards come and go in any number."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from lockstep.checkpoint.dcp import tensor_metadata
from lockstep.checkpoint.directory import list_checkpoints
from lockstep.config.run_directory import freeze
from lockstep.distributed.process_group import World
from lockstep.errors import UserError
from lockstep.launch.validate import validate
from lockstep.run import Run
from lockstep.tasks.images import Images
from lockstep.verify.trace import angle, difference
from recipes import ddp, fsdp, single
from tests.helpers.harness import compose_config, lines, result, run_ranks, train
from tests.ranks.test_resume import PROOF, newest

pytestmark = pytest.mark.usefixtures("narrow")

DATA = (
    "data=synthetic",
    "data.size=48",
    "data.image_size=8",
    "global_batch_size=12",
    "log_every=1",
    "optim.warmup_steps=0",
)
SHORT = (*DATA, "max_steps=3", "eval_every=0")
SAVING = (*SHORT, "epochs=3", "max_steps=12", "checkpoint.every=4")


def assert_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    unequal = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not unequal, unequal


# What a rank holds ------------------------------------------------------------------------------------------------


def test_a_rank_holds_its_part_of_the_state_and_says_how_much(tmp_path: Path) -> None:
    """AdamW keeps two numbers a weight, so the state is 4 tensors of the model's size and a step count each."""
    weights = train(fsdp.train, tmp_path / "run", 2, *SHORT, "optim=adamw", "checkpoint.every=3")
    found = result(tmp_path / "run")
    size = 4 * found["parameters"]
    assert found["state_bytes_unsharded"] == pytest.approx(4 * size, rel=0.001)
    assert found["state_bytes_by_rank"] == pytest.approx([2 * size] * 2, rel=0.01)
    log = (tmp_path / "run" / "ranks" / "0.log").read_text()
    assert f"by rank; unsharded {found['state_bytes_unsharded'] / 2**20:,.1f}\n" in log
    # Each rank wrote what it holds, less the gradients, and nothing was gathered for it.
    files = [path.stat().st_size for path in sorted(newest(tmp_path / "run").glob("__*.distcp"))]
    assert len(files) == 2
    assert max(files) < 0.6 * sum(files)
    assert sum(files) > 3 * size
    assert all(type(tensor) is Tensor for tensor in weights.values())


@pytest.mark.slow
def test_of_two_copies_each_rank_holds_half(tmp_path: Path) -> None:
    train(fsdp.train, tmp_path / "run", 4, *SHORT, "replicate=2", "max_steps=1")
    found = result(tmp_path / "run")
    assert found["state_bytes_by_rank"] == pytest.approx([found["state_bytes_unsharded"] / 2] * 4, rel=0.01)


@pytest.mark.slow
def test_only_the_first_rank_ever_builds_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = Images.build_model

    def noted(task: Images) -> nn.Module:
        model: Any = build(task)
        with (tmp_path / "built").open("a") as stream:
            rank = dist.get_rank() if dist.is_initialized() else "launcher"
            stream.write(f"{rank} {model.fc.weight.device.type}\n")
        return model

    monkeypatch.setattr(Images, "build_model", noted)
    train(fsdp.train, tmp_path / "run", 2, *SHORT, "max_steps=1")
    assert sorted((tmp_path / "built").read_text().splitlines()) == ["0 cpu", "0 meta", "1 meta", "launcher meta"]


@pytest.mark.slow
def test_ways_to_hold_the_weights_do_not_change_a_bit(tmp_path: Path) -> None:
    """Kept until backward, or offloaded to where a CPU's are anyway; evaluated in between."""
    words = (*SHORT, "eval_every=1", "data.size=12", "max_steps=2")
    expected = train(fsdp.train, tmp_path / "run", 2, *words)
    for number, word in enumerate(("reshard_after_forward=false", "offload=true")):
        assert_identical(train(fsdp.train, tmp_path / str(number), 2, *words, word), expected)


def precisions(world: World, config: Any, out: str) -> dict[str, list[str]]:
    """What a recipe's layers compute with under precision=bf16: {layer: dtypes of input, weight and output}."""
    run = Run("fsdp", config, world, Path(out))
    with torch.device("meta"):
        model: Any = run.task.build_model()
    fsdp.shard(model, fsdp.make_mesh(run), run)
    fsdp.deal(model, run.task.build_model() if world.rank == 0 else None, run)
    seen: dict[str, list[str]] = {}

    def note(name: str) -> Any:
        def hook(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            seen[name] = [str(t.dtype).removeprefix("torch.") for t in (inputs[0], layer.weight, output)]

        return hook

    for name in ("layer2.0.conv1", "layer2.0.bn1", "fc"):
        model.get_submodule(name).register_forward_hook(note(name), prepend=True)
    loss = cross_entropy(model(torch.zeros(2, 3, 8, 8)), torch.zeros(2, dtype=torch.long))
    loss.backward()
    seen["loss"] = [str(loss.dtype)]
    seen["gradient"] = [str(model.layer2[0].conv1.weight.grad.dtype)]
    return seen


def test_bf16_computes_in_bf16_but_for_batch_norm_s_weights_the_loss_and_the_gradients(tmp_path: Path) -> None:
    config = compose_config(fsdp.train, *SHORT, "precision=bf16", f"out={tmp_path / 'run'}")
    validate(config, fsdp.train, 2)
    for seen in run_ranks(precisions, 2, config, str(freeze(config, "fsdp"))):
        assert seen["layer2.0.conv1"] == seen["fc"] == ["bfloat16"] * 3
        assert seen["layer2.0.bn1"] == ["bfloat16", "float32", "bfloat16"]
        assert seen["loss"] == seen["gradient"] == ["torch.float32"]


# Evaluation and accumulation --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "size"), [(2, 4), (3, 5), (3, 12)])
def test_ranks_with_fewer_evaluation_batches_still_gather_with_the_others(
    ranks: int, size: int, tmp_path: Path
) -> None:
    """12 images: batches of 4, 4, 4 on two ranks, 5, 5, 2 on three, one of 12 on three. At lr=0 nothing changes."""
    words = (*SHORT, "optim.lr=0", "max_steps=1", f"eval_batch_size={size}", "model.norm=group")
    train(fsdp.train, tmp_path / "run", ranks, *words)
    train(single.train, tmp_path / "single", 1, *words)
    found, expected = result(tmp_path / "run"), result(tmp_path / "single")
    assert (found["eval_loss"], found["eval_accuracy"]) == (expected["eval_loss"], expected["eval_accuracy"])


@pytest.mark.slow
def test_what_crosses_the_network_and_how_often(tmp_path: Path, monkeypatch: Any) -> None:
    """A share of 5 images in 3 micro-batches, the last one ragged: gradients are averaged once a step, or each time.

    And weights are gathered for the forward and, where they were freed, for the backward; the stem's and the
    classifier's are not freed in between. An evaluation of one batch is one forward more.
    """
    calls = counted_calls(monkeypatch)
    words = (*SHORT, "precision=fp64", "model.norm=group", "global_batch_size=10", "max_steps=2")
    expected = train(ddp.train, tmp_path / "ddp", 2, *words)
    found = []
    ways = ["accumulate=1", "reshard_after_forward=false", "accumulate=3", "accumulate=3 sync=every"]
    for number, way in enumerate(ways):
        for count in calls.values():
            count.value = 0
        assert difference(train(fsdp.train, tmp_path / str(number), 2, *words, *way.split()), expected) <= 1e-10
        found.append((calls["reduce_scatter"].value, calls["all_gather"].value))
    ranks, steps, groups = 2, 2, 9  # 8 blocks, and the rest
    both, once, evaluation = 2 * groups - 1, groups, groups
    assert found == [
        (ranks * steps * groups, ranks * (steps * both + evaluation)),
        (ranks * steps * groups, ranks * (steps * once + evaluation)),
        (ranks * steps * groups, ranks * (3 * steps * both + evaluation)),
        (ranks * 3 * steps * groups, ranks * (3 * steps * both + evaluation)),
    ]


@pytest.mark.slow
def test_all_batch_norms_are_gathered_at_once_in_16_bits(tmp_path: Path, monkeypatch: Any) -> None:
    """The 19 of this ResNet keep weights in fp32, so they are no part of their blocks: one group, and not one each."""
    calls, shard = counted_calls(monkeypatch), fsdp.fully_shard

    def one_by_one(modules: Any, **options: Any) -> Any:
        return [shard(each, **options) for each in modules] if isinstance(modules, list) else shard(modules, **options)

    found, weights = [], []
    for way in (shard, one_by_one):
        monkeypatch.setattr(fsdp, "fully_shard", way)
        for count in calls.values():
            count.value = 0
        out, words = (
            tmp_path / str(len(found)),
            (*SHORT, "precision=bf16", "optim=adamw", "eval_every=0", "max_steps=2"),
        )
        weights.append(train(fsdp.train, out, 2, *words))
        found.append((calls["reduce_scatter"].value, calls["all_gather"].value))
    assert_identical(weights[0], weights[1])
    ranks, steps, blocks = 2, 2, 9  # 8 of them, and the rest
    assert found == [
        (ranks * steps * (blocks + norms), ranks * (steps * (2 * blocks - 1 + norms) + blocks + norms))
        for norms in (1, 19)
    ], "an evaluation of one batch is one forward more"


def counted_calls(monkeypatch: Any) -> dict[str, Any]:
    """How often ranks, which are forked from here, scatter and gather, by the name of what they do."""
    context: Any = multiprocessing.get_context("fork")
    calls = {}
    for what in ("reduce_scatter", "all_gather"):
        new, old = f"{what}_single", {"all_gather": "all_gather_into_tensor"}.get(what, "reduce_scatter_tensor")
        name = new if hasattr(dist, new) else old
        calls[what] = context.Value("i", 0)
        monkeypatch.setattr(dist, name, counted(getattr(dist, name), calls[what]))
    return calls


def counted(function: Any, count: Any) -> Any:
    def call(*args: Any, **options: Any) -> Any:
        with count.get_lock():
            count.value += 1
        return function(*args, **options)

    return call


# Checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_shards_go_on_as_other_shards_and_as_whole_tensors(tmp_path: Path) -> None:
    """2 copies of 2 parts, 2 parts, 1 part, then DDP, and back into shards; AdamW's state with them."""
    words = (*PROOF, "optim=adamw", "checkpoint.every=20", "eval_every=0", "epochs=2")
    train(single.train, tmp_path / "whole", 1, *words)
    train(fsdp.train, tmp_path / "parts", 4, *words, "replicate=2", "max_steps=2")
    train(fsdp.train, tmp_path / "parts", 2, *words, "max_steps=3")
    train(fsdp.train, tmp_path / "parts", 1, *words, "max_steps=4")
    train(ddp.train, tmp_path / "ddp", 2, *words, "max_steps=6", f"resume={tmp_path / 'parts'}")
    weights = train(fsdp.train, tmp_path / "end", 3, *words, f"resume={tmp_path / 'ddp'}")
    found = [line["loss"] for part in ("parts", "ddp", "end") for line in lines(tmp_path / part) if "loss" in line]
    expected = [line["loss"] for line in lines(tmp_path / "whole") if "loss" in line]
    assert len(found) == 8
    assert found == pytest.approx(expected, rel=1e-10)
    assert difference(weights, torch.load(tmp_path / "whole" / "model.pt", weights_only=True)) <= 1e-8
    mine, theirs = tensor_metadata(newest(tmp_path / "end")), tensor_metadata(newest(tmp_path / "whole"))
    shapes = [{n: tuple(e.size) for n, e in each.items() if not n.startswith("rng.")} for each in (mine, theirs)]
    assert shapes[0] == shapes[1], "the same tensors under the same names, whoever saves"


@pytest.mark.slow
def test_a_file_of_weights_is_where_a_sharded_model_starts_and_what_its_best_one_ends_in(tmp_path: Path) -> None:
    start = train(single.train, tmp_path / "single", 1, *SHORT, "model.norm=group")
    words = (*SHORT, "model.norm=group", "optim.lr=0", "checkpoint.best=true")
    end = train(fsdp.train, tmp_path / "run", 3, *words, f"resume={tmp_path / 'single' / 'model.pt'}")
    assert_identical(end, start)
    assert_identical(torch.load(tmp_path / "run" / "best.pt", weights_only=True), start)
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) == 1


# Mistakes ---------------------------------------------------------------------------------------------------------


def optimizer_first(world: World, config: Any, out: str) -> str:
    """The mistake that trains nothing without a word: fully_shard replaces the tensors that the optimizer holds."""
    run = Run("fsdp", config, world, Path(out))
    model = run.task.build_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    fsdp.fully_shard(model)
    with pytest.raises(UserError) as caught:
        next(run.steps(model=model, optimizer=optimizer))
    return str(caught.value)


def test_an_optimizer_made_before_the_model_was_sharded_is_refused(tmp_path: Path) -> None:
    config = compose_config(fsdp.train, *SHORT, f"out={tmp_path / 'run'}")
    validate(config, fsdp.train, 2)
    said = run_ranks(optimizer_first, 2, config, str(freeze(config, "fsdp")))
    assert said[0] == said[1]
    assert said[0].startswith("optimizer: holds tensors that are not the model's parameters")


# Compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_blocks_train_the_same(tmp_path: Path) -> None:
    words = (*SHORT, "model.norm=group", "max_steps=2")
    expected = train(fsdp.train, tmp_path / "plain", 2, *words)
    found = train(fsdp.train, tmp_path / "compiled", 2, *words, "compile=true", timeout=800)
    assert angle(found, expected) < 1e-6
