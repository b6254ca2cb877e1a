"""Each technique's own promises, beyond that it trains as recipes.single does (which recipes.verify proves)."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import multiprocessing
import time
import weakref
from collections.abc import Callable
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet

from lockstep.config.schema import ModelConfig
from lockstep.data.batch import Batch
from lockstep.distributed.process_group import World
from lockstep.errors import UserError
from lockstep.memory.tracker import MemoryTracker, saved_bytes
from lockstep.models.resnet import build_model
from lockstep.parallel import partition
from lockstep.parallel.partition import balance, blocks, check_cut, choose_cuts, measure_units, split, units
from lockstep.training import timing
from lockstep.training.accumulate import MicroBatch, micro_batches
from lockstep.training.stage_clock import StageClock
from lockstep.verify.trace import difference
from recipes import (
    data_parallel,
    ddp,
    grad_accumulation,
    model_parallel,
    pipeline_parallel,
    single,
    sync_batchnorm,
)
from recipes.data_parallel import HostDataParallel
from tests.helpers.harness import run_ranks
from tests.helpers.harness import train as train_ranks

pytestmark = pytest.mark.usefixtures("narrow")

TOLERANCE = 1e-10
SHORT = (
    "data=synthetic",
    "data.size=24",
    "data.image_size=8",
    "max_steps=3",
    "eval_every=0",
    "log_every=1",
    "optim.warmup_steps=0",
    "global_batch_size=12",
)
PROOF = ("precision=fp64", "model.norm=group")

Tensors = dict[str, Tensor]
Fit = Callable[..., tuple[Tensors, dict[str, Any]]]


RESNET18 = resnet.resnet18


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """fit(recipe, ranks, *overrides): the exported weights and result.json of a short training; each trained once."""
    done: dict[Any, Any] = {}

    def train(recipe: Any, ranks: int, *overrides: str, fresh: bool = False) -> tuple[Tensors, dict[str, Any]]:
        key = recipe.name, ranks, overrides
        if fresh or key not in done:
            out = tmp_path_factory.mktemp(recipe.name) / "run"
            state = train_ranks(recipe, out, ranks, *SHORT, *overrides, timeout=60)
            done[key] = state, json.loads((out / "result.json").read_text())
        return done[key]

    return train


def make_model(norm: str = "group", name: str = "resnet18", image_size: int = 8) -> nn.Module:
    torch.manual_seed(1)
    return build_model(ModelConfig(name=name, norm=norm, num_classes=10, image_size=image_size))


def make_batch(count: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64)
    return Batch(images, torch.randint(0, 10, (count,), generator=generator), count)


def gradients(model: nn.Module) -> Tensors:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def whole_batch_gradients(model: nn.Module, batch: Batch) -> Tensors:
    model = copy.deepcopy(model)
    cross_entropy(model(batch.inputs), batch.targets).backward()
    return gradients(model)


# Pipeline parallelism ---------------------------------------------------------------------------------------------


@pytest.mark.slow_except("zero_bubble-2")
@pytest.mark.parametrize(
    ("schedule", "ranks"),
    [("gpipe", 2), ("1f1b", 2), ("interleaved", 2), ("zero_bubble", 2), ("1f1b", 4), ("zero_bubble", 4)],
)
def test_every_schedule_trains_what_one_process_does(schedule: str, ranks: int, fit: Fit) -> None:
    """On 4 ranks two pipelines of 2 stages, whose equal stages must average their gradients."""
    words = (*PROOF, "micro_batches=2", f"schedule={schedule}")
    found, result = fit(pipeline_parallel.train, ranks, *words)
    expected, reference = fit(single.train, 1, *PROOF)
    assert difference(found, expected) <= TOLERANCE
    assert result["train_loss"] == pytest.approx(reference["train_loss"], rel=TOLERANCE)
    assert result["eval_loss"] == pytest.approx(reference["eval_loss"], rel=TOLERANCE)


def test_three_steps_are_enough_to_see_a_difference(fit: Fit) -> None:
    """What the comparisons above rest on: another gradient gives other weights, far outside the tolerance."""
    expected, _ = fit(single.train, 1, *PROOF)
    found, _ = fit(single.train, 1, *PROOF, "optim.weight_decay=6e-4")
    assert difference(found, expected) > 1e3 * TOLERANCE


@pytest.mark.slow
def test_without_the_average_over_pipelines_the_weights_are_off(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_parallel, "average_gradients", lambda *_: None)
    found, _ = fit(pipeline_parallel.train, 4, *PROOF, "micro_batches=2", "schedule=1f1b", fresh=True)
    expected, _ = fit(single.train, 1, *PROOF)
    assert difference(found, expected) > 1e3 * TOLERANCE


@pytest.mark.slow
def test_batch_norm_in_a_pipeline_sees_the_micro_batches_in_their_order(fit: Fit) -> None:
    """Its running statistics depend on the order, and on there being no further forward, of shape inference say."""
    found, _ = fit(pipeline_parallel.train, 2, "precision=fp64", "micro_batches=3")
    expected, _ = fit(single.train, 1, "precision=fp64", "accumulate=3")
    whole, _ = fit(single.train, 1, "precision=fp64")
    names = [name for name in expected if "running" in name or "num_batches" in name]
    assert len(names) == 3 * 19, "the stem's, 2 a block, and the shortcuts' of layer1 and layer2"
    assert difference({n: found[n] for n in names}, {n: expected[n] for n in names}) <= TOLERANCE
    assert difference(found, expected) <= TOLERANCE
    assert difference({n: found[n] for n in names}, {n: whole[n] for n in names}) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("switch", ["precision=bf16", "channels_last=true"])
@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_a_pipeline_trains_in_every_arithmetic(switch: str, schedule: str, fit: Fit) -> None:
    found, result = fit(
        pipeline_parallel.train, 2, "model.norm=group", "micro_batches=2", switch, f"schedule={schedule}"
    )
    start = make_model()
    assert found.keys() == start.state_dict().keys()
    assert all(tensor.isfinite().all() for tensor in found.values())
    expected, reference = fit(single.train, 1, "model.norm=group", "accumulate=2", switch)
    assert result["train_loss"] == pytest.approx(reference["train_loss"], rel=0.02)
    assert 1 - torch.cosine_similarity(found["fc.weight"].flatten(), expected["fc.weight"].flatten(), 0) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("comm", ["bf16", "fp16"])
def test_compressed_gradients_are_the_mean_of_rounded_ones(comm: str, fit: Fit) -> None:
    """After one step the weights show it: off by a rounding, and by no more."""
    words = ("model.norm=group", "max_steps=1", "optim.warmup_steps=0")
    plain, _ = fit(ddp.train, 2, *words)
    found, _ = fit(ddp.train, 2, *words, f"comm={comm}")
    start, _ = fit(ddp.train, 2, *words, "optim.lr=0")
    off = difference(*({name: tensor - start[name] for name, tensor in each.items()} for each in (found, plain)))
    bits = 8 if comm == "bf16" else 11
    assert 2.0**-bits / 100 < off < 4 * 2.0**-bits


def test_a_balanced_cut_is_measured_once_and_shared(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks time their blocks differently; here absurdly so. Ranks that cut differently would wait for ever."""
    ranks_that_measured: Any = multiprocessing.get_context("fork").Array("i", 2)

    def cost(model: nn.Module, images: Tensor, names: Any) -> list[float]:
        rank = torch.distributed.get_rank()
        ranks_that_measured[rank] += 1
        return [100.0 if number == 3 + rank else 1.0 for number in range(len(units(model)))]

    monkeypatch.setattr(partition, "measure_units", cost)
    words = (*PROOF, "cut=balanced", "micro_batches=2")
    found, result = fit(pipeline_parallel.train, 2, *words, fresh=True)
    assert result["cuts"] == ["layer2.1"], "of rank 0's costs: 1 1 1 100 | 1 1 1 1 1 1"
    assert list(ranks_that_measured) == [1, 0]
    assert difference(found, fit(single.train, 1, *PROOF)[0]) <= TOLERANCE


