"""Loss, accuracy and macro-F1: exact on any number of ranks, and what decides on the best model and on an early end."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import multiclass_f1_score

from lockstep.config.schema import Config
from lockstep.data.batch import Batch
from lockstep.data.sampler import EvalSampler
from lockstep.distributed.process_group import World
from lockstep.registry import list_recipes
from lockstep.run import Run
from lockstep.tasks.images import Images
from lockstep.training.evaluate import Evaluation, Tally
from tests.helpers.harness import execute, lines, preload, result, run_ranks
from tests.ranks.test_run import in_run

pytestmark = pytest.mark.usefixtures("narrow")

CLASSES, IMAGES, BATCH = 12, 50, 7


def answers(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [50, 12] and labels: no image is of class 3, none is taken for class 5, and 8 is neither."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (IMAGES,), generator=generator)
    labels[(labels == 3) | (labels == 8)] = 1
    logits = torch.randn(IMAGES, CLASSES, generator=generator)
    logits[torch.arange(IMAGES), labels] += 1.5
    logits[:, [5, 8]] = -9.0
    logits[0, 3] = 9.0
    return logits, labels


def tallied(world: World, seed: int) -> Evaluation:
    logits, labels = answers(seed)
    sampler = EvalSampler(IMAGES, BATCH, world.rank, world.world_size)
    tally = Tally(Images(Config()), sampler, None)
    for _, which in sampler:
        tally.add(logits[which], Batch(None, labels[which], len(which)))
    return tally.result(world.device)


def test_they_are_scikit_learn_s_and_torchmetrics_on_any_number_of_ranks() -> None:
    """Of nine ranks one has no batch. A class that no image has counts 0 if some are taken for it, else not at all."""
    for seed, ranks in ((0, (1, 3, 9)), (1, (1, 2))):
        logits, labels = answers(seed)
        taken_for = logits.argmax(1)
        assert 3 not in labels
        assert 3 in taken_for
        found = [each for count in ranks for each in run_ranks(tallied, count, seed)]
        assert all(each == found[0] for each in found), "to the last bit, and on every rank"
        assert found[0].count == IMAGES
        assert found[0].metrics["accuracy"] == accuracy_score(labels, taken_for)
        assert found[0].loss == pytest.approx(cross_entropy(logits.double(), labels).item(), rel=1e-12)
        assert found[0].metrics["f1"] == pytest.approx(f1_score(labels, taken_for, average="macro"), rel=1e-12)
        theirs = multiclass_f1_score(logits, labels, num_classes=CLASSES, average="macro").item()
        assert found[0].metrics["f1"] == pytest.approx(theirs, rel=1e-6), "which computes in fp32"


def test_an_evaluation_is_logged_shown_and_in_the_result(tmp_path: Path) -> None:
    from recipes import single

    execute(single.train, tmp_path / "run", 1, "data=synthetic", "data.size=8", "global_batch_size=4", "max_steps=2")
    score = result(tmp_path / "run")["eval_f1"]
    assert 0 <= score <= 1
    assert lines(tmp_path / "run")[-1]["eval_f1"] == score
    header, *rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert dict(zip(header.split(","), rows[-1].split(","), strict=True))["eval_f1"] == str(score)
    said = (tmp_path / "run" / "ranks" / "0.log").read_text()
    assert f"%  F1 {score:.4f}\n" in said, "when it was evaluated"
    assert f"%, F1 {score:.4f}, of 2 evaluation images\n" in said, "at the end"


# What is best -----------------------------------------------------------------------------------------------------

# Seed 2 has them come apart: (evaluations without a better one to wait for, step of the best one, last step).
ENDS = {"eval_accuracy": (2, 4, 12), "eval_f1": (2, 8, 16), "eval_loss": (1, 4, 8)}
TINY = (
    "data=synthetic",
    "data.size=48",
    "data.image_size=8",
    "global_batch_size=12",
    "epochs=8",
    "optim.warmup_steps=2",
)
OWN = {"pipeline_parallel": ("stages=2", "micro_batches=2"), "grad_accumulation": ("accumulate=2",)}
ALONE = ("single", "data_parallel", "model_parallel")
OTHERS = ["transfer_learning", "lora"]  # other models
OTHERS += ["context_parallel", "expert_parallel", "parallel_mesh", "tensor_parallel"]  # of sequences
OTHERS += ["comm_hooks"]  # of gradients that are not quite the same
RECIPES = sorted(set(list_recipes()) - {*OTHERS, "sync_batchnorm"})
QUICK = {("ddp", metric) for metric in ENDS} | {(name, "eval_f1") for name in ("lightning_trainer", "deepspeed_zero")}


@pytest.mark.slow_except("ddp-eval_accuracy")
@pytest.mark.parametrize(
    ("name", "metric"),
    [
        pytest.param(name, metric, marks=[] if (name, metric) in QUICK else pytest.mark.soak)
        for name in RECIPES
        for metric in ENDS
    ],
)
def test_the_same_metric_ends_every_recipe_at_the_same_step(name: str, metric: str, tmp_path: Path) -> None:
    recipe = import_module(f"recipes.{name}").train
    preload(recipe)
    patience, best, last = ENDS[metric]
    words = (*TINY, "model.norm=group", "seed=2", "optim.lr=0.05", f"metric={metric}", f"patience={patience}")
    words = (*words, "checkpoint.best=true", "checkpoint.minutes=0", *OWN.get(name, ()))
    execute(recipe, tmp_path / "run", 1 if name in ALONE else 2, *words)
    assert (tmp_path / "run" / "checkpoints" / "BEST").read_text() == f"step-{best:08d}\n"
    assert result(tmp_path / "run")["steps"] == last
    evaluations = {line["step"]: line[metric] for line in lines(tmp_path / "run") if metric in line}
    assert (min if metric == "eval_loss" else max)(evaluations, key=evaluations.__getitem__) == best
    assert f"stopping early: {metric}" in (tmp_path / "run" / "ranks" / "0.log").read_text()


def judged(run: Run) -> list[Any]:
    found = []
    for loss in (float("nan"), 2.0, float("nan"), 1.0):
        run.loop.checkpoints.judge(Evaluation(loss, count=1))
        found.append((run.loop.checkpoints.best, run.loop.checkpoints.waited))
    return found


def test_what_is_not_a_number_is_never_best(tmp_path: Path) -> None:
    assert in_run(judged, tmp_path, "metric=eval_loss") == [(None, 1), (-2.0, 0), (-2.0, 1), (-1.0, 0)]
