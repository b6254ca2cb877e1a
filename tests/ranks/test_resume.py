"""Promise 3, nothing is ever lost: a run that was cut off and started again is the run that was not, bit by bit."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler
from torchvision.models import resnet

from lockstep.checkpoint.directory import list_checkpoints
from lockstep.config.run_directory import freeze
from lockstep.data.batch import Batch
from lockstep.data.loader import Samples
from lockstep.data.sampler import epoch_order
from lockstep.distributed import signals
from lockstep.distributed.process_group import World
from lockstep.distributed.signals import Preempted
from lockstep.errors import UserError
from lockstep.launch.validate import validate
from lockstep.loop.training_loop import NothingLeft
from lockstep.recipe import Recipe
from lockstep.run import Run
from lockstep.training.random_state import generators, set_generators
from lockstep.verify.trace import difference
from recipes import (
    activation_checkpointing,
    comm_hooks,
    data_parallel,
    ddp,
    deepspeed_zero,
    fsdp,
    grad_accumulation,
    lightning_fabric,
    lightning_trainer,
    local_sgd,
    lora,
    model_parallel,
    parallel_mesh,
    pipeline_parallel,
    single,
    sync_batchnorm,
    transfer_learning,
    zero1,
)
from tests.helpers import own_recipe
from tests.helpers.harness import compose_config, execute, lines, result, run_ranks, tensors_of, train

pytestmark = pytest.mark.usefixtures("narrow")

DATA = ("data=synthetic", "data.size=48", "data.image_size=8", "global_batch_size=12", "epochs=3")  # 4 steps per epoch
RESNET18 = resnet.resnet18
SHORT = (*DATA, "log_every=1", "optim.warmup_steps=2", "checkpoint.every=4")
STEPS = 12
RECIPES: dict[str, tuple[Recipe, int, tuple[str, ...]]] = {
    "activation_checkpointing": (activation_checkpointing.train, 2, ("checkpoint_activations=selective",)),
    "comm_hooks": (comm_hooks.train, 3, ("r=1", "start_step=2")),
    "deepspeed_zero": (deepspeed_zero.train, 2, ("stage=3", "optim=adamw")),
    "single": (single.train, 1, ("optim=adamw",)),
    "ddp": (ddp.train, 2, ()),
    "ddp of 3": (ddp.train, 3, ("sample_order=computed",)),
    "ddp in fp16": (ddp.train, 2, ("precision=fp16", "loss_scale=4194304", "model.norm=group")),
    "sync_batchnorm": (sync_batchnorm.train, 2, ("optim=adamw",)),
    "fsdp": (fsdp.train, 2, ("optim=adamw",)),
    "fsdp in copies": (fsdp.train, 4, ("replicate=2", "precision=bf16")),
    "grad_accumulation": (grad_accumulation.train, 3, ("accumulate=2",)),
    "data_parallel": (data_parallel.train, 1, ()),
    "lightning_fabric": (lightning_fabric.train, 3, ("accumulate=2", "sync_batchnorm=true")),
    "lightning_trainer": (lightning_trainer.train, 3, ("accumulate=2", "optim=adamw")),
    "local_sgd": (local_sgd.train, 3, ("period=3", "outer=nesterov", "fragments=2", "optim=adamw")),
    "lora": (lora.train, 3, ("weights=random", "r=4")),
    "model_parallel": (model_parallel.train, 1, ()),
    "parallel_mesh": (
        parallel_mesh.train,
        4,
        ("tensor=1", "replicate=2", "model.norm=group", "task=images", "optim=adamw"),
    ),
    "pipeline_parallel": (pipeline_parallel.train, 2, ("stages=2", "micro_batches=4")),
    "transfer_learning": (transfer_learning.train, 3, ("weights=random", "freeze=[conv1.*,*bn*,layer2.*]")),
    "unfrozen while saved": (transfer_learning.train, 3, ("weights=random", "unfreeze_epoch=1", "optim=adamw")),
    "unfrozen when resumed": (transfer_learning.train, 3, ("weights=random", "unfreeze_epoch=2")),
    "zero1": (zero1.train, 3, ("optim=adamw", "accumulate=2")),
    "pipelines": (pipeline_parallel.train, 4, ("stages=2", "micro_batches=2", "optim=adamw")),
}


def newest(out: Path) -> Path:
    return list_checkpoints(out / "checkpoints")[0]


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert a
    unequal = [name for name in a if not torch.equal(a[name].nan_to_num(), b[name].nan_to_num())]
    assert not unequal, unequal


def assert_same_run(a: Path, b: Path) -> None:
    assert lines(a) == lines(b)
    assert_same(torch.load(a / "model.pt", weights_only=True), torch.load(b / "model.pt", weights_only=True))
    assert newest(a).name == newest(b).name
    assert_same(tensors_of(newest(a)), tensors_of(newest(b)))


def assert_same_in_two_parts(recipe: Recipe, folder: Path, ranks: int, *words: str) -> None:
    """Cut within an epoch: weights, optimizer and generators to the last bit."""
    words += ("task.dropout=0.1", "checkpoint.every=2")
    whole = train(recipe, folder / "whole", ranks, *words, "max_steps=5")
    for stop in (3, 5):
        execute(recipe, folder / "parts", ranks, *words, f"max_steps={stop}")
    assert result(folder / "parts")["resumed_from"] == "checkpoints/step-00000003"
    assert_same(whole, torch.load(folder / "parts" / "model.pt", weights_only=True))
    assert_same(*(tensors_of(newest(folder / run)) for run in ("whole", "parts")))


def assert_meshes_share(recipe: Recipe, folder: Path, starts: list[tuple[int, tuple[str, ...]]], *words: str) -> None:
    """A step on each mesh (ranks, its words), one after the other, then one of ddp: what `single` trains, ≤ 1e-10."""
    words += ("checkpoint.every=1",)
    last = len(starts)
    whole = train(single.train, folder / "whole", 1, *words, f"max_steps={last + 1}")
    for step, (ranks, mesh) in enumerate(starts, 1):
        execute(recipe, folder / "parts", ranks, *words, *mesh, f"max_steps={step}")
    kept = [
        {name for name in tensors_of(folder / run / "checkpoints" / f"step-{last:08d}") if name[:3] != "rng"}
        for run in ("parts", "whole")
    ]
    assert kept[0] == kept[1]
    mine = train(ddp.train, folder / "ddp", 2, *words, f"resume={folder / 'parts'}", f"max_steps={last + 1}")
    assert difference(mine, whole) <= 1e-10


# make test takes one of them, make test-slow all others, and tests/helpers/fuzz draws from all.
@pytest.mark.slow_except("single")
@pytest.mark.soak_for(
    "parallel_mesh",
    "fsdp in copies",
    "pipelines",
    "data_parallel",
    "lightning_fabric",
    "unfrozen while saved",
    "grad_accumulation",
    "comm_hooks",
)
@pytest.mark.parametrize("name", RECIPES)
def test_a_run_in_three_parts_is_the_run_in_one(name: str, tmp_path: Path) -> None:
    """Cut within an epoch and right after an evaluation; weights, optimizer, generators and logs to the last bit."""
    recipe, ranks, words = RECIPES[name]
    execute(recipe, tmp_path / "whole", ranks, *SHORT, *words)
    for stop in (3, 8, STEPS):
        execute(recipe, tmp_path / "parts", ranks, *SHORT, *words, f"max_steps={stop}")
    assert result(tmp_path / "parts")["resumed_from"] == "checkpoints/step-00000008"
    assert "parameters_without_gradient" not in result(tmp_path / "parts")
    # The parts were evaluated where each of them ended, too.
    extra = [line for line in lines(tmp_path / "parts") if line["step"] == 3 and "eval_loss" in line]
    assert len(extra) == 1
    kept = [line for line in lines(tmp_path / "parts") if line not in extra]
    assert kept == lines(tmp_path / "whole")
    (tmp_path / "parts" / "metrics.jsonl").write_text((tmp_path / "whole" / "metrics.jsonl").read_text())
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


class Interrupt:
    """Stands for the Listener: a signal that reaches one rank alone after a number of steps."""

    def __init__(self, run: list[Run], rank: int, step: int) -> None:
        self.run, self.rank, self.step, self.training = run, rank, step, False

    @property
    def received(self) -> int:
        run = self.run[0]
        return 15 if run.world.rank == self.rank and run.step >= self.step else 0

    def announce(self, number: int) -> None:
        assert number == 15


def interrupted(world: World, recipe: str, config: Any, out: str, rank: int, step: int) -> str:
    """Train until the signal; what the rank raised."""
    from importlib import import_module

    target: Recipe = import_module(recipe).train
    box: list[Run] = []
    box.append(Run(target.name, config, world, Path(out), listener=Interrupt(box, rank, step)))  # type: ignore[arg-type]
    try:
        target(box[0])
    except Preempted as preempted:
        return str(preempted)
    return "finished"


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "step"), [(0, 0), (1, 6), (0, 8), (1, 12)])
def test_a_signal_to_one_rank_stops_all_and_loses_nothing(
    rank: int, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first step, within an epoch, after an evaluation, and too late to matter."""
    monkeypatch.setattr(signals, "AGREE_SECONDS", 0)  # these steps are so short that the run would be over
    words = (*SHORT, "checkpoint.every=null", "checkpoint.minutes=0", f"out={tmp_path / 'run'}")
    config = compose_config(ddp.train, *words)
    validate(config, ddp.train, 2)
    out = freeze(config, "ddp")
    ends = run_ranks(interrupted, 2, ddp.train.target, config, str(out), rank, step)
    execute(ddp.train, tmp_path / "whole", 2, *SHORT)
    if step == STEPS:
        assert ends == ["finished"] * 2
    else:
        assert ends == ["SIGTERM"] * 2
        assert (result(out)["status"], result(out)["steps"]) == ("preempted", step)  # type: ignore[arg-type]
        assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == (
            [f"step-{step:08d}"] if step else []
        )
        execute(ddp.train, tmp_path / "run", 2, *words)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert_same(
        torch.load(tmp_path / "run" / "model.pt", weights_only=True),
        torch.load(tmp_path / "whole" / "model.pt", weights_only=True),
    )