def test_a_balanced_cut_trains(fit: Fit) -> None:
    found, result = fit(pipeline_parallel.train, 2, *PROOF, "cut=balanced", "micro_batches=2")
    assert len(result["cuts"]) == 1
    assert result["cuts"][0] in list(units(make_model()))[1:]
    assert difference(found, fit(single.train, 1, *PROOF)[0]) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "stages", "pieces"), [(2, 2, 2), (4, 2, 2), (4, 4, 6)])
def test_a_pipeline_says_how_long_each_rank_was_idle(ranks: int, stages: int, pieces: int, fit: Fit) -> None:
    words = (*PROOF, f"micro_batches={pieces}", "schedule=1f1b", *([f"stages={stages}"] if stages != 2 else []))
    _, result = fit(pipeline_parallel.train, ranks, *words)
    assert len(result["idle_shares"]) == ranks
    assert all(0 < share < 1 for share in result["idle_shares"])
    assert result["bubble_formula"] == pytest.approx((stages - 1) / (pieces + stages - 1))
    assert len(result["cuts"]) == stages - 1


# Gradient accumulation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("images", "count", "sizes"), [(9, 4, [3, 3, 3]), (10, 4, [3, 3, 3, 1]), (8, 4, [2] * 4)])
def test_micro_batches_are_views_whose_weights_make_one(images: int, count: int, sizes: list[int]) -> None:
    """chunk rounds a piece's size up, so that 4 pieces of 9 images are 3."""
    batch = make_batch(images)
    found = list(micro_batches(batch, count, nn.Identity()))
    assert [len(micro.inputs) for micro in found] == sizes
    assert [micro.weight for micro in found] == [size / images for size in sizes]
    assert sum(micro.weight for micro in found) == pytest.approx(1, abs=1e-15)
    cut = grad_accumulation.cut(batch, count, "chunk")
    for pieces in (found, cut):
        assert torch.equal(torch.cat([piece.inputs for piece in pieces]), batch.inputs)
        assert torch.equal(torch.cat([piece.targets for piece in pieces]), batch.targets)
        for piece in pieces:
            assert piece.inputs.untyped_storage().data_ptr() == batch.inputs.untyped_storage().data_ptr()
            assert piece.targets.untyped_storage().data_ptr() == batch.targets.untyped_storage().data_ptr()


