"""A task of one's own and a recipe of one's own in the tools, as files in a folder that is no part of lockstep."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lockstep.config.declared import read_config
from lockstep.config.run_directory import freeze
from lockstep.config.schema import to_yaml
from lockstep.distributed.process_group import World
from lockstep.launch.validate import validate
from lockstep.launch.worker import carry_out
from lockstep.registry import get_recipe, list_recipes
from lockstep.run import Run
from lockstep.verify.proofs import proof_batch
from recipes import doctor, verify
from tests.helpers.examples import example, write_pictures, write_text
from tests.helpers.harness import command, compose_config, execute, run_ranks, verify_rows

TASK = '''
"""A line to be fitted, and a recipe that trains it."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from lockstep import recipe
from lockstep.training.optim import build_optimizer, build_scheduler


@dataclass
class Line:
    hidden: int = 8
    norm: bool = False
    lower_is_better = ("mae",)

    def __post_init__(self):
        x = torch.randn(203, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        y = x.sum(1) + x[:, 0] * x[:, 1]
        self.train_set, self.eval_set = TensorDataset(x[:150], y[:150]), TensorDataset(x[150:], y[150:])

    def build_model(self):
        norm = [nn.BatchNorm1d(self.hidden)] if self.norm else []
        return nn.Sequential(nn.Linear(4, self.hidden), *norm, nn.Tanh(), nn.Linear(self.hidden, 1), nn.Flatten(0))

    def loss(self, outputs, targets):
        return mse_loss(outputs, targets)

    def metrics(self, outputs, targets):
        return {"mae": ((outputs - targets).abs().sum(), len(targets))}


@recipe(task=Line)
def train(run):
    model = DistributedDataParallel(run.place(run.task.build_model()))
    optimizer = build_optimizer(run.config.optim, model)
    scheduler = build_scheduler(run.config.optim, optimizer, run.scheduled_steps)
    for batch in run.steps(model=model, optimizer=optimizer, scheduler=scheduler):
        loss = run.task.loss(model(batch.inputs), batch.targets)
        loss.backward()
        run.record(loss=loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    train.main()
'''
ALONE = TASK.replace("DistributedDataParallel(run.place(run.task.build_model()))", "run.place(run.task.build_model())")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The task's file, which is a recipe as well."""
    file = tmp_path / "line.py"
    file.write_text(TASK)
    return file


def test_every_strategy_trains_a_task_of_ones_own_as_one_process_does(tmp_path: Path) -> None:
    """The command of its docs, for a few recipes."""
    words = (f"task={example('tabular.py:Diabetes')}", "precision=fp64", "max_steps=3")
    execute(verify.train, tmp_path / "run", 2, "recipes=[data_parallel,ddp,fsdp,pipeline_parallel]", *words)
    rows = verify_rows(tmp_path / "run")
    assert [(row["recipe"], row["verdict"]) for row in rows] == [
        (name, "equal") for name in ("data_parallel", "ddp", "fsdp", "pipeline_parallel")
    ]
    assert all(row["weights"] <= 1e-10 and row["gradients"] <= 1e-10 for row in rows)


EXAMPLES = {
    "tabular": ("tabular.py:Diabetes", ()),
    "gpt": ("text_gpt.py:TextGpt", ("task.width=16", "task.depth=2")),
    "vit": ("vit_folder.py:Vit", ("task.width=16", "task.depth=2", "task.size=16")),
    "language": ("language", ()),
}


@pytest.mark.slow
@pytest.mark.soak_for("gpt", "vit", "language")
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_recipe_is_proven_or_says_why_not(name: str, tmp_path: Path) -> None:
    """As typed, and nothing of the batch: the ViT's folder holds 12 pictures to train on."""
    task, words = EXAMPLES[name]
    more = {
        "gpt": f"task.file={write_text(tmp_path / 'text.txt')}",
        "vit": f"task.folder={write_pictures(tmp_path / 'pictures')}",
    }.get(name)
    asked = f"task={task if name == 'language' else example(task)}"
    done = command(
        "-m", "recipes.verify", asked, *words, *filter(None, [more]), "nproc=2", "out=run", cwd=tmp_path, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = verify_rows(tmp_path / "run")
    named = {(row["recipe"], row["precision"]): row for row in rows if not row["variant"].startswith("sync_batchnorm")}
    equal = {recipe for (recipe, precision), row in named.items() if precision == "fp64" and row["verdict"] == "equal"}
    unable = {recipe: row for (recipe, precision), row in named.items() if precision == "fp64" and recipe not in equal}
    parallel = {"context_parallel", "expert_parallel", "parallel_mesh", "tensor_parallel"}
    plan = parallel if name != "language" else set()  # the examples say nothing of them
    assert unable.keys() == {"deepspeed_zero", "sync_batchnorm"} | plan
    assert equal == {name for name in list_recipes() if get_recipe(name).proofs} - unable.keys()
    assert unable["deepspeed_zero"]["verdict"].startswith("not run: precision=fp64: DeepSpeed's optimizer computes in")
    assert "holds no BatchNorm to synchronise" in unable["sync_batchnorm"]["verdict"]
    assert named["deepspeed_zero", "fp32"]["verdict"] == "equal"
    for row in rows:
        assert row["verdict"] == "equal" or row["verdict"].startswith("not run: ")
        assert len(row["verdict"].splitlines()) == 1
        if row["verdict"] == "equal" and row["precision"] == "fp64":
            assert max(row["loss"], row["gradients"], row["weights"], row["buffers"], row["evaluation"]) <= 1e-10


@pytest.mark.parametrize(("samples", "ranks", "size"), [(1437, 2, 28), (12, 2, 12), (11, 3, 6), (3, 2, 2), (1, 2, 2)])
def test_the_batch_fits_the_data_set(samples: int, ranks: int, size: int) -> None:
    assert proof_batch(samples, ranks) == size


def test_the_batch_is_what_was_asked_for_or_one_that_fits(own: Path, tmp_path: Path) -> None:
    """The task itself wants 150, which is no number for a proof."""
    own.write_text(TASK.replace("    norm: bool", "    defaults = {'global_batch_size': 150}\n    norm: bool"))
    words = (f"task={own}:Line", "recipes=[ddp]", "precision=fp64", "max_steps=1")
    for asked, size in (("global_batch_size=auto", 28), ("global_batch_size=50", 50)):
        out = tmp_path / str(size)
        execute(verify.train, out, 2, asked, *words)
        assert verify_rows(out)[0]["verdict"] == "equal"
        assert f"global_batch_size: {size}\n" in (out / "config.yaml").read_text()
        assert json.loads((out / "single-fp64" / "result.json").read_text())["samples_seen"] == size


@pytest.mark.slow
def test_a_task_with_batch_norm_is_equal_where_it_is_synchronised_and_measured_elsewhere(
    own: Path, tmp_path: Path
) -> None:
    words = (f"task={own}:Line", "task.norm=true", "precision=fp64", "max_steps=3")
    execute(verify.train, tmp_path / "run", 2, "recipes=[ddp,sync_batchnorm]", *words)
    ddp, synchronised = verify_rows(tmp_path / "run")
    assert ddp["verdict"] == "differs: BatchNorm normalises by each rank's share"
    assert ddp["loss"] > 1e-5
    assert synchronised["verdict"] == "equal"


@pytest.mark.slow
def test_a_recipe_of_ones_own_is_proven_and_a_broken_one_named(own: Path, tmp_path: Path) -> None:
    (tmp_path / "alone.py").write_text(ALONE)
    words = (f"task={own}:Line", "precision=fp64", "max_steps=3")
    with pytest.raises(AssertionError, match=r"alone in fp64 \(step 1: the gradient of \S+, off by"):
        execute(verify.train, tmp_path / "run", 2, f"recipes=[{own},{tmp_path / 'alone.py'}]", *words)
    rows = verify_rows(tmp_path / "run")
    assert [(row["recipe"], row["verdict"]) for row in rows] == [
        ("line", "equal"),
        ("alone", "OFF: loss, gradients, weights, evaluation"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "code"), [(TASK, 0), (ALONE, 1)])
def test_held_to_itself_on_one_rank(source: str, code: int, tmp_path: Path) -> None:
    """By its file's name alone: its task comes with it."""
    (tmp_path / "mine.py").write_text(source)
    words = ("recipes=[mine.py]", "against=self", "precision=fp64", "out=run")
    done = command("-m", "recipes.verify", *words, cwd=tmp_path, timeout=200)
    assert done.returncode == code, done.stdout + done.stderr
    assert "against itself on one rank" in done.stdout
    if code:
        assert "first at step 2: the loss" in done.stdout
        assert "mine in fp64 (step 2" in done.stderr


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("recipes=[none.py]", "none.py]: no such file"),
        ("recipes=[empty.py]", "the file holds 0 recipes; write @recipe above one function"),
        ("against=all", "against=all: allowed are single, self, the FILE.py of a recipe"),
    ],
)
def test_what_is_no_recipe_is_said_in_a_line(word: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("nothing = 1\n")
    done = command("-m", "recipes.verify", word, "out=run", cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


# compare, tune and doctor -----------------------------------------------------------------------------------------------


def test_doctor_counts_the_memory_of_the_task_s_own_samples(tmp_path: Path) -> None:
    words = (f"task={example('tabular.py:Diabetes')}", "global_batch_size=38", "check=memory", "recipes=[ddp]")
    execute(doctor.train, tmp_path / "run", 2, *words)
    found = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert (found["samples"], found["unit"]) == (19, "patients")
    assert found["total"]["parameters"] == found["ranks"][0]["total"]["parameters"] == 4 * (11 * 64 + 65)


@pytest.mark.slow
def test_doctor_examines_a_recipe_of_ones_own(own: Path, tmp_path: Path) -> None:
    done = command("-m", "recipes.doctor", "recipes=[line.py]", "global_batch_size=30", "out=run", cwd=tmp_path)
    assert "5 steps of line in fp64: equal, weights within" in done.stdout, done.stdout + done.stderr


@pytest.mark.soak
def test_a_comparison_of_own_recipes_tells_of_their_task(own: Path, tmp_path: Path) -> None:
    """What is trained comes with the file; the report has words for it, and not for images."""
    own.write_text(TASK.replace("    norm: bool", "    unit = 'lines'\n    norm: bool"))
    words = ("recipes=[single,ddp,line.py]", "rounds=1", "max_steps=4", "profile=0", "global_batch_size=30", "out=run")
    done = command("-m", "recipes.compare", *words, "verify=true", cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    report = (tmp_path / "run" / "report.html").read_text()
    shown = re.sub(r"<style>.*?</style>|<[^>]+>", " ", report, flags=re.DOTALL).partition("Config")[0]
    assert "Line (hidden=8, norm=False) on TensorDataset: 3 recipes" in shown
    assert "lines/s" in shown
    assert not re.search(r"\bimages?\b|accuracy|resnet|digits", shown, re.IGNORECASE)
    found = json.loads((tmp_path / "run" / "compare.json").read_text())
    assert [row["recipe"] for row in found["rows"]] == ["single", "ddp", "line"]
    assert {row["verdict"] for row in found["verified"]} == {"equal"}
    assert not re.search(r"\bimages?\b", done.stdout)


@pytest.mark.soak
def test_a_search_over_an_own_recipe_and_the_keys_of_its_task(own: Path, tmp_path: Path) -> None:
    words = ("tune.recipe=line.py", "tune=asha", "tune.trials=2", "tune.nproc=1", "epochs=2", "out=run")
    space = ("tune.space.task.hidden=choice(4, 12)", "tune.space.global_batch_size=choice(30, 50)")
    done = command("-m", "recipes.tune", *words, *space, cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Line" in done.stdout
    assert "images" not in done.stdout
    assert f" {own} " in done.stdout, "the command that trains the best one again"
    for trial in ("0", "1"):
        config = (tmp_path / "run" / "trials" / trial / "config.yaml").read_text()
        assert re.search(r"hidden: (4|12)\n", config)


@pytest.mark.slow
def test_another_task_than_a_recipe_s_own_is_said(own: Path, tmp_path: Path) -> None:
    """The command's counts, and the run's log says so."""
    other = tmp_path / "other.py"
    other.write_text(TASK.partition("@recipe")[0].replace("class Line", "class Other"))
    line = get_recipe(str(own))
    said = "task=Other instead of the recipe's own task, Line\n"
    for task, told in ((f"task={other}:Other", True), (f"task={own}:Line", False), ("seed=0", False)):
        config = compose_config(line, task, f"out={tmp_path / task.rpartition('=')[2][-5:]}", "max_steps=1")
        validate(config, line, 1)
        out = freeze(config, line.name)
        run_ranks(carried_out, 1, str(own), to_yaml(config), str(out))
        assert (said in (out / "ranks" / "0.log").read_text()) == told


def carried_out(world: World, file: str, config: str, out: str) -> None:
    line = get_recipe(file)
    carry_out(line, Run(line.name, read_config(line, config), world, Path(out), quiet=True))