@pytest.mark.slow
def test_without_every_it_saves_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0's clock decides for all; a clock of each rank's own would have them save at different steps."""
    monkeypatch.setattr(signals, "AGREE_SECONDS", 0)
    words = (*SHORT, "checkpoint.every=null", "checkpoint.minutes=0.00001", "checkpoint.keep=20")
    config = compose_config(ddp.train, *words, f"out={tmp_path / 'run'}")
    validate(config, ddp.train, 2)
    out = freeze(config, "ddp")
    assert run_ranks(interrupted, 2, ddp.train.target, config, str(out), 0, 99) == ["finished"] * 2
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) > STEPS // 2
    off = compose_config(ddp.train, *words, f"out={tmp_path / 'off'}", "checkpoint.minutes=0")
    validate(off, ddp.train, 2)
    run_ranks(interrupted, 2, ddp.train.target, off, str(freeze(off, "ddp")), 0, 99)
    assert not (tmp_path / "off" / "checkpoints").exists()


def test_by_default_it_saves_before_the_first_evaluation_and_at_the_end(tmp_path: Path) -> None:
    """However short its epochs; but nothing of what is over in one evaluation."""
    words = (*SHORT, "checkpoint.every=null")
    execute(ddp.train, tmp_path / "run", 2, *words)
    assert [int(path.name[5:]) for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == [STEPS, 3]
    execute(ddp.train, tmp_path / "short", 2, *words, "max_steps=4")
    assert not (tmp_path / "short" / "checkpoints").exists()


PROOF = (*DATA, "precision=fp64", "model.norm=group", "log_every=1", "checkpoint.every=1")


def test_one_four_two_three_ranks_train_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No sample of an epoch twice or skipped, and the losses of one uninterrupted process."""
    fetch = Samples.__getitem__

    def logged(self: Samples, key: tuple[int, Tensor]) -> Batch:
        if not self.fixed:  # the training set's; evaluation draws the same numbers each time
            with (tmp_path / "seen").open("a") as seen:
                seen.write("".join(f"{key[0]} {sample}\n" for sample in key[1].tolist()))
        return fetch(self, key)

    execute(single.train, tmp_path / "whole", 1, *PROOF)
    monkeypatch.setattr(Samples, "__getitem__", logged)
    for ranks, stop in ((1, 2), (4, 5), (2, 9), (3, 12)):
        execute(ddp.train, tmp_path / "parts", ranks, *PROOF, f"max_steps={stop}")
        assert result(tmp_path / "parts")["world_size"] == ranks
    seen = Counter((tmp_path / "seen").read_text().splitlines())
    order = {f"{epoch} {sample}" for epoch in range(3) for sample in epoch_order(48, 0, epoch).tolist()}
    assert set(seen) == order
    assert set(seen.values()) == {1}
    losses = [[line["loss"] for line in lines(tmp_path / run) if "loss" in line] for run in ("parts", "whole")]
    assert len(losses[0]) == STEPS
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    final = [torch.load(tmp_path / run / "model.pt", weights_only=True) for run in ("parts", "whole")]
    assert all(torch.allclose(final[0][name], final[1][name], rtol=1e-8, atol=1e-10) for name in final[0])


