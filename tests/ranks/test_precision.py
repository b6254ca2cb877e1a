"""precision=fp16: what is scaled, unscaled, skipped by all ranks or none, kept and logged."""

from __future__ import annotations

import inspect
import json
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from lockstep import run
from lockstep.config.schema import GradientsConfig
from lockstep.errors import UserError
from lockstep.loop import training_loop
from lockstep.loop.training_loop import TrainingLoop
from lockstep.run import Run
from lockstep.tasks.images import Images
from lockstep.training.clip import clip_gradients
from lockstep.training.optim import build_scheduler
from lockstep.training.precision import Scaler
from lockstep.verify.trace import angle
from recipes import (
    checkpoint_resume,
    ddp,
    deepspeed_zero,
    fsdp,
    lightning_fabric,
    lightning_trainer,
    pipeline_parallel,
    verify,
)
from tests.helpers import overflowing_scaler as overflow
from tests.helpers.harness import assert_equal, execute, lines, preload, result, train, verify_rows
from tests.ranks.test_resume import SHORT, assert_same_run
from tests.ranks.test_run import in_run

pytestmark = pytest.mark.usefixtures("narrow")

FEW = ("data=synthetic", "data.size=16", "data.image_size=8", "global_batch_size=4", "epochs=2", "log_every=1")
PIPELINE = ("stages=2", "micro_batches=2")


@pytest.fixture
def quick() -> Iterator[None]:
    with overflow.overflowing():
        yield


# The scaler itself ------------------------------------------------------------------------------------------------


def clipped(run: Run) -> tuple[list[float], list[float], list[bool], list[float]]:
    """Four steps; in the second one the loss is infinite. Norms before and after clipping, in a real hook."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), run.scaler()
    norms, after, moved, scales = [], [], [], []

    def clip(*_: Any) -> None:
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.01).item())
        after.append(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item())

    optimizer.register_step_pre_hook(clip)
    for batch in run.steps(model=model, optimizer=optimizer):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with run.autocast():
            loss = cross_entropy(model(batch.inputs), batch.targets)
        scaler.scale(loss * (torch.inf if run.step == 1 else 1)).backward()
        run.record(loss=loss)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved.append(not all(map(torch.equal, before, model.parameters())))
        scales.append(scaler.get_scale())
    return norms, after, moved, scales


def test_gradients_are_unscaled_before_they_are_clipped(tmp_path: Path) -> None:
    """The notes' loop scales and never unscales: a threshold of 0.01 would meet gradients 65536 times too large."""
    words = ("max_steps=4", "eval_every=0", "log_every=3", "optim.warmup_steps=0")
    norms, after, moved, scales = in_run(clipped, tmp_path / "fp16", *words, "precision=fp16")
    assert moved == [True, False, True, True]
    assert len(norms) == 3, "no hook is called for an update that there is not"
    assert scales == [65536.0, 32768.0, 32768.0, 32768.0]
    reference = in_run(lambda run: clipped(run), tmp_path / "fp32", *words, "max_steps=1")
    assert norms[0] == pytest.approx(reference[0][0], rel=1e-2), "as large as in fp32"
    assert after == pytest.approx([0.01] * 3, rel=1e-3)
    logged = lines(tmp_path / "fp16")
    assert [(line["step"], line["loss_scale"], line["skipped_steps"]) for line in logged if "loss_scale" in line] == [
        (2, 32768.0, 1),  # at once, though only every third step is logged
        (3, 32768.0, 1),
        (4, 32768.0, 1),
    ]
    assert "step 2 left out: gradients are not finite" in (tmp_path / "fp16" / "ranks" / "0.log").read_text()


def first_step_left_out(run: Run) -> tuple[list[str], list[float]]:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=1.0), run.scaler()
    scheduler = build_scheduler(run.config.optim, optimizer, run.scheduled_steps)
    rates = []
    with warnings.catch_warnings(record=True) as caught:
        if scaler.is_enabled():
            Scaler(run.device)  # it says so to the list of filters that is in force now
        for batch in run.steps(model=model, optimizer=optimizer, scheduler=scheduler):
            rates.append(optimizer.param_groups[0]["lr"])
            loss = cross_entropy(model(batch.inputs), batch.targets)
            scaler.scale(loss * (torch.inf if run.step == 0 and scaler.is_enabled() else 1)).backward()
            run.record(loss=loss)
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            optimizer.zero_grad()
    return [str(warning.message) for warning in caught], rates


