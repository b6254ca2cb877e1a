"""`gradients.*`: the same norms, the same clipping, under every sharding; and nothing where nothing is asked for."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.models import resnet

from lockstep.callbacks import gradient_stats
from lockstep.checkpoint.directory import list_checkpoints, read_pointer
from lockstep.distributed.process_group import World
from lockstep.errors import UserError
from lockstep.loggers.console import ConsoleReport
from lockstep.run import Run
from lockstep.training.clip import clip_gradients
from recipes import ddp, deepspeed_zero, single
from tests.helpers.harness import assert_equal, compose_config, execute, lines, result, run_ranks, train

pytestmark = pytest.mark.usefixtures("narrow")

DATA = ("data=synthetic", "data.size=48", "data.image_size=8", "global_batch_size=24")
SHORT = (*DATA, "max_steps=3", "log_every=1", "optim.warmup_steps=0", "eval_every=0")
PROOF = (*SHORT, "precision=fp64", "model.norm=group")
CLIP = ("gradients.clip_norm=0.5", "gradients.clip_value={fc.*:0.01,layer1.*.weight:0.002}", "gradients.log=true")
HELD: dict[str, tuple[str, int, tuple[str, ...]]] = {  # every way of holding a gradient: recipe, ranks, settings
    "ddp": ("ddp", 2, ()),
    "accumulated": ("grad_accumulation", 2, ("accumulate=5",)),
    "sharded": ("fsdp", 2, ()),
    "sharded in copies, offloaded": ("fsdp", 4, ("replicate=2", "offload=true")),
    "stages": ("pipeline_parallel", 2, ("stages=2", "micro_batches=4")),
    "stages in copies": ("pipeline_parallel", 4, ("stages=2", "micro_batches=2")),
    "two stages a rank": ("pipeline_parallel", 2, ("stages=2", "micro_batches=4", "schedule=zero_bubble")),
    "parts": ("model_parallel", 1, ()),
    "replicas": ("data_parallel", 1, ()),
    "fabric": ("lightning_fabric", 2, ("accumulate=2",)),
    "trainer": ("lightning_trainer", 2, ("accumulate=2",)),
}


@pytest.fixture(scope="module")
def clipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("single") / "run"
    train(single.train, out, 1, *PROOF, *CLIP)
    return out


def numbers(out: Path) -> list[dict[str, Any]]:
    return [line for line in lines(out) if "loss" in line]


def assert_close(mine: Path, theirs: Path, tolerance: float) -> None:
    """The logged numbers, each layer's norm and ratio among them, and the weights."""
    for a, b in zip(numbers(mine), numbers(theirs), strict=True):
        assert a.keys() == b.keys()
        off = {
            name: (a[name], b[name]) for name in b if a[name] != pytest.approx(b[name], rel=tolerance, abs=tolerance)
        }
        assert not off
    weights = [torch.load(out / "model.pt", weights_only=True) for out in (mine, theirs)]
    for name, tensor in weights[1].items():
        assert torch.allclose(weights[0][name], tensor, rtol=tolerance, atol=tolerance), name


@pytest.mark.slow
def test_the_limits_are_felt(clipped: Path, tmp_path: Path) -> None:
    """Else the next test would show nothing."""
    found = numbers(clipped)
    assert all(line["gradient_norm"] > 0.5 for line in found), "each step is scaled down"
    assert "gradient_norm/layer4.1.conv2" in found[0]
    assert all(0 < value < 1 for name, value in found[0].items() if name.startswith("update_ratio/"))
    train(single.train, tmp_path / "run", 1, *PROOF, "gradients.clip_norm=0.5")
    assert numbers(tmp_path / "run")[0]["gradient_norm"] > found[0]["gradient_norm"], "numbers are clamped first"
    assert numbers(tmp_path / "run")[-1]["loss"] != found[-1]["loss"]