# What else is kept ------------------------------------------------------------------------------------------------


class Scale:
    """Like a GradScaler: numbers and tensors that follow the training."""

    def __init__(self) -> None:
        self.scale, self.average = 1.0, torch.zeros(2, dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale, self.average = state["scale"], state["average"]


def drop_out(world: World, config: Any, out: str) -> tuple[list[float], float, list[float]]:
    """A model whose training draws from every generator, and a helper object with a state of its own."""
    run = Run("single", config, world, Path(out))
    model = DistributedDataParallel(nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 10)))
    optimizer, scale = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), Scale()
    losses: list[float] = []
    try:
        for batch in run.steps(model=model, optimizer=optimizer, keep={"scale": scale}):
            loss = cross_entropy(model(batch.inputs), batch.targets) * (1 + random.random() + np.random.normal())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.record(loss=loss)
            losses.append(loss.item())
            scale.scale *= 1.5
            scale.average += run.step
    except NothingLeft:
        pass
    run.finish()
    return losses, scale.scale, scale.average.tolist()


def start(tmp_path: Path, out: str, ranks: int, *words: str) -> list[Any]:
    config = compose_config(ddp.train, *SHORT, f"out={tmp_path / out}", *words)
    validate(config, ddp.train, ranks)
    return run_ranks(drop_out, ranks, config, str(freeze(config, "ddp")))


