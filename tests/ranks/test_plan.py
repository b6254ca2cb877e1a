"""`python -m recipes.plan` as a person types it: a table, a command, one's own task and recipe, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lockstep.plan.hardware import load_hardware
from tests.helpers.harness import ROOT, command

OWN_RECIPE = ROOT / "tests" / "helpers" / "own_recipe.py"
OWN_TASK = f"task={ROOT / 'examples' / 'tabular.py'}:Diabetes"


@pytest.mark.slow
def test_a_task_and_a_recipe_of_ones_own_are_planned(tmp_path: Path) -> None:
    words = ("recipes=[ddp," + str(OWN_RECIPE) + "]", OWN_TASK, "gpus=16", "hardware=a100", "price=2", "json=true")
    done = command("-m", "recipes.plan", *words, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows = {row["label"]: row for row in found["rows"]}
    assert rows.keys() >= {"ddp", "own_recipe"}
    ddp, own = rows["ddp"], rows["own_recipe"]
    assert ddp["as_formula"]
    assert ddp["traffic"] == own["traffic"]
    assert ddp["traffic"][0][:2] == ["all-reduce", "between"]
    assert OWN_RECIPE.name in own["command"]
    assert OWN_TASK in own["command"]
    assert "+cluster=slurm cluster.nodes=2 cluster.tasks_per_node=8" in own["command"]
    assert ddp["global_batch_size"] % 16 == 0
    assert ddp["cost"] == pytest.approx(2 * ddp["hours"])
    assert not list(tmp_path.iterdir()), "a plan writes nothing"


@pytest.mark.soak
@pytest.mark.parametrize(
    ("ranks", "recipes"),
    [(2, "fsdp,deepspeed_zero,pipeline_parallel"), pytest.param(4, "ddp", id="more ranks than cores")],
)
def test_real_ranks_send_and_hold_what_is_planned(ranks: int, recipes: str, tmp_path: Path) -> None:
    words = (
        "check=true",
        f"nproc={ranks}",
        "task=language",
        f"recipes=[{recipes}]",
        "threads=1",
        f"out={tmp_path / 'run'}",
    )
    done = command("-m", "recipes.plan", *words, cwd=tmp_path, timeout=560)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "run" / "check.json").read_text(encoding="utf-8"))
    assert {row["label"] for row in rows} >= set(recipes.split(","))
    for row in rows:
        assert row["ranks"] == ranks
        assert row["bytes_predicted"] == row["bytes_measured"], row["label"]
        assert abs(row["memory_error"]) < 0.05, row["label"]
        assert row["seconds_predicted"] > 0
    assert load_hardware(str(tmp_path / "run" / "hardware.yaml")).device == "cpu"
    assert "measured here" in done.stdout


@pytest.mark.slow
def test_the_table_ends_with_a_command(tmp_path: Path) -> None:
    done = command("-m", "recipes.plan", "task=language", "recipes=[ddp,fsdp]", cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "fastest that fits: " in done.stdout
    assert "  python -m recipes." in done.stdout
    assert "bytes counted equal the formula in 5 of 5 rows" in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.split("bytes counted")[0].splitlines())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("check=true", "gpus=16"),
            "gpus=16: means nothing to check=true, which plans for the ranks here; leave it out",
        ),
        (("check=true", "json=true"), "json=true: means nothing to check=true"),
        (("hardware=h101",), "hardware=h101: no such profile; allowed are"),
        (("gpus=0",), "gpus=0"),
        (("gpus=2048",), "gpus=2048: a table is of at most 1,024 devices; add curve=true"),
        (("curve=true", "gpus=64", "plot=curve.txt"), "plot=curve.txt: the name must end with .png"),
        (("network=nvlink4",), "network=nvlink4: no such link; allowed are 100gbe"),
        (
            ("recipes=[grad_accumulation]",),
            "grad_accumulation]: is not planned yet; plan ddp with accumulate=N; allowed are single, ddp",
        ),
        (
            ("task=language", "recipes=[parallel_mesh]", "replicate=3"),
            "replicate=3: pipeline=1 × context=1 × tensor=2 leave 4 groups",
        ),
        (("task=language", "recipes=[parallel_mesh]", "pipeline=2"), "pipeline=2: a plan has stages of one rank each"),
        (
            ("recipes=[fsdp]", "offload=true", f"hardware={Path(__file__).parents[2] / 'benchmarks' / 'p100.yaml'}"),
            "its profile does not know the host; give it offload: {memory, memory_bandwidth, memory_achieved, bandwidth,",
        ),
        (("task=language", "recipes=[tensor_parallel]", "tensor=3"), "tensor=3: 3 ranks share"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = command("-m", "recipes.plan", *words, cwd=tmp_path, timeout=240)
    assert done.returncode == 2, done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert said in last
    assert "Traceback" not in done.stderr