@pytest.mark.slow_except("replicas", "parts", "stages in copies")
@pytest.mark.parametrize("name", HELD)
def test_clipped_training_is_single_s_wherever_gradients_are(name: str, clipped: Path, tmp_path: Path) -> None:
    """The norm is global: the same number, and so the same training, whoever holds which part of the gradients."""
    recipe, ranks, words = HELD[name]
    train(importlib.import_module(f"recipes.{recipe}").train, tmp_path / "run", ranks, *PROOF, *CLIP, *words)
    assert_close(tmp_path / "run", clipped, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("words", ["stage=0", "stage=2 accumulate=2", "stage=3"])
def test_deepspeed_clips_alike(words: str, tmp_path: Path) -> None:
    """In fp32, for it has no fp64; from stage 1 on by its own gradient_clipping, in stage 0 by ours."""
    common = (*SHORT, *CLIP, "model.norm=group")
    train(single.train, tmp_path / "single", 1, *common)
    train(deepspeed_zero.train, tmp_path / "zero", 2, *common, *words.split())
    assert_close(tmp_path / "zero", tmp_path / "single", 2e-4)


BROKEN_LAYER = "layer3.0.conv2"


class Poisoned(torch.autograd.Function):
    """The identity, whose backward makes a gradient that is no number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * float("nan")


def poison(where: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a layer's output, or the gradient that comes back to it, be no number on the last rank, in one step."""
    build = resnet.resnet18

    def built(*args: Any, **options: Any) -> nn.Module:
        model = build(*args, **options)
        calls = itertools.count(1)

        def spoil(layer: nn.Module, args: Any, output: Tensor) -> Any:
            if not torch.is_grad_enabled() or next(calls) != step or dist.get_rank() != dist.get_world_size() - 1:
                return output
            return output * float("nan") if where == "forward" else Poisoned.apply(output)

        model.get_submodule(BROKEN_LAYER).register_forward_hook(spoil)
        return model

    monkeypatch.setattr(resnet, "resnet18", built)


STOPS = {
    "ddp": ("ddp", 2, "forward", f"the output of {BROKEN_LAYER}"),
    "ddp backward": ("ddp", 3, "backward", f"the gradient of {BROKEN_LAYER}.weight"),
    # Parameters' gradients are there in shards alone, averaged; so what came out of the layer's backward is seen first.
    "fsdp": ("fsdp", 2, "backward", "the gradient of layer3.0.relu's output"),
    "stages": ("pipeline_parallel", 2, "forward", f"the output of {BROKEN_LAYER}"),
    "trainer": ("lightning_trainer", 2, "backward", f"the gradient of {BROKEN_LAYER}.weight"),
    "zero": ("deepspeed_zero", 2, "backward", f"the gradient of {BROKEN_LAYER}.weight"),
}


@pytest.mark.slow_except("ddp backward")
@pytest.mark.parametrize("name", STOPS)
def test_a_nan_ends_the_run_by_layer_step_and_rank(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, ranks, where, what = STOPS[name]
    pieces = ("stages=2", "micro_batches=2") if recipe == "pipeline_parallel" else ()
    poison(where, 5 if pieces else 3, monkeypatch)  # a pipeline makes a forward to learn the shapes, then one a piece
    step = 2 if pieces else 3
    train = importlib.import_module(f"recipes.{recipe}").train
    words = (*DATA, "epochs=4", "log_every=1", "checkpoint.every=1", "gradients.stop_on_nan=true")
    said = rf"in step {step}, {re.escape(what)} is not finite, first on rank {ranks - 1}; the step is not saved"
    with pytest.raises(AssertionError, match=said):
        execute(train, tmp_path / "run", ranks, *words, *pieces)
    assert [line["step"] for line in numbers(tmp_path / "run")] == list(range(1, step))
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[0].name == f"step-{step - 1:08d}"
    assert not (tmp_path / "run" / "model.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("words", ["stage=2", "stage=3"])
def test_deepspeed_clips_alike_in_fp16(words: str, tmp_path: Path) -> None:
    """It clips before it unscales: by a limit that is not scaled, next to nothing would be left of an update."""
    common = (*SHORT, *CLIP, "model.norm=group")
    train(single.train, tmp_path / "single", 1, *common)
    train(deepspeed_zero.train, tmp_path / "zero", 2, *common, "precision=fp16", words)
    (first, *_), (theirs, *_) = numbers(tmp_path / "zero"), numbers(tmp_path / "single")
    assert first["skipped_steps"] == 0
    for name, value in theirs.items():
        assert first[name] == pytest.approx(value, rel=0.05, abs=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "lightning_trainer", "deepspeed_zero"])
def test_under_fp16_an_overflow_is_the_scaler_s_and_the_norm_is_unscaled(name: str, tmp_path: Path) -> None:
    """The first steps overflow and are left out; what is clipped and logged then is what bf16 has, roughly."""
    words = (
        *SHORT,
        "max_steps=8",
        "epochs=4",
        "model.norm=group",
        "gradients.stop_on_nan=true",
        "gradients.clip_norm=0.5",
    )
    recipe = importlib.import_module(f"recipes.{name}").train
    execute(recipe, tmp_path / "fp16", 2, *words, "precision=fp16", "loss_scale=1048576", "optim.lr=0")
    execute(recipe, tmp_path / "fp32", 2, *words, "optim.lr=0")
    found = [numbers(tmp_path / run) for run in ("fp16", "fp32")]
    assert 0 < result(tmp_path / "fp16")["skipped_steps"] < 8  # type: ignore[operator]
    norms = [
        (line["gradient_norm"], found[1][number]["gradient_norm"])
        for number, line in enumerate(found[0])
        if "gradient_norm" in line
    ]
    assert len(norms) == 8 - result(tmp_path / "fp16")["skipped_steps"]  # type: ignore[operator]
    assert all(mine == pytest.approx(theirs, rel=0.1) for mine, theirs in norms)


def said_on_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that gets the lines which rank 0 of the next run writes for people."""
    said = tmp_path / "said"

    def line(report: ConsoleReport, text: str) -> None:
        if dist.get_rank() == 0:
            with said.open("a") as file:
                print(text, file=file)

    monkeypatch.setattr(ConsoleReport, "line", line)
    return said


NAN = (*DATA, "epochs=4", "max_steps=8", "log_every=1", "checkpoint.every=1", "checkpoint.best=true")


@pytest.mark.slow_except("ddp")
@pytest.mark.parametrize("name", ["ddp", "fsdp", "pipeline_parallel", "deepspeed_zero", "lightning_trainer"])
def test_weights_that_are_nan_end_the_run_and_are_not_saved(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"pipeline_parallel": ("stages=2", "micro_batches=2"), "deepspeed_zero": ("stage=3",)}.get(name, ())
    poison("forward", 1 + 2 * 2 + 1 if own[:1] == ("stages=2",) else 3, monkeypatch)
    train = importlib.import_module(f"recipes.{name}").train
    with pytest.raises(AssertionError, match=r"after step \d, \S+ is not finite on rank \d.* gradients.allow_nan=true"):
        execute(train, tmp_path / "run", 2, *NAN, *own)
    saved = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [each.name for each in saved[:1]] == ["step-00000002"]
    assert not (tmp_path / "run" / "model.pt").exists()
    assert read_pointer(tmp_path / "run" / "checkpoints", "BEST") == saved[0]


def test_allow_nan_trains_on_and_saves_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison("forward", 3, monkeypatch)
    said = said_on_rank_0(tmp_path, monkeypatch)
    execute(ddp.train, tmp_path / "run", 2, *NAN, "gradients.allow_nan=true")
    assert said.read_text().count("gradients.allow_nan=true: training continues") == 1
    assert result(tmp_path / "run")["status"] == "finished"
    assert math.isnan(numbers(tmp_path / "run")[-1]["loss"])
    folder = tmp_path / "run" / "checkpoints"
    assert list_checkpoints(folder)[0].name == "step-00000002"
    assert read_pointer(folder, "BEST") == folder / "step-00000002"


@pytest.mark.slow
def test_a_nan_loss_over_finite_weights_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a recipe leaves out a step; nothing is lost then."""
    record = Run.record
    monkeypatch.setattr(
        Run, "record", lambda run, *, loss, weight=1.0: record(run, loss=loss * math.nan, weight=weight)
    )
    said = said_on_rank_0(tmp_path, monkeypatch)
    execute(ddp.train, tmp_path / "run", 2, *NAN)
    assert said.read_text().count("the loss is nan; the weights are still finite") == 1
    assert result(tmp_path / "run")["status"] == "finished"
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[0].name == "step-00000008"


@pytest.mark.slow
def test_weights_that_follow_a_nan_loss_later_end_the_run_when_the_next_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison("forward", 4, monkeypatch)
    record = Run.record
    monkeypatch.setattr(
        Run, "record", lambda run, *, loss, weight=1.0: record(run, loss=loss * math.nan, weight=weight)
    )
    said = said_on_rank_0(tmp_path, monkeypatch)
    with pytest.raises(AssertionError, match=r"after step [45], \S+ is not finite on rank \d"):
        execute(ddp.train, tmp_path / "run", 2, *DATA, "epochs=4", "max_steps=8", "log_every=1", "eval_every=0")
    assert said.read_text().count("the weights are still finite") == 1


def hooks_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Every hook there is on modules, parameters and the optimizer."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    found = sum(len(getattr(layer, kind)) for layer in module.modules() for kind in kinds)
    found += sum(len(parameter._backward_hooks or ()) for parameter in module.parameters())
    return found + len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def count_hooks(world: World, config: Any, out: str) -> int:
    run = Run("single", config, world, Path(out))
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = hooks_of(model, optimizer)
    steps = run.steps(model=model, optimizer=optimizer)
    loss = model(next(steps).inputs).square().mean()
    loss.backward()
    run.record(loss=loss)
    clip_gradients(model, optimizer, None, config.gradients)
    next(steps)  # in the first one there are others', which look for parameters without a gradient
    return hooks_of(model, optimizer) - before


def does_not_clip(world: World, config: Any, out: str) -> str:
    """A recipe of one's own without the line."""
    run = Run("mine", config, world, Path(out))
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    steps = run.steps(model=model, optimizer=optimizer)
    loss = model(next(steps).inputs).square().mean()
    loss.backward()
    run.record(loss=loss)
    optimizer.step()
    try:
        next(steps)
    except UserError as error:
        return str(error)
    return "trained"


def test_a_recipe_that_does_not_clip_is_told_so_and_nothing_clips_instead(tmp_path: Path) -> None:
    config = compose_config(single.train, *DATA, "gradients.clip_norm=1")
    config.model.num_classes, config.data.num_classes, config.model.image_size = 10, 10, 8
    (tmp_path / "ranks").mkdir()
    said = run_ranks(does_not_clip, 1, config, str(tmp_path))[0]
    assert said.startswith("gradients.*: mine does not clip; call clip_gradients(model, optimizer, scaler, ")


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ((), 0),
        (("logger=[csv,tensorboard]", "gradients.clip_norm=null", "logger.histograms=0"), 0),
        (("gradients.clip_norm=1",), 1),  # which logs the norm
        (("gradients.warn_above=1",), 1),
        (("gradients.clip_value={1.*:1}",), 0),
        (("gradients.log=true",), 2),
        (("logger.histograms=1",), 2),
        (("gradients.stop_on_nan=true",), 1 + 2 + 2),  # the optimizer, two layers, two parameters
    ],
)
def test_off_costs_nothing(words: tuple[str, ...], count: int, tmp_path: Path) -> None:
    config = compose_config(single.train, *DATA, *words)
    config.model.num_classes, config.data.num_classes, config.model.image_size = 10, 10, 8
    (tmp_path / "ranks").mkdir()
    assert run_ranks(count_hooks, 1, config, str(tmp_path)) == [count]