def test_generators_of_every_rank_and_objects_in_keep_go_on(tmp_path: Path) -> None:
    whole = start(tmp_path, "whole", 2)
    first = start(tmp_path, "parts", 2, "max_steps=5")
    second = start(tmp_path, "parts", 2)
    for rank in range(2):
        assert first[rank][0] + second[rank][0] == whole[rank][0]
        assert second[rank][1:] == whole[rank][1:]
    assert whole[0][0] != whole[1][0], "each rank draws for itself"


def scheduled(world: World, config: Any, out: str, name: str) -> list[tuple[float, float, float]]:
    """A recipe with a scheduler of its own, or none; (learning rate, momentum, loss) of each step."""
    run = Run("single", config, world, Path(out))
    model = run.place(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = SCHEDULERS[name](optimizer)
    found = []
    try:
        for batch in run.steps(model=model, optimizer=optimizer, scheduler=scheduler):
            loss = cross_entropy(model(batch.inputs), batch.targets)
            loss.backward()
            run.record(loss=loss)
            settings = optimizer.param_groups[0]
            optimizer.step()
            found.append((settings["lr"], settings["momentum"], loss.item()))
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()
    except NothingLeft:
        pass
    run.finish()
    return found


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "none": lambda optimizer: None,
    "steps": lambda optimizer: lr_scheduler.StepLR(optimizer, 4, gamma=0.5),
    "milestones": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [3, 7], gamma=0.1),  # kept in a Counter
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=STEPS + 1),  # of momentum too
    "in turn": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4), lr_scheduler.ExponentialLR(optimizer, 0.8)],
        milestones=[4],
    ),
}


