"""The config: every option composes, says what it does, and is held to the schema by name."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from itertools import product, zip_longest
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lockstep.config import help
from lockstep.config.check import check_values
from lockstep.config.compose import compose
from lockstep.config.declared import declared, own_keys, read_config, schema_of
from lockstep.config.keys import walk
from lockstep.config.run_directory import already_finished, ended_by
from lockstep.config.schema import Config, to_yaml
from lockstep.config.tasks import short_name
from lockstep.errors import UserError
from recipes import ddp, single, verify
from tests.helpers.command_line import assert_one_line, run_main
from tests.helpers.harness import ROOT, command, compose_config

CONF = ROOT / "conf"
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("[!_]*.py"))
OPTIONS = [f"{path.parent.name}={path.stem}" for path in sorted(CONF.glob("*/*.yaml")) if path.parent.name != "plan"]
FIXED_NAMES = """
    model data data.root optim global_batch_size epochs max_steps seed precision compile channels_last accumulate nproc device
    backend timeout_seconds model.norm model.num_classes model.image_size optim.lr optim.momentum optim.weight_decay
    checkpoint.every checkpoint.keep resume out logger cluster.nodes cluster.gpus_per_node cluster.tasks_per_node
    cluster.partition cluster.account cluster.time_minutes cluster.follow
""".split()


def together() -> list[list[str]]:
    """Every option of every group, with as many of other groups at once as there are."""
    groups: dict[str, list[str]] = {}
    for option in OPTIONS:
        groups.setdefault(option.partition("=")[0], []).append(option)
    return [[option for option in options if option] for options in zip_longest(*groups.values())]


@pytest.mark.slow_except("ddp", "tune")
@pytest.mark.parametrize(
    ("name", "options"),
    [("ddp", [option]) for option in OPTIONS if not option.startswith("tune=")] + list(product(RECIPES, together())),
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_every_recipe_composes_with_every_option(name: str, options: list[str]) -> None:
    options = [option for option in options if name == "tune" or not option.startswith("tune=")]
    if importlib.import_module(f"recipes.{name}").train.task:  # not of images
        options = [option for option in options if not option.startswith(("data=", "model="))]
    words = ["+" * option.startswith(("cluster", "debug")) + option for option in options]
    config = compose_config(importlib.import_module(f"recipes.{name}").train, *words)
    for group, _, choice in (option.partition("=") for option in options):
        if group == "cluster":
            assert config.cluster is not None
        elif group == "tune":
            assert config.tune.space
        elif group == "logger":  # which may be several
            chosen = [kind for kind in ("csv", "mllog", "tensorboard", "wandb") if getattr(config.logger, kind)]
            assert chosen == [choice]
        elif group != "debug":
            assert getattr(config, group).name == choice
    recipe = importlib.import_module(f"recipes.{name}").train
    assert read_config(recipe, to_yaml(config)) == config, "a rank reads back what was frozen"


@pytest.mark.parametrize("words", ["logger=[csv,wandb]", "logger=[wandb,csv]"])
def test_loggers_are_any_mix(words: str) -> None:
    chosen = compose_config(ddp.train, words).logger
    assert (chosen.csv, chosen.tensorboard, chosen.wandb) == (True, False, True)


def test_a_yaml_belongs_to_a_recipe() -> None:
    assert {path.stem for path in CONF.glob("*.yaml")} - {"base"} < set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_s_keys_are_read_from_its_file_without_running_it(name: str) -> None:
    recipe, read = importlib.import_module(f"recipes.{name}").train, declared(ROOT / "recipes" / f"{name}.py")
    assert read is not None
    for what in ("name", "doc", "word", "several", "looks_at"):
        assert getattr(read, what) == getattr(recipe, what)
    mine, theirs = (list(walk(each.config())) for each in (recipe, read))
    assert mine == theirs


@pytest.mark.parametrize("future", ["", "from __future__ import annotations"])
def test_a_tool_has_the_keys_of_the_recipe_that_it_runs(future: str, tmp_path: Path) -> None:
    """Also where the recipe's annotations are texts, which are to be looked up where it stands."""
    own = [
        name for name in RECIPES if re.search(r"^class \w+\(Config\)", (ROOT / f"recipes/{name}.py").read_text(), re.M)
    ]
    assert {"context_parallel", "fsdp", "pipeline_parallel"} <= set(own)
    for name in own:
        lines = (ROOT / f"recipes/{name}.py").read_text().splitlines()
        lines.insert(ast.parse("\n".join(lines)).body[0].end_lineno or 0, future)
        (tmp_path / f"{name}.py").write_text("\n".join(lines))
        schema = schema_of(verify.train, [f"recipes=[{tmp_path / name}.py]"])
        keys = {key.partition(".")[0] for key in OmegaConf.structured(schema)}
        assert keys >= own_keys(importlib.import_module(f"recipes.{name}").train.config), name