def test_a_loud_layer_is_named_once_in_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_stats, "WARN_STEPS", 2)
    execute(ddp.train, tmp_path / "run", 2, *SHORT, "max_steps=4", "epochs=2", "gradients.warn_above=0.05")
    log = (tmp_path / "run" / "ranks" / "0.log").read_text()
    named = re.findall(r"step (\d): gradient norm (\S+) of (\S+) is above 0.05", log)
    assert [int(step) for step, _, layer in named if layer == "fc"] == [1, 3]
    assert all(float(norm) > 0.05 for _, norm, _ in named)


@pytest.mark.slow
def test_what_a_clipped_run_logs_goes_on_to_the_last_bit(tmp_path: Path) -> None:
    words = (*DATA, "epochs=3", "log_every=1", "checkpoint.every=2", "logger.histograms=2", *CLIP)
    execute(ddp.train, tmp_path / "whole", 2, *words)
    for stop in (3, 6):  # cut off after a step that is taken again
        execute(ddp.train, tmp_path / "parts", 2, *words, f"max_steps={stop}")
        for path in (tmp_path / "parts" / "checkpoints").glob("step-00000003"):
            shutil.rmtree(path)
        (tmp_path / "parts" / "result.json").unlink()
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    histograms = [(tmp_path / run / "histograms.jsonl").read_text() for run in ("parts", "whole")]
    assert histograms[0] == histograms[1]
    assert [json.loads(line)["step"] for line in histograms[0].splitlines()] == [2, 4, 6]
    weights = [torch.load(tmp_path / run / "model.pt", weights_only=True) for run in ("parts", "whole")]
    assert_equal(*weights)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sharded in copies, offloaded", "stages in copies", "deepspeed"])