@pytest.mark.slow_except("in turn")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_of_one_s_own_resumes_bit_by_bit(name: str, tmp_path: Path) -> None:
    """Nothing sets another learning rate than the recipe: what it used is what is logged, before and after a resume."""

    def start(out: str, *words: str) -> list[tuple[float, float, float]]:
        config = compose_config(single.train, *SHORT, "log_every=1", f"out={tmp_path / out}", *words)
        validate(config, single.train, 1)
        found: list[Any] = run_ranks(scheduled, 1, config, str(freeze(config, "single")), name)
        return found[0]

    whole = start("whole")
    assert len(whole) == STEPS
    assert start("parts", "max_steps=5") + start("parts") == whole
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    scheduler, rates = SCHEDULERS[name](optimizer), []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    assert [rate for rate, _, _ in whole] == rates
    assert [line["lr"] for line in lines(tmp_path / "parts") if "loss" in line] == rates
    exported = [torch.load(tmp_path / run / "model.pt", weights_only=True) for run in ("whole", "parts")]
    assert_same(*exported)


def test_a_run_cut_off_before_its_result_has_nothing_left_to_train(tmp_path: Path) -> None:
    whole = start(tmp_path, "run", 1)[0]
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "model.pt").rename(tmp_path / "model.pt")
    again = start(tmp_path, "run", 1)[0]
    assert (again[0], again[1:]) == ([], whole[1:])
    assert (tmp_path / "run" / "model.pt").read_bytes() == (tmp_path / "model.pt").read_bytes()
    assert result(tmp_path / "run")["status"] == "finished"
    assert result(tmp_path / "run")["images_per_second"] is None


def test_generators_come_back_in_the_middle_of_a_pair() -> None:
    """Python's and NumPy's Gaussians are drawn in pairs; the second one waits in the state."""
    random.gauss(0, 1), np.random.standard_normal()
    saved = generators(torch.device("cpu"))
    expected = random.gauss(0, 1), np.random.standard_normal(), torch.rand(3).tolist(), random.random()
    torch.rand(7), random.random(), np.random.standard_normal(5)
    set_generators(saved, torch.device("cpu"))
    assert (random.gauss(0, 1), np.random.standard_normal(), torch.rand(3).tolist(), random.random()) == expected


# Which to keep, where to start ------------------------------------------------------------------------------------


def test_the_last_k_and_the_best_are_kept_and_the_best_is_exported(tmp_path: Path) -> None:
    words = ("checkpoint.best=true", "checkpoint.keep=2", "checkpoint.every=1", "optim.lr=0.5", "seed=3")
    execute(single.train, tmp_path / "run", 1, *SHORT, *words)
    folder = tmp_path / "run" / "checkpoints"
    evaluations = {line["step"]: line["eval_accuracy"] for line in lines(tmp_path / "run") if "eval_loss" in line}
    best = max(evaluations, key=evaluations.__getitem__)
    assert best < STEPS - 1, "else this would show nothing; choose another learning rate"
    assert [path.name for path in list_checkpoints(folder)] == [f"step-{step:08d}" for step in (12, 11, best)]
    assert (folder / "BEST").read_text() == f"step-{best:08d}\n"
    assert (folder / "LATEST").read_text() == f"step-{STEPS:08d}\n"
    saved = tensors_of(folder / f"step-{best:08d}")
    exported = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert_same(exported, {name[6:]: tensor for name, tensor in saved.items() if name.startswith("model.")})


def test_training_ends_early_on_all_ranks_together(tmp_path: Path) -> None:
    """At lr=0 nothing gets better: 1 evaluation sets the mark, 2 do not beat it. Cut in between, the count goes on."""
    words = (*SHORT, "optim.lr=0", "patience=2", "epochs=9", f"out={tmp_path / 'run'}", "metric=eval_accuracy")
    execute(ddp.train, tmp_path / "run", 2, *words, "max_steps=8", "model.norm=group")
    execute(ddp.train, tmp_path / "run", 2, *words, "model.norm=group")
    assert (result(tmp_path / "run")["status"], result(tmp_path / "run")["steps"]) == ("finished", 12)
    assert "stopping early: eval_accuracy" in (tmp_path / "run" / "ranks" / "1.log").read_text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    execute(ddp.train, out, 2, *SHORT)
    return out


