"""recipes.lightning_trainer: Lightning's loop, and yet the same bits, checkpoints, evaluations and signals."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lockstep.checkpoint.directory import list_checkpoints
from lockstep.config.run_directory import freeze
from lockstep.config.schema import to_yaml
from lockstep.distributed import signals
from lockstep.distributed.process_group import World
from lockstep.launch.validate import validate
from lockstep.recipe import Recipe
from lockstep.tasks.images import Images
from recipes import ddp, lightning_trainer, single, sync_batchnorm
from tests.helpers.harness import command, compose_config, execute, lines, preload, result, run_ranks
from tests.ranks.test_resume import DATA, SHORT, interrupted

pytestmark = pytest.mark.usefixtures("narrow")

TRAINER: Recipe = lightning_trainer.train


def weights(out: Path, file: str = "model.pt") -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(out / file, weights_only=True)
    return found


def assert_same(a: Path, b: Path) -> None:
    assert lines(a) == lines(b)
    mine, theirs = weights(a), weights(b)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


@pytest.mark.slow_except("other0")
@pytest.mark.parametrize(
    ("other", "ranks", "words"),
    [
        (ddp.train, 2, ("optim=adamw", "eval_every=2", "max_steps=10")),
        (ddp.train, 3, ("precision=bf16", "accumulate=2", "eval_batch_size=7")),
        (sync_batchnorm.train, 2, ()),
    ],
)
def test_the_bits_are_those_of_the_same_technique(
    other: Recipe, ranks: int, words: tuple[str, ...], tmp_path: Path
) -> None:
    """Evaluated where they are, too; with seven images a batch, the third rank has none to evaluate."""
    execute(other, tmp_path / "other", ranks, *SHORT, *words)
    own = ("sync_batchnorm=true",) if other is sync_batchnorm.train else ()
    execute(TRAINER, tmp_path / "run", ranks, *SHORT, *words, *own)
    assert_same(tmp_path / "run", tmp_path / "other")


def test_ragged_micro_batches_weigh_what_they_hold(tmp_path: Path) -> None:
    """A share of 7 in 3, 3 and 1."""
    words = ("data=synthetic", "data.size=28", "data.image_size=8", "global_batch_size=14", "epochs=2", "log_every=1")
    words = (*words, "accumulate=3", "precision=fp64", "model.norm=group")
    execute(single.train, tmp_path / "one", 1, *words, "accumulate=1")
    execute(TRAINER, tmp_path / "run", 2, *words)
    mine, theirs = weights(tmp_path / "run"), weights(tmp_path / "one")
    assert all(torch.allclose(mine[name], theirs[name], rtol=1e-9, atol=1e-12) for name in theirs)


@pytest.mark.slow
def test_four_two_one_ranks_train_as_one(tmp_path: Path) -> None:
    words = (*DATA, "precision=fp64", "model.norm=group", "log_every=1", "checkpoint.every=1", "eval_batch_size=5")
    execute(single.train, tmp_path / "whole", 1, *words)
    for ranks, stop in ((4, 3), (2, 7), (1, 12)):
        execute(TRAINER, tmp_path / "parts", ranks, *words, f"max_steps={stop}")
        assert result(tmp_path / "parts")["world_size"] == ranks
    for name in ("loss", "eval_loss"):
        mine, theirs = (
            [line[name] for line in lines(tmp_path / run) if name in line and line["step"] not in (3, 7)]
            for run in ("parts", "whole")
        )
        assert mine == pytest.approx(theirs, rel=1e-10)


@pytest.mark.slow
def test_another_run_s_checkpoint_is_gone_on_from_with_these_settings(tmp_path: Path) -> None:
    """Another batch size, other micro-batches, another number of ranks and another learning rate, within an epoch."""
    words = ("global_batch_size=24", "accumulate=5", "optim.lr=0.005", "epochs=5", "model.norm=group", "precision=fp64")
    for recipe in (ddp.train, TRAINER):
        source, out = tmp_path / f"{recipe.name}-source", tmp_path / recipe.name
        execute(recipe, source, 1, *SHORT, *words[-2:], "accumulate=5", "max_steps=6")
        execute(recipe, out, 2, *SHORT, *words, f"resume={source}")
        assert [line["step"] for line in lines(out) if "loss" in line] == list(range(4, 11))
    assert_same(tmp_path / TRAINER.name, tmp_path / "ddp")


def dropping(*_: Any) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 10))


@pytest.mark.slow
def test_each_rank_goes_on_drawing_its_own_random_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Images, "build_model", dropping)
    execute(TRAINER, tmp_path / "whole", 3, *SHORT)
    for stop in (3, 8, 12):
        execute(TRAINER, tmp_path / "parts", 3, *SHORT, f"max_steps={stop}")
    mine, theirs = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


# Signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_signals_stop_all_ranks_together_and_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first step, where an epoch ends without an evaluation, within an epoch, and after an evaluation."""
    monkeypatch.setattr(signals, "AGREE_SECONDS", 0)  # these steps are so short that the run would be over
    words = (*SHORT, "checkpoint.every=null", "eval_every=2", f"out={tmp_path / 'run'}")
    preload(TRAINER)
    for rank, step in ((0, 0), (1, 4), (0, 6), (1, 8)):
        config = compose_config(TRAINER, *words)
        validate(config, TRAINER, 2)
        out = freeze(config, TRAINER.name)
        assert run_ranks(interrupted, 2, TRAINER.target, config, str(out), rank, step) == ["SIGTERM"] * 2
        assert (result(tmp_path / "run")["status"], result(tmp_path / "run")["steps"]) == ("preempted", step)
        saved = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
        assert saved[:1] == ([f"step-{step:08d}"] if step else [])
    execute(TRAINER, tmp_path / "run", 2, *words)
    execute(TRAINER, tmp_path / "whole", 2, *SHORT, "checkpoint.every=null", "eval_every=2")
    assert_same(tmp_path / "run", tmp_path / "whole")