def test_chunk_and_unbind_cut_the_same_pieces() -> None:
    batch = make_batch(8)
    by_chunk, by_unbind = (grad_accumulation.cut(batch, 4, by) for by in ("chunk", "unbind"))
    assert len(by_chunk) == len(by_unbind) == 4
    for a, b in zip(by_chunk, by_unbind, strict=True):
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.targets, b.targets)
        assert b.inputs.untyped_storage().data_ptr() == batch.inputs.untyped_storage().data_ptr()


def test_the_notes_line_raises() -> None:
    with pytest.raises(TypeError, match="tuple"):
        torch.unbind(make_batch(8).inputs.chunk(4))  # type: ignore[arg-type]


@pytest.mark.parametrize(("images", "count"), [(9, 4), (10, 4), (7, 3), (5, 5), (6, 1)])
def test_weighted_micro_batches_add_up_to_the_batch_s_gradients(images: int, count: int) -> None:
    model, batch = make_model().double(), make_batch(images)
    expected = whole_batch_gradients(model, batch)
    for micro in micro_batches(batch, count, model):
        (cross_entropy(model(micro.inputs), micro.targets) * micro.weight).backward()
    assert difference(gradients(model), expected) <= TOLERANCE


def test_a_plain_one_over_the_pieces_is_wrong_where_the_last_is_ragged() -> None:
    model, batch = make_model().double(), make_batch(10)
    expected = whole_batch_gradients(model, batch)
    for micro in micro_batches(batch, 4, model):
        (cross_entropy(model(micro.inputs), micro.targets) / 4).backward()
    assert difference(gradients(model), expected) > 0.01


@pytest.mark.slow_except("ddp-2")
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("recipe", [grad_accumulation.train, ddp.train], ids=["grad_accumulation", "ddp"])
def test_accumulating_trains_what_the_whole_batch_does(recipe: Any, count: int, fit: Fit) -> None:
    """2 ranks with 5 images each: 3 + 2, then 2 + 2 + 1."""
    share = "global_batch_size=10"
    found, result = fit(recipe, 2, *PROOF, share, f"accumulate={count}")
    expected, reference = fit(ddp.train, 2, *PROOF, share)
    assert difference(found, expected) <= TOLERANCE
    assert result["train_loss"] == pytest.approx(reference["train_loss"], rel=TOLERANCE), "weighted in the log too"