def test_a_step_that_is_left_out_is_a_step_of_the_schedule(tmp_path: Path) -> None:
    words = ("max_steps=6", "eval_every=0", "optim.warmup_steps=3")
    said, rates = in_run(first_step_left_out, tmp_path / "fp16", *words, "precision=fp16")
    assert said == [], "that the schedule came before the first update would be said here"
    assert rates == in_run(first_step_left_out, tmp_path / "fp32", *words)[1]


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_what_looks_at_the_first_update_waits_for_one(tmp_path: Path) -> None:
    """Zero-bubble pipelines set gradients by themselves, so parameters that have one are found at the update."""
    words = (*FEW, *overflow.WORDS, *PIPELINE, "schedule=zero_bubble", "memory=report", "max_steps=6", "optim=adamw")
    execute(pipeline_parallel.train, tmp_path / "run", 2, *words)
    found = result(tmp_path / "run")
    assert 1 <= found["skipped_steps"] < 6
    assert "parameters_without_gradient" not in found
    held = [rank["total"] for rank in json.loads((tmp_path / "run" / "memory.json").read_text())["ranks"]]
    assert all(rank["gradients"] == rank["parameters"] for rank in held)
    assert all(rank["optimizer"] > rank["parameters"] for rank in held)


def test_a_training_that_has_diverged_ends_with_a_line() -> None:
    layer, scaler = nn.Linear(1, 1), Scaler(torch.device("cpu"))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)

    def leave_out() -> None:
        scaler.scale(layer(torch.full((1, 1), torch.inf)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()

    for _ in range(16):
        leave_out()
    assert (scaler.get_scale(), scaler.skipped, scaler.left_out) == (1.0, 16, True)
    with pytest.raises(UserError, match=r"17 steps left out.*lower optim.lr, or set precision=bf16"):
        leave_out()


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("broken", [0, 1])
def test_of_several_optimizers_all_make_their_updates_or_none_does(broken: int, clips: bool) -> None:
    """Whichever of them has the gradient that is not finite, and whether gradients were unscaled before the update."""
    layers = [nn.Linear(2, 1), nn.Linear(2, 1)]
    model, scaler = nn.ModuleList(layers), Scaler(torch.device("cpu"))
    optimizers = [torch.optim.AdamW(layers[0].parameters(), fused=True), torch.optim.SGD(layers[1].parameters())]
    moved = []
    for step in range(3):
        before = [layer.weight.detach().clone() for layer in layers]
        factors = [torch.inf if step == 1 and number == broken else 1.0 for number in range(2)]
        loss = torch.stack([factor * layer(torch.ones(2)) for factor, layer in zip(factors, layers, strict=True)]).sum()
        scaler.scale(loss).backward()
        clip_gradients(model, optimizers, scaler, GradientsConfig(clip_norm=0.1 if clips else None))
        scaler.step(optimizers)
        scaler.update()
        moved.append([not torch.equal(old, layer.weight) for old, layer in zip(before, layers, strict=True)])
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert moved == [[True, True], [False, False], [True, True]]
    assert (scaler.skipped, scaler.get_scale()) == (1, 2.0**15)


def test_several_optimizers_are_not_stepped_one_by_one() -> None:
    layers, scaler = [nn.Linear(1, 1), nn.Linear(1, 1)], Scaler(torch.device("cpu"))
    scaler.scale(sum(layer(torch.ones(1)) for layer in layers)).backward()
    for optimizer in [torch.optim.SGD(layer.parameters()) for layer in layers]:
        scaler.step(optimizer)
    with pytest.raises(
        UserError, match=r"fp16: scaler.step took 2 optimizers one by one.*; call scaler.step\(\[...\]\)"
    ):
        scaler.update()


def test_in_other_precisions_it_costs_nothing_and_keeps_nothing() -> None:
    scaler, loss = Scaler(torch.device("cpu"), enabled=False), torch.ones(())
    assert scaler.scale(loss) is loss
    assert scaler.state_dict() == {}


# All ranks or none ------------------------------------------------------------------------------------------------


class Poisoned(Scaler):
    """Finds something infinite in step 2, in the gradients of these ranks alone."""

    ranks: Sequence[int] = ()
    count = 0

    def step(self, optimizer: Any, *args: Any, **options: Any) -> Any:
        self.count += 1
        if self.count == 2 and dist.get_rank() in self.ranks:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            gradient: Any = gradients[-1]
            with torch.no_grad():
                (gradient.to_local() if hasattr(gradient, "to_local") else gradient).view(-1)[-1:].fill_(torch.inf)
        return super().step(optimizer, *args, **options)


class Alone(Poisoned):
    """As torch's GradScaler is: each rank for itself."""

    _unscale_grads_ = torch.amp.GradScaler._unscale_grads_


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "ranks", "words"),
    [
        (pipeline_parallel.train, 2, PIPELINE),
        (fsdp.train, 2, ()),
        (pipeline_parallel.train, 4, (*PIPELINE, "global_batch_size=8")),
        (fsdp.train, 2, ("offload=true",)),
        (ddp.train, 2, ()),
    ],
)
@pytest.mark.usefixtures("quick")
def test_what_one_rank_finds_all_ranks_leave_out(
    recipe: Any, ranks: int, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the same run as one in which all of them have found it."""
    monkeypatch.setattr(run, "Scaler", Poisoned)
    found = {}
    for who in ("the last", "all"):
        monkeypatch.setattr(Poisoned, "ranks", range(ranks) if who == "all" else (ranks - 1,))
        found[who] = train(recipe, tmp_path / who, ranks, *FEW, "max_steps=2", "precision=fp16", *words)
        assert (result(tmp_path / who)["skipped_steps"], result(tmp_path / who)["loss_scale"]) == (1, 32768.0)
    assert lines(tmp_path / "all") == lines(tmp_path / "the last")
    assert_equal(found["all"], found["the last"])


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_stages_that_decide_each_for_itself_would_be_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "Scaler", Alone)
    found = []
    for who in ((1,), (0, 1)):
        monkeypatch.setattr(Poisoned, "ranks", who)
        words = (*FEW, *PIPELINE, "max_steps=2", "precision=fp16")
        found.append(train(pipeline_parallel.train, tmp_path / str(len(who)), 2, *words))
    assert any(not torch.equal(found[0][name], found[1][name]) for name in found[0])


# In fp16 itself ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_computes_in_fp16_and_says_what_that_costs_on_a_cpu(tmp_path: Path) -> None:
    """A scale at which the first backward overflows, in fp16 only. The Trainer by itself would have taken bf16."""
    preload(lightning_trainer.train)
    words = (*FEW, "precision=fp16", "max_steps=2", "model.norm=group")
    whole = train(ddp.train, tmp_path / "ddp", 2, *words)
    said = (tmp_path / "ddp" / "ranks" / "0.log").read_text()
    assert "set precision=bf16" in said
    for recipe in (lightning_trainer.train, lightning_fabric.train, fsdp.train):
        assert_equal(train(recipe, tmp_path / recipe.name, 2, *words), whole)
        assert lines(tmp_path / recipe.name) == lines(tmp_path / "ddp")
    other = train(ddp.train, tmp_path / "bf16", 2, *words[:-3], *words[-2:], "precision=bf16")
    assert any(not torch.equal(other[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_verify_compares_it(tmp_path: Path) -> None:
    names = "recipes=[ddp,pipeline_parallel,fsdp]"
    execute(verify.train, tmp_path / "run", 2, names, "precision=fp16", "max_steps=1")
    rows = verify_rows(tmp_path / "run")
    assert {row["recipe"]: row["verdict"] for row in rows} == dict.fromkeys(
        ("ddp", "pipeline_parallel", "fsdp"), "equal"
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_deepspeed_leaves_out_the_same_steps(stage: int, tmp_path: Path) -> None:
    """By itself it would never halve the scale from stage 1 on; gradients that travel in fp16 are almost the same."""
    words = (*FEW, "precision=fp16", "max_steps=4", "model.norm=group", "loss_scale=262144", "channels_last=false")
    whole = train(ddp.train, tmp_path / "ddp", 2, *words)
    mine = train(deepspeed_zero.train, tmp_path / "run", 2, *words, f"stage={stage}")
    counts = [[line.get("skipped_steps") for line in lines(tmp_path / out)] for out in ("run", "ddp")]
    assert counts[0] == counts[1]
    assert 1 < result(tmp_path / "run")["skipped_steps"] < 4, "else it would show nothing; choose another scale"
    if stage == 0:
        assert_equal(mine, whole)
    assert angle(mine, whole) < 1e-4


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_verify_compares_it_in_every_recipe(tmp_path: Path) -> None:
    for recipe in (lightning_trainer.train, deepspeed_zero.train):
        preload(recipe)
    execute(verify.train, tmp_path / "run", 2, "precision=fp16", timeout=580)
    rows = verify_rows(tmp_path / "run")
    assert {row["verdict"] for row in rows} == {"equal"}
    assert {"deepspeed_zero", "transfer_learning", "lightning_trainer"} <= {row["recipe"] for row in rows}


# Kept -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (ddp.train, ()),
        (pipeline_parallel.train, PIPELINE),
        (fsdp.train, ()),
        (lightning_trainer.train, ("accumulate=2",)),
        (deepspeed_zero.train, ("stage=2",)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_scale_and_count_go_on_bit_by_bit(recipe: Any, words: tuple[str, ...], tmp_path: Path) -> None:
    """Cut where the scale has been halved and where it is about to grow; the steps left out are the same ones."""
    preload(recipe)
    words = (*SHORT, *overflow.WORDS, *words)
    execute(recipe, tmp_path / "whole", 2, *words)
    skipped = [line["skipped_steps"] for line in lines(tmp_path / "whole") if "loss" in line]
    assert skipped[0] == 1
    assert skipped[-1] >= 3, "else nothing would be left out after the resume"
    for stop in (1, 7, 12):
        execute(recipe, tmp_path / "parts", 2, *words, f"max_steps={stop}")
    kept = [line for line in lines(tmp_path / "parts") if line["step"] not in (1, 7) or "loss" in line]
    assert kept == lines(tmp_path / "whole")
    (tmp_path / "parts" / "metrics.jsonl").write_text((tmp_path / "whole" / "metrics.jsonl").read_text())
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert result(tmp_path / "parts")["skipped_steps"] == skipped[-1]


@pytest.mark.usefixtures("quick")
@pytest.mark.slow
def test_what_is_missing_without_the_scaler_s_state(tmp_path: Path) -> None:
    words = ("data=synthetic", "data.size=8", "data.image_size=8", "global_batch_size=4", "max_steps=4")
    for forget, differs in (("null", False), ("scaler", True)):
        execute(checkpoint_resume.train, tmp_path / forget, 2, *words, *overflow.WORDS, f"forget={forget}")
        differing = json.loads((tmp_path / forget / "result.json").read_text())["differing"]
        assert bool(differing) == differs
    assert {"scaler.skipped", "model.fc.weight"} <= set(differing)


# Training mode ----------------------------------------------------------------------------------------------------


class Noisy(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Dropout(0.5), nn.BatchNorm1d(192), nn.Linear(192, 10))


def trained(run: Run, model: nn.Module, forget: bool = False) -> str:
    """Train; a recipe that evaluates by itself in step 1 may forget to go back."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        for batch in run.steps(model=model, optimizer=optimizer):
            if forget and run.step == 1:
                model.eval()
            loss = cross_entropy(model(batch.inputs), batch.targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.record(loss=loss)
    except UserError as error:
        return str(error)
    return "trained"


def test_a_recipe_that_forgets_model_train_is_told_so(tmp_path: Path) -> None:
    said = in_run(lambda run: trained(run, Noisy(), forget=True), tmp_path, "max_steps=4")
    assert said.startswith("test: step 2 left the model in evaluation mode")
    assert "call model.train()" in said


def test_a_run_that_forgets_model_train_after_an_evaluation_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The notes: validation switches it off, so it belongs inside the loop over epochs."""
    source = textwrap.dedent(inspect.getsource(TrainingLoop.evaluate))
    line = next(line for line in source.splitlines() if ".model.train()  #" in line)
    names: dict[str, Any] = {}
    exec(source.replace(line, line.replace("self.context.model.train()", "pass")), vars(training_loop), names)
    words = ("epochs=2", "eval_every=1")
    assert in_run(lambda run: trained(run, Noisy()), tmp_path / "as it is", *words) == "trained"
    monkeypatch.setattr(TrainingLoop, "evaluate", names["evaluate"])
    said = in_run(lambda run: trained(run, Noisy()), tmp_path / "broken", *words)
    assert said.startswith("test: step 15 left the model in evaluation mode"), "the first one after the evaluation"


class Frozen(nn.Sequential):
    """A backbone that stays in evaluation mode, whatever the rest is told."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.BatchNorm1d(192), nn.Linear(192, 10))

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self[1].eval()
        return self


def test_a_part_that_is_frozen_may_stay_in_evaluation_mode(tmp_path: Path) -> None:
    def statistics(run: Run) -> tuple[str, float]:
        model = Frozen()
        return trained(run, model), model[1].running_mean.abs().max().item()  # type: ignore[union-attr, operator]

    assert in_run(statistics, tmp_path, "epochs=2") == ("trained", 0.0)


@pytest.mark.parametrize("name", ["lightning_trainer", "pipeline_parallel"])
def test_every_loop_notices(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning has a loop of its own, and a pipeline a model of which the recipe holds the parts."""
    module = import_module(f"recipes.{name}")
    preload(module.train)

    def evaluating(task: Images, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        frame = inspect.currentframe()
        while frame:
            for found in (frame.f_locals.get("mine"), frame.f_locals.get("model")):
                if isinstance(found, nn.Module):
                    found.eval()
            frame = frame.f_back
        return cross_entropy(logits, labels)

    monkeypatch.setattr(Images, "loss", evaluating)
    words = PIPELINE if name == "pipeline_parallel" else ()
    with pytest.raises(AssertionError, match="step 1 left the model in evaluation mode"):
        execute(module.train, tmp_path / "run", 2, *FEW, *words)
