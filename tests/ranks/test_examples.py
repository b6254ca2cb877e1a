"""A project of one's own, outside the package: every file of examples/ under DDP and FSDP, killed and resumed, and what
each of them is there to show."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from lockstep.checkpoint.directory import read_pointer
from lockstep.config.run_directory import freeze
from lockstep.config.schema import Config
from lockstep.distributed.process_group import World
from lockstep.launch.validate import validate
from lockstep.recipe import Recipe
from lockstep.run import Run
from recipes import ddp, fsdp, pipeline_parallel, single
from tests.helpers import averaged_fsdp
from tests.helpers.examples import example, kill_a_rank, write_pictures, write_text
from tests.helpers.harness import assert_equal, compose_config, execute, lines, result, run_ranks, tensors_of, train

TASKS = {
    "tabular": ("tabular.py:Diabetes", ("task.dropout=0.1", "global_batch_size=38")),
    "gpt": ("text_gpt.py:TextGpt", ("task.width=16", "task.depth=2", "global_batch_size=12")),
    "vit": ("vit_folder.py:Vit", ("task.width=16", "task.depth=2", "task.size=16", "global_batch_size=6")),
    "digits": ("two_optimizers.py:Digits", ("task.hidden=16", "global_batch_size=96")),
}
STEPS = 9
SHORT = (f"max_steps={STEPS}", "epochs=20", "log_every=1", "checkpoint.every=4", "optim=adamw")
LOOP: Recipe = importlib.import_module("examples.two_optimizers").train
CASES: dict[str, tuple[Recipe, str, tuple[str, ...]]] = {
    **{f"{name} by {recipe.name}": (recipe, name, ()) for name in TASKS for recipe in (ddp.train, fsdp.train)},
    "a loop of one's own": (LOOP, "digits", ("gradients.log=true",)),
    "a loop of one's own in fp16": (LOOP, "digits", ("precision=fp16", "accumulate=2", "gradients.clip_norm=1")),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the examples are told of their data."""
    folder = tmp_path_factory.mktemp("data")
    return {
        "tabular": "",
        "gpt": f"task.file={write_text(folder / 'text.txt')}",
        "vit": f"task.folder={write_pictures(folder / 'pictures')}",
        "digits": "",
    }


def words_of(name: str, data: dict[str, str], own: bool = False) -> list[str]:
    """The words that train an example's task; `own`: by its own recipe, which names the task itself."""
    task, words = TASKS[name]
    return [*([] if own else [f"task={example(task)}"]), *filter(None, [data[name]]), *words, *SHORT]


@pytest.mark.slow_except("tabular by ddp")
@pytest.mark.parametrize("case", CASES)
def test_killed_and_started_again_it_ends_with_the_same_bits(case: str, data: dict[str, str], tmp_path: Path) -> None:
    recipe, name, more = CASES[case]
    words = [*words_of(name, data, own=recipe is LOOP), *more]
    whole = train(recipe, tmp_path / "whole", 2, *words)
    kill_a_rank(recipe, example(TASKS[name][0]), tmp_path / "parts", 2, 7, 4, *words)
    parts = train(recipe, tmp_path / "parts", 2, *words)
    assert result(tmp_path / "parts")["resumed_from"] == "checkpoints/step-00000004"
    assert_equal(parts, whole)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert not all(torch.equal(tensor, torch.zeros_like(tensor)) for tensor in whole.values())


# A ViT on JPEGs: random transforms of torchvision's -------------------------------------------------------------------


def batches_of(world: World, recipe: str, config: Config, out: str, start: int) -> list[tuple[Tensor, Tensor]]:
    """This rank's inputs and targets from step `start` on."""
    run = Run("ddp", config, world, Path(out))
    return [(batch.inputs, batch.targets) for batch in run.batches(start, STEPS)]


