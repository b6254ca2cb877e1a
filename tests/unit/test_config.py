"""The config: every option composes, says what it does, and is held to the schema by name."""

from __future__ import annotations

import importlib
from itertools import product, zip_longest
from pathlib import Path

import pytest

from lockstep.config.schema import Config, check_values, from_yaml, to_yaml, walk
from lockstep.errors import UserError
from recipes import ddp
from tests.helpers.harness import ROOT, command, compose_config

CONF = ROOT / "conf"
RECIPES = sorted(path.stem for path in CONF.glob("*.yaml") if path.stem != "base")
OPTIONS = [f"{path.parent.name}={path.stem}" for path in sorted(CONF.glob("*/*.yaml"))]
FIXED_NAMES = """
    model data data.root optim batch_size epochs max_steps seed precision compile channels_last accumulate nproc device
    backend timeout_seconds model.norm model.num_classes model.image_size optim.lr optim.momentum optim.weight_decay
    checkpoint.every checkpoint.keep resume out monitor cluster.nodes cluster.gpus_per_node cluster.tasks_per_node
    cluster.partition cluster.account cluster.time_minutes cluster.follow
""".split()


def together() -> list[list[str]]:
    """Every option of every group, with as many of other groups at once as there are."""
    groups: dict[str, list[str]] = {}
    for option in OPTIONS:
        groups.setdefault(option.partition("=")[0], []).append(option)
    return [[option for option in options if option] for options in zip_longest(*groups.values())]


@pytest.mark.parametrize(
    ("name", "options"),
    [("ddp", [option]) for option in OPTIONS if not option.startswith("tune=")] + list(product(RECIPES, together())),
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_every_recipe_composes_with_every_option(name: str, options: list[str]) -> None:
    options = [option for option in options if name == "tune" or not option.startswith("tune=")]
    words = ["+" * option.startswith(("cluster", "debug")) + option for option in options]
    config = compose_config(importlib.import_module(f"recipes.{name}").train, *words)
    for group, _, choice in (option.partition("=") for option in options):
        if group == "cluster":
            assert config.cluster is not None
        elif group == "tune":
            assert config.tune.space
        elif group == "monitor":  # which may be several
            chosen = [kind for kind in ("csv", "tensorboard", "wandb") if getattr(config.logger, kind)]
            assert chosen == [choice]
        elif group != "debug":
            assert getattr(config, group).name == choice
    assert from_yaml(to_yaml(config)) == config, "a rank reads back what was frozen"


@pytest.mark.parametrize("words", ["logger=[csv,wandb]", "logger=[wandb,csv]"])
def test_monitors_are_any_mix(words: str) -> None:
    chosen = compose_config(ddp.train, words).monitor
    assert (chosen.csv, chosen.tensorboard, chosen.wandb) == (True, False, True)


def test_there_is_a_yaml_for_every_recipe_and_the_other_way_round() -> None:
    assert set(RECIPES) == {path.stem for path in (ROOT / "recipes").glob("[!_]*.py")}
    assert RECIPES


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


def test_help_explains_the_recipe_its_groups_and_every_key(tmp_path: Path) -> None:
    said = command("-m", "recipes.ddp", "--help", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("DistributedDataParallel: ")
    assert "resnet18, resnet34, resnet50, resnet101, resnet152" in said.stdout
    for name, _, rule in walk(Config()):
        assert f"{name}=" in said.stdout
        assert rule["help"] in said.stdout
    assert list(tmp_path.iterdir()) == []


def test_cfg_prints_the_composed_config(tmp_path: Path) -> None:
    said = command("-m", "recipes.ddp", "--cfg", "job", "optim.lr=0.5", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert "lr: 0.5" in said.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_list_of_recipes_has_a_line_for_each() -> None:
    said = command("-m", "recipes")
    for name in RECIPES:
        assert any(line.split(maxsplit=1)[0] == name and len(line) > 30 for line in said.stdout.splitlines() if line)