def test_the_export_of_the_real_resnet_loads_into_plain_torchvision(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(resnet, "resnet18", RESNET18)
    words = (
        "data=synthetic",
        "data.size=4",
        "global_batch_size=2",
        "data.image_size=72",
        "max_steps=1",
        "eval_every=0",
    )
    execute(single.train, tmp_path / "run", 1, *words)
    RESNET18(num_classes=10).load_state_dict(torch.load(tmp_path / "run" / "model.pt", weights_only=True))


@pytest.mark.slow_except("model.pt")
@pytest.mark.parametrize(
    ("source", "first_step"),
    [("", 13), ("checkpoints", 13), ("checkpoints/step-00000008", 9), ("model.pt", 1), ("nested.pt", 1)],
)
def test_a_run_can_start_from_another_one(source: str, first_step: int, trained: Path, tmp_path: Path) -> None:
    """From a run or a checkpoint with all its state, on other ranks, for more epochs; from a file with the weights."""
    weights = torch.load(trained / "model.pt", weights_only=True)
    torch.save({"model": {f"module.{k}": v for k, v in weights.items()}, "epoch": 3}, trained / "nested.pt")
    words = (*SHORT, "epochs=5", "optim.lr=0", f"resume={trained / source}")
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()}
    execute(single.train, tmp_path / "run", 1, *words)
    steps = [line["step"] for line in lines(tmp_path / "run") if "loss" in line]
    assert steps == list(range(first_step, 21))
    assert result(tmp_path / "run")["resumed_from"]
    # At lr=0 the weights stay those that were loaded.
    if first_step != 9:
        mine = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
        assert all(
            torch.equal(mine[name], weights[name]) for name in weights if "running" not in name and "num" not in name
        )
    assert before == {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()}


def refused(build: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        build()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def enter(recipe: Recipe, ranks: int, *words: str) -> None:
    config = compose_config(recipe, *SHORT, *words)
    validate(config, recipe, ranks)
    freeze(config, recipe.name)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.lr=0.5"], "optim.lr=0.5 (there: 0.02)"),
        (["epochs=4"], "cosine learning rate planned over epochs=3"),
        (["seed=1", "model.norm=group"], "model.norm=group (there: own), seed=1 (there: 0)"),
        (["resume=never"], "not empty"),
    ],
)
def test_another_training_does_not_go_on_in_the_same_folder(words: list[str], said: str, trained: Path) -> None:
    before = (trained / "config.yaml").read_text()
    assert said in refused(lambda: enter(ddp.train, 2, f"out={trained}", *words))
    assert (trained / "config.yaml").read_text() == before


def test_another_recipe_does_not_go_on_in_the_same_folder(trained: Path) -> None:
    assert "holds a run of ddp" in refused(lambda: enter(single.train, 1, f"out={trained}"))


def test_what_does_not_change_the_training_may_change(trained: Path) -> None:
    config = compose_config(ddp.train, *SHORT, f"out={trained}", "log_every=5", "checkpoint.keep=5", "nproc=4")
    validate(config, ddp.train, 4)
    assert freeze(config, "ddp") is None, "and this one has finished"