def test_the_shared_schema_names_no_recipe() -> None:
    texts = (ROOT / "src" / "lockstep" / "config" / "schema.py").read_text()
    assert not [name for name in RECIPES if f"recipes.{name}" in texts]
    assert all(
        not own_keys(Config) & own_keys(importlib.import_module(f"recipes.{name}").train.config) for name in RECIPES
    )


def test_the_names_users_type_exist() -> None:
    """Scripts outside this project rely on them."""
    config = compose_config(ddp.train, "+cluster=slurm")
    for name in FIXED_NAMES:
        found = config
        for part in name.split("."):
            assert hasattr(found, part), name
            found = getattr(found, part)


def test_the_defaults_are_within_their_own_rules() -> None:
    check_values(Config())
    assert all(rule["help"] for _, _, rule in walk(Config()))


def test_a_cluster_file_sets_nothing_but_the_cluster(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "site.yaml").write_text("# @package _global_\ncluster: {nodes: 2}\noptim: {lr: 7.0}\n")
    with pytest.raises(UserError, match=r"the cluster file sets optim: it may set cluster\.\* only"):
        compose_config(ddp.train, f"--config-dir={tmp_path}", "+cluster=site")


def test_a_private_site_file_is_found_and_a_typo_in_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    site = tmp_path / "cluster" / "site.yaml"
    site.write_text("defaults: [schema]\nnodes: 3\n")
    config = compose_config(ddp.train, f"--config-dir={tmp_path}", "+cluster=site", "cluster.partition=big")
    assert config.cluster is not None
    assert (config.cluster.nodes, config.cluster.partition) == (3, "big")
    site.write_text("defaults: [schema]\npartitoin: gpu\n")
    with pytest.raises(
        UserError, match=r"unknown key cluster\.partitoin in cluster/site\.yaml; did you mean cluster\.partition"
    ):
        compose_config(ddp.train, f"--config-dir={tmp_path}", "+cluster=site")


def page(name: str, everything: bool) -> str:
    recipe = importlib.import_module(f"recipes.{name}").train
    return help.text(recipe, schema_of(recipe, []), [CONF], everything)


def keys_in(text: str) -> set[str]:
    """The keys that a page of help lists."""
    return {line.strip().partition("=")[0] for line in text.splitlines() if re.match(r"  [a-z0-9_.]+=", line)}


@pytest.mark.parametrize("name", ["ddp", "fsdp", "pipeline_parallel", "tune"])
def test_help_begins_with_the_keys_people_use_first_and_all_has_every_key_the_recipe_reads(name: str) -> None:
    recipe = importlib.import_module(f"recipes.{name}").train
    first, whole = page(name, everything=False), page(name, everything=True)
    schema = schema_of(recipe, [])
    every = {"task" if key == "task.name" else key for key, _, _ in walk(schema())}
    own = {key for key in every if key.partition(".")[0] in own_keys(schema)}
    assert own <= keys_in(first)
    assert len(keys_in(first) - own) <= 21
    assert every <= keys_in(whole)
    for text in (first, whole):
        assert " ".join(text.split()).startswith(recipe.doc.strip().splitlines()[0])
        assert all(len(line) <= 80 or len(line.split()) == 1 for line in text.splitlines()), "an address is one word"
    said = " ".join(whole.split())
    assert all(" ".join(rule["help"].split()) in said for _, _, rule in walk(schema()))
    assert "stages" in keys_in(page("pipeline_parallel", everything=False))
    assert not {"stages", "replicate", "rounds"} & keys_in(page("ddp", everything=True))