@pytest.mark.slow
def test_unbind_trains_what_chunk_does(fit: Fit) -> None:
    by_chunk, _ = fit(grad_accumulation.train, 2, *PROOF, "accumulate=3")
    by_unbind, _ = fit(grad_accumulation.train, 2, *PROOF, "accumulate=3", "accumulate_by=unbind")
    assert difference(by_unbind, by_chunk) <= TOLERANCE


def test_the_memory_of_a_micro_batch_is_in_the_result(fit: Fit) -> None:
    _, result = fit(grad_accumulation.train, 2, *PROOF, "accumulate=3")
    assert result["saved_bytes_batch"] / result["saved_bytes_micro_batch"] == pytest.approx(3, rel=0.05)


class CountedDDP(DistributedDataParallel):
    """Counts the gradient buckets that cross the network, on all ranks together."""

    buckets: Any = None  # a shared integer, which the forked ranks inherit

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__(module, **options)

        def hook(_, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations, and strings it refuses
            with CountedDDP.buckets.get_lock():
                CountedDDP.buckets.value += 1
            return allreduce_hook(None, bucket)  # type: ignore[arg-type]

        self.register_comm_hook(None, hook)


class DeafDDP(CountedDDP):
    def no_sync(self) -> Any:
        return contextlib.nullcontext()


@pytest.fixture
def buckets(monkeypatch: pytest.MonkeyPatch) -> Any:
    counter = multiprocessing.get_context("fork").Value("i", 0)
    monkeypatch.setattr(CountedDDP, "buckets", counter)
    return counter


@pytest.mark.slow_except("ddp")
@pytest.mark.parametrize(
    "module", [grad_accumulation, ddp, sync_batchnorm], ids=["grad_accumulation", "ddp", "sync_batchnorm"]
)
def test_gradients_cross_the_network_once_a_step(module: Any, buckets: Any, fit: Fit, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "DistributedDataParallel", CountedDDP)
    counts = []
    for pieces in (1, 3):
        buckets.value = 0
        fit(module.train, 2, f"accumulate={pieces}", fresh=True)
        counts.append(buckets.value)
    assert counts[0] == counts[1] >= 2 * 3, "2 ranks, 3 steps"
    monkeypatch.setattr(module, "DistributedDataParallel", DeafDDP)
    buckets.value = 0
    fit(module.train, 2, "accumulate=3", fresh=True)
    assert buckets.value >= 2 * counts[0], "a recipe that forgot no_sync is seen"


def rank_of_counting(world: World, way: str) -> tuple[int, Tensors]:
    """One backward to let DDP arrange its buckets, then one step of 3 micro-batches: (buckets sent, gradients)."""
    model = CountedDDP(make_model().double())
    batch = make_batch(6, seed=world.rank)
    cross_entropy(model(batch.inputs), batch.targets).backward()
    model.zero_grad()
    torch.distributed.barrier()
    before = CountedDDP.buckets.value
    torch.distributed.barrier()
    if way == "whole":
        cross_entropy(model(batch.inputs), batch.targets).backward()
    elif way == "micro_batches":
        for micro in micro_batches(batch, 3, model):
            (cross_entropy(model(micro.inputs), micro.targets) * micro.weight).backward()
    else:  # only the backward is inside no_sync; the forward has armed the hooks all the same
        cut = zip(batch.inputs.chunk(3), batch.targets.chunk(3), strict=True)
        pieces = [MicroBatch(images, labels, 1 / 3) for images, labels in cut]
        for number, micro in enumerate(pieces):
            loss = cross_entropy(model(micro.inputs), micro.targets) * micro.weight
            with contextlib.nullcontext() if number == 2 else model.no_sync():
                loss.backward()
    torch.distributed.barrier()
    return CountedDDP.buckets.value - before, {name: g.clone() for name, g in gradients(model.module).items()}


@pytest.mark.slow
def test_the_forward_belongs_inside_no_sync_too(buckets: Any) -> None:
    found = {way: run_ranks(rank_of_counting, 2, way) for way in ("whole", "micro_batches", "forward outside")}
    sent = {way: ranks[0][0] for way, ranks in found.items()}
    assert sent["micro_batches"] == sent["whole"] > 0
    assert sent["forward outside"] > sent["whole"]
    for ranks in zip(found["micro_batches"], found["whole"], strict=True):
        assert difference(ranks[0][1], ranks[1][1]) <= TOLERANCE


# Memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_micro_batch_keeps_its_share_of_the_batch_s_activations(norm: str) -> None:
    model, images = make_model(norm), make_batch(12).inputs.float()
    before = copy.deepcopy(model.state_dict())
    piece, whole = saved_bytes(model, images[:3]), saved_bytes(model, images)
    assert whole / piece == pytest.approx(4, rel=0.05)
    assert whole > images.numel() * 4 * 20, "more than a few tensors: 20 layers keep their inputs"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_counting_what_is_kept_keeps_nothing() -> None:
    """A tensor that autograd is handed back by a hook leads to its graph, and the graph to the hook."""
    model = make_model("batch")
    left = weakref.ref(model)
    with MemoryTracker(model):
        model(make_batch(2).inputs.float())
    del model
    gc.collect()
    assert left() is None


# DataParallel -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("images", "replicas", "chunks"), [(6, 2, 2), (7, 2, 2), (7, 3, 3), (5, 4, 3), (2, 4, 2)])
def test_replicas_gradients_add_up_to_the_batch_s(images: int, replicas: int, chunks: int) -> None:
    model, batch = make_model().double(), make_batch(images)
    expected = whole_batch_gradients(model, batch)
    parallel = HostDataParallel(model, replicas)
    used: list[int] = []
    for shell in parallel._shells:
        shell.register_forward_hook(lambda _, inputs, __: used.append(len(inputs[0])))
    logits = parallel(batch.inputs)
    cross_entropy(logits, batch.targets).backward()
    assert (len(used), sum(used)) == (chunks, images)
    assert difference(gradients(model), expected) <= TOLERANCE
    assert torch.allclose(logits, model(batch.inputs), rtol=0, atol=1e-10), "gathered in order"


def test_replicas_follow_the_weights() -> None:
    """They are made anew from the module's weights in every forward."""
    model, batch = make_model().double(), make_batch(6)
    parallel = HostDataParallel(model, 2)
    before = parallel(batch.inputs)
    with torch.no_grad():
        model.get_parameter("fc.bias").add_(1)
    assert torch.allclose(parallel(batch.inputs), before + 1, rtol=0, atol=1e-12)


class Late(nn.Module):
    """Dropout that the first replica comes to last."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.1 if bool(x[0, 0] == 0) else 0.0)
        return torch.nn.functional.dropout(x + 1, 0.5, self.training)


def test_replicas_draw_random_numbers_in_their_order_and_not_in_the_clock_s() -> None:
    inputs = torch.arange(40.0).view(8, 5)
    model, parallel = Late(), HostDataParallel(Late(), 2)
    torch.manual_seed(0)
    found = [parallel(inputs) for _ in range(3)]
    torch.manual_seed(0)
    assert all(torch.equal(each, torch.cat([model(chunk) for chunk in inputs.chunk(2)])) for each in found)


def test_batch_norm_keeps_the_statistics_of_the_first_chunk() -> None:
    model, batch = make_model("batch").double(), make_batch(7)
    first, whole = copy.deepcopy(model), copy.deepcopy(model)
    first(batch.inputs[:4])
    whole(batch.inputs)
    HostDataParallel(model, 2)(batch.inputs)
    found, expected, other = (dict(each.named_buffers()) for each in (model, first, whole))
    assert len(found) > 30
    assert difference(found, expected) <= TOLERANCE
    assert difference(found, other) > 1e-3
    assert all(int(tensor) == 1 for name, tensor in found.items() if "num_batches" in name)


class Probe(nn.Module):
    """Notes what it is called under."""

    seen: list[tuple[bool, bool]]  # of the class, for replicas are copies

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        Probe.seen = []

    def forward(self, x: Tensor) -> Tensor:
        if (x < 0).any():
            raise ValueError("a negative image")
        Probe.seen.append((self.training, torch.is_grad_enabled()))
        return self.layer(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_modes_reach_the_threads(training: bool, grad: bool) -> None:
    model = HostDataParallel(Probe(), 2).train(training)
    with torch.set_grad_enabled(grad):
        output = model(torch.ones(4, 3))
    assert Probe.seen == [(training, grad)] * 2
    assert output.requires_grad == grad


@pytest.mark.parametrize("outer", [torch.bfloat16, None])
def test_autocast_reaches_the_threads(outer: torch.dtype | None) -> None:
    model = HostDataParallel(Probe(), 2)
    with torch.autocast("cpu", outer) if outer else contextlib.nullcontext():
        output = model(torch.ones(4, 3))
    assert output.dtype == (outer or torch.float32)


def test_an_exception_in_a_replica_comes_out() -> None:
    model = HostDataParallel(Probe(), 2)
    with pytest.raises(ValueError, match="a negative image"):
        model(torch.tensor([[1.0] * 3, [-1.0] * 3]))  # only the second replica's
    assert len(Probe.seen) == 1
    assert model(torch.ones(2, 3)).shape == (2, 2), "and the next batch is computed"


def test_the_replicas_are_no_part_of_the_module() -> None:
    inner = make_model("batch")
    model = HostDataParallel(inner, 3)
    assert list(model.state_dict()) == [f"module.{name}" for name in inner.state_dict()]
    assert [id(p) for p in model.parameters()] == [id(p) for p in inner.parameters()]
    assert [id(b) for b in model.buffers()] == [id(b) for b in inner.buffers()]


@pytest.mark.parametrize("words", [("replicas=3",), ("global_batch_size=10", "replicas=2", "accumulate=2")])
def test_data_parallel_trains_what_one_process_does(words: tuple[str, ...], fit: Fit) -> None:
    found, result = fit(data_parallel.train, 1, *PROOF, *words)
    expected, _ = fit(single.train, 1, *PROOF, *(word for word in words if word.startswith("global_batch_size")))
    assert difference(found, expected) <= TOLERANCE
    assert result["thread_seconds"] > 0
    assert result["forward_seconds"] > 0


# Cutting a model --------------------------------------------------------------------------------------------------

RESNETS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


@pytest.mark.slow_except("every unit-resnet18", "cut1-resnet50")
@pytest.mark.parametrize("name", RESNETS)
@pytest.mark.parametrize("cut", [["layer3"], ["layer1.1", "layer2", "layer4.1"], "every unit"])
def test_parts_one_after_another_are_the_model(name: str, cut: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resnet, "resnet18", RESNET18)
    model = make_model("batch", name).eval()
    count = len(units(model)) if cut == "every unit" else len(cut) + 1
    firsts = list(units(model))[1:] if cut == "every unit" else choose_cuts(model, cut, count, torch.empty(0))
    parts = split(model, firsts)
    assert len(parts) == count
    states = [part.state_dict() for part in parts]
    joined = {key: tensor for state in states for key, tensor in state.items()}
    assert sum(map(len, states)) == len(joined), "no tensor twice"
    assert joined.keys() == model.state_dict().keys()
    assert all(tensor.data_ptr() == joined[key].data_ptr() for key, tensor in model.state_dict().items())
    images = make_batch(2).inputs.float()
    with torch.no_grad():
        x = images
        for part in parts:
            x = part(x)
        assert torch.equal(x, model(images))


def test_parts_of_a_model_for_large_images_are_the_model() -> None:
    """There the stem has a max-pooling, and ReLU works in place on what BatchNorm has made."""
    model = make_model("batch", "resnet34", image_size=96)
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    expected = copy.deepcopy(model)
    expected(images).sum().backward()
    x = images
    for part in split(model, list(units(model))[1:]):
        x = part(x)
    x.sum().backward()
    assert difference(gradients(model), gradients(expected)) == 0


def test_cuts_by_layer_and_by_block() -> None:
    model = make_model()
    assert choose_cuts(model, "layer3", 2, torch.empty(0)) == ["layer3.0"]
    assert choose_cuts(model, "layer2.1", 2, torch.empty(0)) == ["layer2.1"]
    assert choose_cuts(model, ["layer2", "layer3.1", "avgpool"], 4, torch.empty(0)) == [
        "layer2.0",
        "layer3.1",
        "avgpool",
    ]
    front, back = split(model, ["layer2.1"])
    assert front.names[-1] == "layer2.0"
    assert back.names[0] == "layer2.1"
    assert front.names + back.names == list(blocks(model))


def test_a_layer_s_name_is_not_taken_for_another_s_beginning() -> None:
    """layer3.2 is not layer3.20, and layer is no layer."""
    with torch.device("meta"):  # its layers' names are all that is looked at
        model = make_model(name="resnet152")
    assert choose_cuts(model, "layer3.2", 2, torch.empty(0)) == ["layer3.2"]
    with pytest.raises(UserError, match="not a layer to cut before"):
        choose_cuts(model, "layer", 2, torch.empty(0))


@pytest.mark.parametrize(
    ("cut", "parts", "said"),
    [
        ("layer9", 2, ["cut=layer9", "not a layer", "layer1, layer2, layer3, layer4", "layer4.1", "balanced"]),
        ("conv1", 2, ["cut=conv1", "not a layer"]),
        ("fc", 2, ["cut=fc", "not a layer"]),
        ("", 2, ["cut=", "not a layer"]),
        ([], 2, ["cut=[]", "makes 1 parts, not 2"]),
        (["layer3", "layer2"], 3, ["cut=[layer3,layer2]", "in the model's order"]),
        (["layer3", "layer3.0"], 3, ["cut=[layer3,layer3.0]", "each once"]),
        (["layer2", "layer3"], 2, ["cut=[layer2,layer3]", "makes 3 parts, not 2", "name 1 layers"]),
        ("layer3", 3, ["cut=layer3", "makes 2 parts, not 3", "name 2 layers"]),
        ("balanced", 11, ["cut=balanced", "10 blocks", "too few for 11 parts"]),
        (7, 2, ["cut=7", "not a layer"]),
    ],
)
def test_a_wrong_cut_is_refused_in_one_line(cut: Any, parts: int, said: list[str]) -> None:
    """By `check_cut` before a run is made, on a model without memory, and by `choose_cuts`."""
    config = ModelConfig(num_classes=10, image_size=8)
    for refuse in (
        lambda: check_cut(lambda: build_model(config), cut, parts),
        lambda: choose_cuts(make_model(), cut, parts, torch.empty(0)),
    ):
        with pytest.raises(UserError) as raised:
            refuse()
        assert "\n" not in str(raised.value)
        assert all(word in str(raised.value) for word in said), str(raised.value)


def test_a_right_cut_is_checked_without_a_weight() -> None:
    config = ModelConfig(name="resnet152", num_classes=10, image_size=8)
    started = time.perf_counter()
    state = torch.get_rng_state()
    check_cut(lambda: build_model(config), ["layer2", "layer3.20"], 3)
    check_cut(lambda: build_model(config), "balanced", 4)
    assert torch.equal(torch.get_rng_state(), state), "no weight was drawn"
    assert time.perf_counter() - started < 20


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.data())
@settings(max_examples=150, deadline=None)
def test_balance_is_the_best_of_all_partitions(costs: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(costs)))

    def dearest(starts: tuple[int, ...]) -> int:
        return max(sum(costs[a:b]) for a, b in pairwise([*starts, len(costs)]))

    starts = balance([float(cost) for cost in costs], parts)
    assert starts[0] == 0
    assert len(starts) == parts
    assert all(a < b for a, b in pairwise([*starts, len(costs)])), "no group is empty"
    every = [(0, *rest) for rest in combinations(range(1, len(costs)), parts - 1)]
    assert dearest(tuple(starts)) == min(map(dearest, every))


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_measuring_costs_leaves_the_model_alone(norm: str) -> None:
    model = make_model(norm).eval()
    before = copy.deepcopy(model.state_dict())
    images = make_batch(4).inputs.float()
    costs = measure_units(model, images, rounds=2)
    assert len(costs) == len(units(model)) == 10
    assert min(costs) > 0
    assert not model.training
    assert not images.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    cuts = choose_cuts(model, "balanced", 3, images)
    names = list(units(model))
    assert len(cuts) == 2
    assert 0 < names.index(cuts[0]) < names.index(cuts[1])


def test_a_dearer_block_costs_more() -> None:
    """Or the cut would balance noise."""

    class Slow(nn.Identity):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.05)
            return x

    model = make_model()
    layer = model.get_submodule("layer2")
    assert isinstance(layer, nn.Sequential)
    layer[1] = nn.Sequential(layer[1], Slow())
    costs = dict(zip(units(model), measure_units(model, make_batch(2).inputs.float(), rounds=3), strict=True))
    assert max(costs, key=lambda name: costs[name]) == "layer2.1"


# Model parallelism ------------------------------------------------------------------------------------------------


def test_two_parts_on_the_host_share_the_time(fit: Fit) -> None:
    """While one computes the other waits, so what they wait adds up to the whole."""
    found, result = fit(model_parallel.train, 1, *PROOF)
    shares = result["idle_shares"]
    assert len(shares) == 2
    assert all(0 < share < 1 for share in shares)
    assert sum(shares) > 0.999, "one part works at a time"
    assert result["cuts"] == ["layer3.0"]
    assert difference(found, fit(single.train, 1, *PROOF)[0]) <= TOLERANCE


@pytest.mark.parametrize(
    "words", [("micro_batches=3",), ("devices=[cpu,cpu,cpu]", "cut=[layer2,layer3]"), ("accumulate=5",)]
)
def test_model_parallel_trains_what_one_process_does(words: tuple[str, ...], fit: Fit) -> None:
    found, result = fit(model_parallel.train, 1, *PROOF, *words)
    assert difference(found, fit(single.train, 1, *PROOF)[0]) <= TOLERANCE
    parts = 3 if "devices=[cpu,cpu,cpu]" in words else 2
    assert len(result["idle_shares"]) == parts
    assert all(0 < share < 1 for share in result["idle_shares"])
    assert sum(result["idle_shares"]) > parts - 1.001, "one part works at a time"


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "ranks"), [(model_parallel.train, 1), (pipeline_parallel.train, 2)])
def test_another_model_in_parts_trains_what_it_does_as_a_whole(recipe: Any, ranks: int, fit: Fit) -> None:
    """No ResNet: features.N are its blocks, and the cut lies in the middle of them."""
    words = (*PROOF, "model.name=mobilenet_v3_small", "++model.arguments.dropout=0")
    found, result = fit(recipe, ranks, *words, "micro_batches=2")
    assert result["cuts"] == ["features.7"]
    assert difference(found, fit(single.train, 1, *words)[0]) <= TOLERANCE


def test_evaluation_runs_the_parts_on_their_devices(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """On two devices the bare ResNet cannot be called: its conv1 and its layer3 lie apart. It must be the wrapper."""
    calls: Any = multiprocessing.get_context("fork").Array("i", 2)
    forward = model_parallel.ModelParallel.forward

    def counted(self: Any, images: Tensor) -> Tensor:
        calls[int(self.training)] += 1
        return forward(self, images)

    monkeypatch.setattr(model_parallel.ModelParallel, "forward", counted)
    fit(model_parallel.train, 1, *PROOF, fresh=True)
    evaluated, trained = calls
    assert trained == 3
    assert evaluated == 1


def test_the_part_that_works_less_idles_more(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    class Takes(nn.Linear):
        def __init__(self, seconds: float) -> None:
            super().__init__(4, 4)
            self.seconds = seconds

        def forward(self, x: Tensor) -> Tensor:
            now[0] += self.seconds
            return super().forward(x)

    monkeypatch.setattr(timing.Stopwatch, "_now", lambda self: now[0])
    parts = [Takes(1), Takes(3)]
    clock = StageClock([torch.device("cpu")] * 2, next(parts[0].parameters()))
    for _ in range(4):
        x = torch.ones(2, 4)
        for number, part in enumerate(parts):
            x = clock.leave(part(clock.enter(x, number)), number)
        x.sum().backward()
    assert clock.idle_shares() == [0.75, 0.25]
    assert clock.whole.count == 4, "an interval a step"


def test_a_clock_changes_no_number_and_is_silent_without_gradients() -> None:
    part = nn.Linear(4, 4).double()
    clock = StageClock([torch.device("cpu")], next(part.parameters()))
    x = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: clock.leave(part(clock.enter(x, 0)), 0), (x,))
    with torch.no_grad():
        before = clock.busy[0].count
        assert torch.equal(clock.leave(part(clock.enter(x, 0)), 0), part(x))
        assert clock.busy[0].count == before


@pytest.mark.slow
def test_the_smallest_input_next_to_a_bad_one_is_taken(fit: Fit) -> None:
    """accumulate may be a rank's whole share, and a pipeline's gpipe takes a single micro-batch."""
    expected, _ = fit(single.train, 1, *PROOF)
    assert difference(fit(ddp.train, 2, *PROOF, "accumulate=6")[0], expected) <= TOLERANCE
    words = ("schedule=gpipe", "micro_batches=1")
    assert difference(fit(pipeline_parallel.train, 2, *PROOF, *words)[0], expected) <= TOLERANCE