def handlers_while_training(world: World, config: str, out: str) -> list[Any]:
    """The handlers of each step, after one of ours was put there before."""
    from lockstep.config.declared import read_config
    from lockstep.run import Run

    seen = []

    def noted(task: Images, *args: Any) -> torch.Tensor:
        if torch.is_grad_enabled():  # a step's loss, and not an evaluation's
            seen.append([signal.getsignal(sign) is ours for sign in signals.SIGNALS])
        return cross_entropy(*args)

    def ours(*_: Any) -> None: ...

    for sign in signals.SIGNALS:
        signal.signal(sign, ours)
    Images.loss = noted  # type: ignore[method-assign, assignment]
    TRAINER(Run(TRAINER.name, read_config(TRAINER, config), world, Path(out), quiet=True))
    return seen


def test_lightning_leaves_the_signals_alone(tmp_path: Path) -> None:
    preload(TRAINER)
    config = compose_config(TRAINER, *SHORT, f"out={tmp_path / 'run'}", "max_steps=2")
    validate(config, TRAINER, 1)
    out = freeze(config, TRAINER.name)
    assert run_ranks(handlers_while_training, 1, to_yaml(config), str(out)) == [[[True] * len(signals.SIGNALS)] * 2]


# Checkpoints ------------------------------------------------------------------------------------------------------


def busy(run: Path) -> list[Any]:
    return [result(run)[f"{name}_busy_by_rank"] for name in ("main_thread", "cores")]


@pytest.mark.slow
def test_it_ends_early_keeps_the_best_and_has_nothing_left_to_train(tmp_path: Path) -> None:
    """At lr=0 nothing gets better: 1 evaluation sets the mark, 2 do not beat it. Cut in between, the count goes on."""
    run = tmp_path / "run"
    words = (*SHORT, "optim.lr=0", "patience=2", "epochs=9", "model.norm=group", "checkpoint.best=true")
    execute(TRAINER, run, 2, *words, "max_steps=8")
    execute(TRAINER, run, 2, *words)
    assert (result(run)["status"], result(run)["steps"]) == ("finished", 12)
    assert all(0 < share < 1 for share in result(run)["data_wait_share_by_rank"]), "Lightning fetches, and waits"
    assert all(0 < main <= cores for main, cores in zip(*busy(run), strict=True))
    assert (run / "checkpoints" / "BEST").read_text() == "step-00000004\n"
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == [f"step-{step:08d}" for step in (12, 8, 4)]
    best, last = weights(run, "best.pt"), weights(run)
    assert best.keys() == last.keys()
    assert all(torch.equal(best[name], last[name]) for name in last), "at lr=0 they are the same"
    before = (run / "model.pt").read_bytes()
    for file in ("model.pt", "result.json"):  # as if cut off between its last step and its result
        (run / file).unlink()
    execute(TRAINER, run, 2, *words)
    assert (run / "model.pt").read_bytes() == before
    assert (result(run)["status"], result(run)["images_per_second"]) == ("finished", None)
    assert busy(run) == [None, None], "no step was taken"


@pytest.mark.slow
def test_a_checkpoint_is_lightning_s_and_another_recipe_says_so(tmp_path: Path) -> None:
    execute(TRAINER, tmp_path / "run", 1, *SHORT, "max_steps=6")
    folder = list_checkpoints(tmp_path / "run" / "checkpoints")[0]
    saved = torch.load(folder / "lightning" / "trainer.ckpt", weights_only=True)
    assert (saved["global_step"], saved["epoch"]) == (6, 1)
    final = weights(tmp_path / "run")
    assert {name.removeprefix("model.") for name in saved["state_dict"]} == final.keys()
    assert all(torch.equal(saved["state_dict"][f"model.{name}"], tensor) for name, tensor in final.items())
    with pytest.raises(AssertionError, match="holds lightning's files, and this recipe reads lockstep's"):
        execute(ddp.train, tmp_path / "other", 1, *SHORT, f"resume={tmp_path / 'run'}")
    execute(
        TRAINER, tmp_path / "more", 1, *SHORT, "optim.lr=0", "max_steps=1", f"resume={tmp_path / 'run' / 'model.pt'}"
    )
    trained = {name for name in final if "running" not in name and "num" not in name}
    assert all(torch.equal(weights(tmp_path / "more")[name], final[name]) for name in trained)


# As a user sees it ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_console_and_the_folders_are_those_of_any_recipe(tmp_path: Path) -> None:
    words = (
        "data=synthetic",
        "data.size=8",
        "data.image_size=8",
        "global_batch_size=4",
        "epochs=1",
        "checkpoint.every=1",
    )
    done = command("-m", "recipes.lightning_trainer", *words, "out=run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].startswith("lightning_trainer: 2 ranks on 1 host · cpu · gloo · fp32")
    assert "finished" in done.stdout
    assert (
        "ightning"
        not in done.stdout.replace("lightning_trainer", "").replace("lightning_fabric", "").partition("next")[0]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    files = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").iterdir()}
    products = {"config.yaml", "environment.json", "metrics.csv", "metrics.jsonl", "model.pt", "result.json"}
    products |= {"misclassified.png"}
    assert files == products | {"checkpoints", "ranks", ".lock"}