def test_help_is_printed_by_the_command(tmp_path: Path) -> None:
    said = command("-m", "recipes.ddp", "--help", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("DistributedDataParallel: ")
    assert "[resnet18|resnet34|resnet50|resnet101|resnet152|narrow_resnet18]" in "".join(said.stdout.split())
    assert list(tmp_path.iterdir()) == []


def test_cfg_prints_the_composed_config(tmp_path: Path) -> None:
    said = command("-m", "recipes.ddp", "--cfg", "job", "optim.lr=0.5", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert "lr: 0.5" in said.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_list_of_recipes_has_each_in_its_group(width: int) -> None:
    said = command("-m", "recipes", COLUMNS=str(width))
    for name in RECIPES:
        assert any(line.split(maxsplit=1)[0] == name and len(line) > 30 for line in said.stdout.splitlines() if line)
    assert max(map(len, said.stdout.splitlines())) <= width
    groups = {text.partition(":\n")[0]: text.split() for text in said.stdout.split("\n\n")[1:]}
    some = {"Techniques": "ddp", "Techniques by another library's engine": "deepspeed_zero", "Tools": "tune"}
    assert all(name in groups[group] for group, name in some.items())
    assert list(groups) == list(some)


TWO_TASKS = """
from dataclasses import dataclass

@dataclass
class NAME:
    hidden: int = 3
    NAME: int = 1
    train_set = ()
    def build_model(self): ...
    def loss(self, outputs, targets): ...
"""
SWEEPS = {
    "model=resnet18,resnet34": ["resnet18", "resnet34"],
    "model.name=resnet18,resnet34": ["resnet18", "resnet34"],
    "model=vit_b_16,resnet18": ["vit_b_16", "resnet18"],
    "task=a.py:A task.hidden=8,16": ["A 8", "A 16"],
    "task=a.py:A,b.py:B": ["A 3", "B 3"],
    "task=images,a.py:A": ["resnet18", "A 3"],
    "task=a.py:A,b.py:B task.hidden=8,16 seed=1": ["A 8", "A 16", "B 8", "B 16"],
}


@pytest.mark.slow_except("model=vit_b_16,resnet18", "task=a.py:A,b.py:B")
@pytest.mark.parametrize("words", SWEEPS)
def test_a_sweep_over_models_and_tasks(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A point for each, every task with keys of its own, and a folder for each point."""
    for name in "AB":
        (tmp_path / f"{name.lower()}.py").write_text(TWO_TASKS.replace("NAME", name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ddp", "-m", *words.split(), "out=sweep"])
    found: list[Config] = []
    compose(ddp.train, found.append)
    told = [
        each.model.name if each.task.name == "images" else f"{short_name(each.task.name)} {vars(each.task)['hidden']}"
        for each in found
    ]
    assert told == SWEEPS[words]
    assert [each.out for each in found] == [f"sweep/{number}" for number in range(len(found))]


def test_a_bad_task_of_a_sweep_is_refused_before_the_first_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.py").write_text(TWO_TASKS.replace("NAME", "A"))
    (tmp_path / "b.py").write_text(TWO_TASKS.replace("NAME", "B"))
    monkeypatch.chdir(tmp_path)
    cases = {
        "-m task=a.py:A,none.py:B": "none.py:B: no such file",
        "-m task=a.py:A,b.py:B task.A=2": "task.A",
        "task=a.py:A,b.py:B": "several tasks are a sweep, a run for each; add -m",
    }
    for words, said in cases.items():
        monkeypatch.setattr(sys, "argv", ["ddp", *words.split()])
        found: list[Config] = []
        with pytest.raises(UserError, match=re.escape(said)):
            compose(ddp.train, found.append)
        assert found == []


BAD_SWEEPS = {
    "seed=range(0,0)": ["seed=range(0,0)", "this sweep has no runs"],
    "seed=1,x": ["seed=x", "Integer"],
    "seed=1 optim.lr=interval(0,1)": ["optim.lr=interval(0,1)", "name some"],
    "optim.lr=0.1,-1": ["optim.lr=-1.0", "from 0 up"],
    "global_batch_size=48,7000": ["global_batch_size=7000", "1437"],
    "nproc=1,5": ["runs on 1 rank, not 5"],
    "model=[resnet18,resnet34]": ["a run has one model", "-m model=resnet18,resnet34"],
}


@pytest.mark.parametrize("words", BAD_SWEEPS)
def test_a_bad_point_of_a_sweep_is_refused_before_the_first_is_trained(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And nothing is left behind, of Hydra's neither."""
    monkeypatch.chdir(tmp_path)
    for out in ([], ["out=sweep"]):
        assert run_main(single.train, ["-m", *words.split(), *out], monkeypatch) == 2
        assert_one_line(capfd, BAD_SWEEPS[words])
    assert list(tmp_path.iterdir()) == []


def test_the_points_of_a_sweep_are_hydra_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its order, numbered, in one folder, and with a private cluster file."""
    site = tmp_path / "site" / "cluster"
    site.mkdir(parents=True)
    (site / "mine.yaml").write_text("defaults: [schema]\nnodes: 3\n")
    monkeypatch.chdir(tmp_path)
    found: list[Config] = []
    words = ["-m", "--config-dir=site", "+cluster=mine", "seed=1,2", "optim.lr=choice(0.1,0.2)", "logger=[csv,wandb]"]
    monkeypatch.setattr(sys, "argv", ["single", *words])
    compose(single.train, found.append)
    assert [(config.seed, config.optim.lr) for config in found] == [(1, 0.1), (1, 0.2), (2, 0.1), (2, 0.2)]
    assert [Path(str(config.out)).name for config in found] == ["0", "1", "2", "3"]
    assert len({Path(str(config.out)).parent for config in found}) == 1
    assert all(config.cluster and config.cluster.nodes == 3 and config.logger.wandb for config in found)
    assert sys.argv[1:] == words
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_what_a_finished_run_is_told_to_do_trains_it_on() -> None:
    """Not in a circle: where its epochs or its patience ended it, max_steps would not."""
    config = Config(out="run", epochs=2, max_steps=50)
    assert ended_by(config, {"epochs": 2, "steps": 8}) == "epochs"
    assert ended_by(config, {"epochs": 1, "steps": 50}) == "max_steps"
    assert ended_by(Config(epochs=9, patience=1), {"epochs": 1, "steps": 5}) == "patience"
    assert "raise max_steps" in already_finished(Config(out="nowhere"))


def test_a_key_of_two_recipes_has_each_one_s_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """`context` is 2 in one and 1 in the other: a tool that runs both gives each its own, unless it is told."""
    from lockstep.config.copies import convert
    from recipes import context_parallel, parallel_mesh

    named = "recipes=[context_parallel,parallel_mesh]"
    for words, expected in (([named], (2, 1)), ([named, "context=4"], (4, 4))):
        monkeypatch.setattr("sys.argv", ["recipes.verify", *words])
        configs: list[Config] = []
        compose(verify.train, configs.append)
        schemas = context_parallel.ContextParallelConfig, parallel_mesh.ParallelMeshConfig
        assert tuple(convert(configs[0], schema).context for schema in schemas) == expected