def test_a_finished_run_without_checkpoints_cannot_go_on(tmp_path: Path) -> None:
    words = ("checkpoint.every=null", f"out={tmp_path / 'run'}")
    execute(single.train, tmp_path / "run", 1, *SHORT, *words, "max_steps=2")
    said = refused(lambda: enter(single.train, 1, *words, "max_steps=3"))
    assert said.startswith("max_steps=3")
    assert "set checkpoint.every" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model=resnet34"], "layer1.0.conv1.weight is [32, 64, 3, 3] there and [64, 64, 3, 3] here; set model=…"),
        (["model.norm=group"], "holds bn1.num_batches_tracked, which the model has not"),
        (
            ["model.num_classes=12"],
            "fc.weight is [10, 32] there and [12, 32] here; set model=…, model.norm=…, or the keys of your task, to the model",
        ),
    ],
)
def test_weights_of_another_model_are_refused(words: list[str], said: str, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert said in refused(lambda: enter(single.train, 1, f"out={out}", f"resume={trained / 'model.pt'}", *words))
    assert not out.exists()


class Whole(nn.Module):
    """A model that someone saved whole."""


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save(Whole(), tmp_path / "whole.pt")
    said = refused(lambda: enter(single.train, 1, f"out={tmp_path / 'run'}", f"resume={tmp_path / 'whole.pt'}"))
    assert "refused, for loading it would run code" in said
    assert not (tmp_path / "run").exists()


def test_a_batch_size_that_does_not_divide_the_samples_seen_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(
        AssertionError, match=r"samples, which is no whole number of such batches; set global_batch_size=12"
    ):
        execute(single.train, tmp_path / "run", 1, *SHORT, "global_batch_size=10", f"resume={trained}")


CONSTANT = (*SHORT, "checkpoint.every=null", "optim.schedule=constant")


@pytest.mark.slow
@pytest.mark.soak_for("fsdp", "lightning_trainer")
@pytest.mark.parametrize("name", ["ddp", "fsdp", "lightning_trainer"])
def test_a_finished_run_of_two_epochs_becomes_one_of_four(name: str, tmp_path: Path) -> None:
    """At a constant rate, in its own folder and in another one: bits, curves and generators of the longer run."""
    recipe, ranks, words = RECIPES[name]
    words = (*CONSTANT, *words)
    execute(recipe, tmp_path / "whole", ranks, *words, "epochs=4")
    execute(recipe, tmp_path / "run", ranks, *words, "epochs=2")
    execute(recipe, tmp_path / "new", ranks, *words, "epochs=4", f"resume={tmp_path / 'run'}")
    assert [line for line in lines(tmp_path / "whole") if line["step"] > 8] == lines(tmp_path / "new")
    assert result(tmp_path / "run")["steps"] == 8
    execute(recipe, tmp_path / "run", ranks, *words, "epochs=4")
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    for out in ("run", "new"):
        assert result(tmp_path / out)["resumed_from"].endswith("checkpoints/step-00000008")
        assert_same(*(torch.load(tmp_path / run / "model.pt", weights_only=True) for run in (out, "whole")))
        assert_same(*(tensors_of(newest(tmp_path / run)) for run in (out, "whole")))


def test_a_rate_that_was_planned_over_its_epochs_is_not_stretched(trained: Path, tmp_path: Path) -> None:
    """One line says why and what works; and that does work."""
    longer = (*SHORT, "epochs=5")
    before = (trained / "config.yaml").read_text()
    said = [
        refused(lambda: execute(single.train, tmp_path / "new", 1, *longer, f"resume={trained}")),
        refused(lambda: execute(ddp.train, trained, 2, *longer)),
    ]
    for line in said:
        assert re.match(
            r"epochs=5: \S+ has a cosine learning rate planned over epochs=3, so it is no part of a run of 5; ", line
        )
        assert "out=NEW optim.schedule=constant, or from its weights: resume=" in line
    assert not (tmp_path / "new").exists()
    assert (trained / "config.yaml").read_text() == before
    assert "epochs=2 (there: 3)" in refused(lambda: execute(ddp.train, trained, 2, *SHORT, "epochs=2"))
    execute(single.train, tmp_path / "new", 1, *longer, f"resume={trained}", "optim.schedule=constant")
    assert result(tmp_path / "new")["steps"] == 20


@pytest.mark.slow
def test_a_schedule_of_its_own_is_the_recipe_s_own_affair(tmp_path: Path) -> None:
    """StepLR knows no end, and optim.schedule is not read: the longer run."""
    words = (*SHORT, "checkpoint.every=null")
    execute(own_recipe.train, tmp_path / "whole", 2, *words, "epochs=4")
    execute(own_recipe.train, tmp_path / "run", 2, *words, "epochs=2")
    execute(own_recipe.train, tmp_path / "new", 2, *words, "epochs=4", f"resume={tmp_path / 'run'}")
    assert_same(*(torch.load(tmp_path / run / "model.pt", weights_only=True) for run in ("new", "whole")))