def read(ranks: int, workers: int, start: int, data: dict[str, str], out: Path) -> list[tuple[Tensor, Tensor]]:
    """The global batches from step `start` on, put together from the ranks' shares."""
    config = compose_config(ddp.train, *words_of("vit", data), f"data.workers={workers}", f"out={out}")
    validate(config, ddp.train, ranks)
    assert freeze(config, "ddp")
    shares = run_ranks(batches_of, ranks, "ddp", config, str(out), start)
    steps = zip(*shares, strict=True)
    return [tuple(torch.cat(parts) for parts in zip(*step, strict=True)) for step in steps]  # type: ignore[misc]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_random_transforms_depend_on_no_rank_no_worker_and_no_resume(
    ranks: int, workers: int, data: dict[str, str], tmp_path: Path
) -> None:
    """RandomResizedCrop, RandomRotation and ColorJitter over JPEGs: the very same floats."""
    whole = read(1, 0, 0, data, tmp_path / "whole")
    assert len(whole) == STEPS
    first, again = whole[0], whole[2]  # of two epochs: 12 pictures, 6 a batch
    assert not any(torch.equal(one, other) for one in first[0] for other in again[0]), "each epoch draws anew"
    for start in (0, 5):
        found = read(ranks, workers, start, data, tmp_path / f"from {start}")
        assert len(found) == STEPS - start
        for (inputs, targets), mine in zip(found, whole[start:], strict=True):
            assert torch.equal(inputs, mine[0])
            assert torch.equal(targets, mine[1])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_vit_killed_on_any_ranks_has_one_process_s_losses(
    ranks: int, workers: int, data: dict[str, str], tmp_path: Path
) -> None:
    words = [*words_of("vit", data), "precision=fp64"]
    execute(single.train, tmp_path / "whole", 1, *words, "data.workers=0")
    words.append(f"data.workers={workers}")
    kill_a_rank(ddp.train, example(TASKS["vit"][0]), tmp_path / "parts", ranks, 7, 4, *words)
    execute(ddp.train, tmp_path / "parts", ranks, *words)
    assert result(tmp_path / "parts")["resumed_from"] == "checkpoints/step-00000004"
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-10)
    parts, whole = (result(tmp_path / name)["misclassified"] for name in ("parts", "whole"))
    assert parts == whole != [], "what the task takes for a mistake"
    shown = (tmp_path / "parts" / "misclassified.png", tmp_path / "whole" / "misclassified.png")
    assert shown[0].read_bytes() == shown[1].read_bytes(), "as the task shows it"
    assert Image.open(shown[0]).width > 64 * min(8, len(whole)), "side by side, large enough to be seen"


def losses(out: Path) -> list[float]:
    found = [line["loss"] for line in lines(out) if "loss" in line]
    assert len(found) == STEPS
    return found


# A GPT on ragged lines: collate and weigh -----------------------------------------------------------------------------


RAGGED: dict[str, tuple[Recipe, int, tuple[str, ...]]] = {
    "ddp": (ddp.train, 3, ("accumulate=2",)),
    "fsdp": (fsdp.train, 3, ("accumulate=2",)),
    "pipeline": (pipeline_parallel.train, 2, ("micro_batches=5",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RAGGED)
def test_every_character_of_ragged_lines_weighs_the_same(name: str, data: dict[str, str], tmp_path: Path) -> None:
    """15 lines a batch: 3 ranks, 5 lines each, in micro-batches of 3 and 2, all of them of other lengths; or two stages,
    between which each batch's activations are as long as its longest line."""
    recipe, ranks, more = RAGGED[name]
    words = [*words_of("gpt", data), "precision=fp64", "global_batch_size=15"]
    alone = train(single.train, tmp_path / "alone", 1, *words)
    found = train(recipe, tmp_path / "ranks", ranks, *words, *more)
    assert losses(tmp_path / "ranks") == pytest.approx(losses(tmp_path / "alone"), rel=1e-10)
    assert all(torch.allclose(found[key], alone[key], rtol=0, atol=1e-10) for key in alone)
    one, other = (result(tmp_path / run)["eval_bits_per_byte"] for run in ("alone", "ranks"))
    assert one == pytest.approx(other, rel=1e-10)


# A regression: metrics of one's own -----------------------------------------------------------------------------------


def test_own_metrics_are_the_same_bits_on_any_ranks_and_scikit_learn_s(data: dict[str, str], tmp_path: Path) -> None:
    """The weights stay as they were drawn, so that all evaluate the same model."""
    from sklearn.metrics import mean_absolute_error, r2_score

    words = [*words_of("tabular", data), "optim.lr=0", "optim.weight_decay=0", "eval_batch_size=7", "max_steps=1"]
    found: list[Any] = []
    for ranks, recipe in ((1, single.train), (2, ddp.train), (3, fsdp.train)):
        words[-1] = "max_steps=1"
        execute(recipe, tmp_path / str(ranks), ranks, *words, f"global_batch_size={12 * ranks}")
        found.append({key: value for key, value in result(tmp_path / str(ranks)).items() if key.startswith("eval_")})
    assert found[0] == found[1] == found[2]
    assert {"eval_mae", "eval_r2", "eval_loss"} <= found[0].keys()
    task = importlib.import_module("examples.tabular").Diabetes()
    model = task.build_model().double()
    model.load_state_dict(torch.load(tmp_path / "1" / "model.pt", weights_only=True))
    inputs, targets = task.eval_set.tensors
    with torch.no_grad():
        predicted = model.eval()(inputs.double()) * task.spread + task.mean
    # The run computed its forward in fp32.
    assert found[0]["eval_mae"] == pytest.approx(mean_absolute_error(targets, predicted), rel=1e-5)
    assert found[0]["eval_r2"] == pytest.approx(r2_score(targets, predicted), rel=1e-3)


@pytest.mark.slow_except("words1")
@pytest.mark.parametrize(
    ("words", "best"),
    [(["metric=mae"], "mae"), (["metric=eval_r2"], "r2"), (["metric=mae", "metric_mode=max"], "worst")],
)
def test_any_metric_says_what_is_best_and_when_to_stop(
    words: list[str], best: str, data: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    more = ["max_steps=null", "epochs=12", "optim.lr=0.05", "patience=2", "checkpoint.best=true"]
    execute(ddp.train, out, 2, *words_of("tabular", data), *more, *words)
    name = {"mae": "eval_mae", "r2": "eval_r2", "worst": "eval_mae"}[best]
    values = {line["step"]: line[name] for line in lines(out) if name in line}
    extreme = min(values.values()) if best == "mae" else max(values.values())
    kept = read_pointer(out / "checkpoints", "BEST")
    assert kept is not None
    assert values[int(kept.name.removeprefix("step-"))] == extreme
    waited = len(values) - 1 - list(values.values()).index(extreme)
    assert waited == 2 or len(values) == 12


def test_nothing_to_evaluate_and_evaluation_at_the_end_alone(data: dict[str, str], tmp_path: Path) -> None:
    own = tmp_path / "blind.py"
    own.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(example('')).resolve())!r})\nfrom tabular import Diabetes\n\n\n"
        "class Blind(Diabetes):\n    best = 'loss'\n\n    def __post_init__(self):\n"
        "        super().__post_init__()\n        self.eval_set = None\n"
    )
    execute(ddp.train, tmp_path / "blind", 2, f"task={own}:Blind", *words_of("tabular", data)[1:])
    assert not any(key.startswith("eval") for line in lines(tmp_path / "blind") for key in line)
    assert result(tmp_path / "blind")["status"] == "finished"
    execute(ddp.train, tmp_path / "end", 2, *words_of("tabular", data), "max_steps=18", "eval_every=0")
    assert [line["step"] for line in lines(tmp_path / "end") if "eval_mae" in line] == [18]