def test_histograms_are_those_of_the_whole_tensors(name: str, tmp_path: Path) -> None:
    """Of shards, of stages, of sections: counted on the ranks that have them, and each number once."""
    recipe, ranks, words = HELD.get(name, ("deepspeed_zero", 2, ("stage=3",)))
    exact = (*SHORT, "max_steps=1") if name == "deepspeed" else (*PROOF, "max_steps=2")  # in fp32, ReLUs soon flip
    common = (*exact, "model.norm=group", "log_every=5", "logger.histograms=1")
    train(single.train, tmp_path / "single", 1, *common)
    train(importlib.import_module(f"recipes.{recipe}").train, tmp_path / "run", ranks, *common, *words)
    mine, theirs = [json.loads((tmp_path / run / "histograms.jsonl").read_text()) for run in ("run", "single")]
    weights = torch.load(tmp_path / "single" / "model.pt", weights_only=True)
    assert (
        mine.keys() == theirs.keys() == {"step", *(f"{kind}/{n}" for n in weights for kind in ("weights", "gradients"))}
    )
    for parameter, tensor in weights.items():
        for kind in ("weights", "gradients"):
            a, b = mine[f"{kind}/{parameter}"], theirs[f"{kind}/{parameter}"]
            assert sum(a["counts"]) == sum(b["counts"]) == tensor.numel()
            close = pytest.approx([b["low"], b["high"], b["total"], b["squares"]], rel=1e-3, abs=1e-4)
            assert [a["low"], a["high"], a["total"], a["squares"]] == close
        drawn = theirs[f"weights/{parameter}"]
        expected = torch.histc(tensor, gradient_stats.BINS, drawn["low"], drawn["high"]).int().tolist()
        assert drawn["counts"] == expected


def test_tensor_hooks_see_one_rank_s_micro_batch_and_the_optimizer_s_hook_the_mean() -> None:
    """Why clipping waits for the optimizer: bounded micro-batch by micro-batch, the sum is another one."""
    torch.manual_seed(0)
    images, weight = torch.randn(4, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64, requires_grad=True)
    optimizer, seen = torch.optim.SGD([weight], lr=0.0), []
    handle = weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    optimizer.register_step_pre_hook(lambda *_: seen.append(weight.grad.clone()))
    for piece in images.chunk(2):
        ((piece @ weight).square().mean() * 0.5).backward()
    optimizer.step()
    assert torch.equal(seen[0] + seen[1], seen[2])
    handle.remove()
    weight.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))
    weight.grad = None
    for piece in images.chunk(2):
        ((piece @ weight).square().mean() * 0.5).backward()
    assert not torch.allclose(weight.grad, seen[2].clamp(-0.1, 0.1))


def test_a_full_backward_hook_and_an_in_place_relu_do_not_go_together() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
    model[0].register_full_backward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        model(torch.randn(2, 3))
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda layer, args, output: output.register_hook(seen.append) and None)
    model(torch.randn(2, 3)).sum().backward()
    assert len(seen) == 1
