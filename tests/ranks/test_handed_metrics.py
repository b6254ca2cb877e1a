"""torchmetrics' metrics that a task hands in: what they make of the whole evaluation set, to the last bit, on any ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lockstep.checkpoint.directory import read_pointer
from lockstep.data.batch import Batch
from lockstep.data.sampler import EvalSampler
from lockstep.distributed.process_group import World
from lockstep.errors import UserError
from lockstep.recipe import Recipe
from lockstep.training.evaluate import Evaluation, Tally
from recipes import ddp, fsdp, lightning_trainer, pipeline_parallel, single
from tests.helpers import handed_metrics
from tests.helpers.handed_metrics import CLASSES, Handed
from tests.helpers.harness import execute, lines, result, run_ranks

TASK = f"task={handed_metrics.__file__}:Handed"
NAMES = ("f1", "auroc", "calibration", "spread")
SIZE, BATCH = 50, 7  # eight batches, the last of one sample


def answers() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [50, 4] and labels; classes are unequally frequent, and batches hold not all of them."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.multinomial(torch.tensor([0.7, 0.2, 0.07, 0.03]), SIZE, replacement=True, generator=generator)
    logits = torch.randn(SIZE, CLASSES, generator=generator)
    logits[torch.arange(SIZE), labels] += 1
    return logits, labels


def tallied(world: World) -> Evaluation:
    logits, labels = answers()
    sampler = EvalSampler(SIZE, BATCH, world.rank, world.world_size)
    tally = Tally(Handed(), sampler, None)
    for _, which in sampler:
        tally.add(logits[which], Batch(None, labels[which], len(which)))
    return tally.result(world.device)


def test_each_is_what_torchmetrics_makes_of_the_whole_set_on_any_ranks() -> None:
    """Of nine ranks one has no batch."""
    found = [each for ranks in (1, 2, 3, 9) for each in run_ranks(tallied, ranks)]
    assert all(each == found[0] for each in found), "to the last bit, and on every rank"
    logits, labels = answers()
    assert found[0].metrics.keys() == {"right", *NAMES}
    for name, metric in Handed().torchmetrics().items():
        metric.set_dtype(torch.float64)
        assert found[0].metrics[name] == pytest.approx(float(metric(logits.double(), labels)), rel=1e-12), name
    by_batches = [
        Handed().torchmetrics()["auroc"](*part) for part in zip(logits.split(7), labels.split(7), strict=True)
    ]
    assert found[0].metrics["auroc"] != pytest.approx(float(torch.stack(by_batches).mean()), rel=1e-3), (
        "else it shows nothing"
    )


@pytest.mark.slow_except("fsdp")
@pytest.mark.parametrize(
    ("recipe", "ranks"),
    [(ddp.train, 2), (fsdp.train, 3), (pipeline_parallel.train, 2), (lightning_trainer.train, 3)],
    ids=["ddp", "fsdp", "pipeline_parallel", "lightning_trainer"],
)
def test_a_run_on_ranks_has_one_process_s_metrics(recipe: Recipe, ranks: int, tmp_path: Path) -> None:
    """The weights stay as they were drawn, so that all evaluate the same model."""
    words = (TASK, "optim.lr=0", "optim.weight_decay=0", "eval_batch_size=7", "max_steps=1", "global_batch_size=24")
    execute(single.train, tmp_path / "1", 1, *words)
    execute(recipe, tmp_path / "many", ranks, *words, *(["cut=even"] if recipe is pipeline_parallel.train else []))
    alone, many = (
        {name: result(tmp_path / run)[f"eval_{name}"] for name in (*NAMES, "right")} for run in ("1", "many")
    )
    assert alone == many
    assert all(value > 0 for value in alone.values())


@pytest.mark.parametrize("words", [(), ("metric=spread",), ("metric=spread", "metric_mode=max")])
def test_it_says_what_is_best_and_when_to_stop(words: tuple[str, ...], tmp_path: Path) -> None:
    more = ("epochs=12", "optim=sgd", "optim.lr=0.5", "patience=2", "checkpoint.best=true", "log_every=1")
    execute(ddp.train, tmp_path / "run", 2, TASK, "global_batch_size=24", *more, *words)
    name = "eval_spread" if words else "eval_auroc"  # the task's `best`
    values = {line["step"]: line[name] for line in lines(tmp_path / "run") if name in line}
    extreme = (min if words == ("metric=spread",) else max)(values.values())
    kept = read_pointer(tmp_path / "run" / "checkpoints", "BEST")
    assert kept is not None
    assert values[int(kept.name.removeprefix("step-"))] == extreme == result(tmp_path / "run")[f"best_{name}"]
    waited = len(values) - 1 - list(values.values()).index(extreme)
    assert waited == 2 or len(values) == 12


# What is refused ------------------------------------------------------------------------------------------------------


def of_no_number(world: World) -> str:
    from torchmetrics.classification import MulticlassF1Score

    class Each(Handed):
        def torchmetrics(self):  # type: ignore[no-untyped-def]
            return {"f1": MulticlassF1Score(CLASSES, average=None)}

    logits, labels = answers()
    tally = Tally(Each(), EvalSampler(SIZE, SIZE, world.rank, world.world_size), None)
    if world.rank == 0:
        tally.add(logits, Batch(None, labels, SIZE))
    try:
        tally.result(world.device)
    except UserError as error:
        return str(error)
    return ""


def test_what_computes_several_numbers_is_refused_on_all_ranks() -> None:
    for said in run_ranks(of_no_number, 2):
        assert said.startswith("torchmetrics()['f1'] computes float64 [4]; allowed is one number"), said


def test_a_name_that_is_there_twice_is_refused() -> None:
    class Twice(Handed):
        def metrics(self, outputs, targets):  # type: ignore[no-untyped-def]
            return {"f1": (outputs.sum(), 1)}

    tally, (logits, labels) = Tally(Twice(), EvalSampler(SIZE, SIZE, 0, 1), None), answers()
    with pytest.raises(UserError, match=r"the metric f1 in metrics\(\) and in torchmetrics\(\); rename one"):
        tally.add(logits, Batch(None, labels, SIZE))


def test_outputs_that_do_not_fit_are_named_with_their_shapes() -> None:
    class Other(Handed):
        def loss(self, outputs, targets):  # type: ignore[no-untyped-def]
            return outputs.mean()

    tally, (logits, labels) = Tally(Other(), EvalSampler(SIZE, SIZE, 0, 1), None), answers()
    with pytest.raises(UserError, match=r"torchmetrics\(\)\['f1'\].update\(outputs, targets\) failed: .* \[50, 3\]"):
        tally.add(logits[:, :3], Batch(None, labels, SIZE))