# A loop of one's own, which evaluates an average of the weights -------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loop", "prefix"),
    [
        pytest.param(LOOP, "keep.average.module.", id="of DDP"),
        pytest.param(averaged_fsdp.train, "keep.average.", id="of FSDP"),
    ],
)
def test_the_best_that_is_exported_is_what_was_evaluated(
    loop: Recipe, prefix: str, data: dict[str, str], tmp_path: Path
) -> None:
    """The average, and not the weights that are trained; after a kill as well."""
    words = [*words_of("digits", data, own=True), "epochs=4", "max_steps=null", "checkpoint.best=true", "decay=0.9"]
    words += ["optim.lr=0.3", "checkpoint.every=1000", "checkpoint.asynchronous=true"]
    execute(loop, tmp_path / "whole", 2, *words)
    found = result(tmp_path / "whole")
    values = {line["step"]: line["eval_accuracy"] for line in lines(tmp_path / "whole") if "eval_accuracy" in line}
    best = max(values, key=values.__getitem__)
    assert best < max(values), "else this would show nothing: choose another learning rate"
    weights = torch.load(tmp_path / "whole" / "best.pt", weights_only=True)
    assert accuracy(weights) == found["best_eval_accuracy"] == values[best]
    kept = read_pointer(tmp_path / "whole" / "checkpoints", "BEST")
    assert kept is not None
    saved = tensors_of(kept)
    assert_equal({name: saved[prefix + name] for name in weights}, weights)
    assert not any(torch.equal(saved[f"model.{name}"], tensor) for name, tensor in weights.items())
    kill_a_rank(loop, example(TASKS["digits"][0]), tmp_path / "parts", 2, best + 3, best, *words)
    assert_equal(train(loop, tmp_path / "parts", 2, *words), torch.load(tmp_path / "whole" / "model.pt"))
    assert_equal(torch.load(tmp_path / "parts" / "best.pt", weights_only=True), weights)


def accuracy(weights: dict[str, Tensor]) -> float:
    """Of the digits' model with these weights, over its evaluation set."""
    task = importlib.import_module("examples.two_optimizers").Digits(hidden=16)
    model = task.build_model()
    model.load_state_dict(weights)
    inputs, targets = task.eval_set.tensors
    with torch.no_grad():
        return float((model.eval()(inputs).argmax(1) == targets).double().mean())


def test_a_model_that_is_only_put_together_is_not_saved_twice(data: dict[str, str], tmp_path: Path) -> None:
    """What `whole` gives in a pipeline is what its stages have saved."""
    words = [*words_of("gpt", data), "checkpoint.best=true", "eval_every=1", "checkpoint.every=4"]
    execute(pipeline_parallel.train, tmp_path / "run", 2, *words)
    kept = read_pointer(tmp_path / "run" / "checkpoints", "BEST")
    assert kept is not None
    assert not any(name.startswith("whole.") for name in tensors_of(kept))
    assert (tmp_path / "run" / "best.pt").exists()
