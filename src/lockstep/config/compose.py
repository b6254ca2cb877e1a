"""Hydra, run once: from `conf/` and the command line to a checked Config, with its errors said in one line.

Hydra only composes. It does not change the working directory, makes no output directory and configures no logging.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lockstep.config.schema import ClusterConfig, Config, typed, walk
from lockstep.errors import UserError


class Recipe(Protocol):
    """What composing asks of a recipe; lockstep.recipe.Recipe has it."""

    @property
    def name(self) -> str: ...
    @property
    def doc(self) -> str: ...
    @property
    def train(self) -> Callable[..., None]: ...
    @property
    def word(self) -> str | None: ...
    @property
    def several(self) -> str | None: ...


def compose(recipe: Recipe, use: Callable[[Config], None]) -> None:
    """Compose the command line's config and call `use` with it; with `--multirun`, once for each point.

    Raises:
        UserError: an unknown key or option, a wrong type, a syntax error.
        SystemExit: Hydra was asked to print something (--help, --cfg, …) and has.
    """
    if recipe.word:
        sys.argv = [sys.argv[0], *spelled_out(sys.argv[1:], recipe.word)]
    if recipe.several:
        sys.argv = [sys.argv[0], *(in_plural(word, recipe.several) for word in sys.argv[1:])]
    check_cluster_words(sys.argv[1:])
    GlobalHydra.instance().clear()  # a rank that is a copy of the submitting process has that one's
    register(recipe)
    directory, name = config_source(recipe)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through: `explain` words them
    found: list[BaseException] = []

    def task(composed: DictConfig) -> None:
        if found:
            return
        try:
            use(to_config(composed))
        except BaseException as error:
            found.append(error)  # kept out of Hydra: it is not Hydra's, nor to be worded as if it were

    try:
        if any(word.startswith("-") or "hydra" in word for word in sys.argv[1:]):
            hydra.main(version_base="1.3", config_path=str(directory), config_name=name)(task)()
        else:  # it would compose twice, the first time to learn whether this is a sweep, which it is not
            with hydra.initialize_config_dir(str(directory), version_base="1.3"):
                composed = load_config(name, sys.argv[1:])
                HydraConfig.instance().set_config(composed)
                task(without_hydra(composed))
    except (HydraException, OmegaConfBaseException, ValueError, YAMLError) as error:
        raise explain_config_error(error) from None
    if found:
        raise found[0]


def compose_another(recipe: Recipe, words: list[str]) -> Config:
    """The config that another recipe's command with these words would compose.

    Raises:
        UserError: it would be refused.
    """
    register(recipe)
    directory, name = config_source(recipe)
    here = GlobalHydra.instance()
    with (
        contextlib.nullcontext()
        if here.is_initialized()
        else hydra.initialize_config_dir(str(directory), version_base="1.3")
    ):
        try:
            config = OmegaConf.to_object(without_hydra(load_config(name, words)))
        except (HydraException, OmegaConfBaseException, ValueError, YAMLError) as error:
            raise explain_config_error(error) from None
    assert isinstance(config, Config)
    return config


def load_config(name: str | None, words: list[str]) -> DictConfig:
    """The config of this name with these overrides, and Hydra's own part in it."""
    return GlobalHydra.instance().config_loader().load_configuration(name, overrides=words, run_mode=RunMode.RUN)


def without_hydra(composed: DictConfig) -> DictConfig:
    """Take out Hydra's own part."""
    with open_dict(composed):
        del composed["hydra"]
    return composed


def spelled_out(words: list[str], key: str) -> list[str]:
    """`memory model=resnet50` as `check=memory model=resnet50`, for a tool that is told its task in a plain word."""
    if words and re.fullmatch(r"\w+", words[0]):
        return [f"{key}={words[0]}", *words[1:]]
    return words


def in_plural(word: str, key: str) -> str:
    """`nproc=1,2,4`, which Hydra would take for a sweep, as `nprocs=[1,2,4]`, for a tool that takes several numbers.

    Raises:
        UserError: it is that key, and its value is neither whole numbers nor null.
    """
    name, equals, value = word.partition("=")
    if name != key or not equals:
        return word
    if value == "null":
        return f"{key}s=null"
    if not re.fullmatch(r"(\[?) *\d+( *, *\d+)* *(\]?)", value) or value.startswith("[") != value.endswith("]"):
        raise UserError(f"{word}: allowed are whole numbers from 1 up, one or several, such as {key}=1,2,4")
    return f"{key}s=[{value.strip('[]')}]"


def overrides(tool: Recipe, config: Config, without: Collection[str] = ()) -> list[str]:
    """The words that give a recipe's command what a tool was given: what differs from the tool's own defaults.

    Args:
        without: keys that are left out, and groups of them.
    """
    skip, default = {"cluster", *without}, Config()  # where the tool runs, its recipes run too
    names = {"model": config.model.name, "data": config.data.name, "optim": config.optim.name}
    groups = [
        f"{group}={name}"
        for group, name in names.items()
        if name != getattr(default, group).name and not {group, f"{group}.name"} & skip
    ]
    plain = {name: value for name, value, _ in walk(compose_another(tool, groups))}
    follows = {  # what `complete` fills in, and will fill in again
        "data.num_classes": config.data.name != "synthetic" or config.data.num_classes == 10,
        "model.num_classes": config.model.num_classes == config.data.num_classes,
        "model.image_size": config.model.image_size == config.data.image_size,
    }
    return groups + [
        typed(name, value)
        for name, value, _ in walk(config)
        if not (follows.get(name) or {name, name.partition(".")[0]} & skip) and value != plain[name]
    ]


def check_cluster_words(words: list[str]) -> None:
    """`cluster` is no part of the defaults, so it is added with a plus, and its keys exist only then."""
    if any(word.startswith("+cluster=") for word in words):
        return
    for word in words:
        if word.startswith("cluster="):
            raise UserError(f"{word}: a cluster is added, not changed; write +{word}")
        if word.lstrip("+~").startswith("cluster."):
            raise UserError(f"{word}: there is no cluster to set it on; add +cluster=slurm, or leave it out")


def register(recipe: Recipe) -> None:
    """Tell Hydra the schema, and the texts that `--help` shows."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.store(group="cluster", name="schema", node=ClusterConfig)
    OmegaConf.register_new_resolver("recipe_name", lambda: recipe.name, replace=True)
    OmegaConf.register_new_resolver("recipe_help", lambda: recipe.doc.strip(), replace=True)
    OmegaConf.register_new_resolver("group_help", group_help, replace=True)
    OmegaConf.register_new_resolver("key_help", key_help, replace=True)


def config_source(recipe: Recipe) -> tuple[Path, str]:
    """(config directory, config name) of a recipe: `conf/<name>.yaml` beside its file or its package.

    A recipe copied into another project needs no YAML of its own: it then starts from `conf/base.yaml`.
    """
    module = sys.modules[recipe.train.__module__]
    here = Path(module.__file__ or ".").resolve().parent
    for directory in (here / "conf", here.parent / "conf"):
        if (directory / f"{recipe.name}.yaml").is_file():
            return directory, recipe.name
    import conf  # the installed package of YAML files

    return Path(next(iter(conf.__path__))), "base"


def to_config(composed: DictConfig) -> Config:
    """Hydra's composed tree as a Config, after holding a cluster file to `cluster.*`.

    Raises:
        UserError: a cluster file sets something else, or a value does not resolve.
    """
    # `+key=value` adds to any node, typed or not; a key that no one reads is a mistake, not an addition.
    known = {name for name, _, _ in walk(Config())} | {f"cluster.{name}" for name, _, _ in walk(ClusterConfig())}
    free = ("cluster.sbatch.", "gradients.clip_value.", "tune.space.")  # they hold names of their own
    for name in leaves(composed):
        if name not in known and not name.startswith(free):
            raise unknown_key(name, "")
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise explain_config_error(error) from None
    assert isinstance(config, Config)
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        root = Path(config.out) if config.out else Path(hydra_config.sweep.dir)
        config.out = str(root / hydra_config.sweep.subdir)
    if config.cluster is not None:
        check_cluster_file(composed, list(hydra_config.overrides.task))
    return config


def leaves(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """The dotted key of every value below a node."""
    for name in map(str, node):
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none():
            yield from leaves(child, f"{prefix}{name}.")
        elif not (prefix == "" and name == "cluster"):
            yield f"{prefix}{name}"


def check_cluster_file(composed: DictConfig, overrides: list[str]) -> None:
    """Compose again without the cluster: nothing of the science may change by where it runs."""
    rest = [override for override in overrides if not override.lstrip("+~").startswith("cluster")]
    bare = load_config(HydraConfig.get().job.config_name, rest)
    for key in map(str, composed):
        if key != "cluster" and composed[key] != bare[key]:
            raise UserError(f"the cluster file sets {key}: it may set cluster.* only; a run means the same everywhere")


def key_help() -> str:
    """Every key with its default, what it does and what is allowed, for `--help`."""
    lines = []
    for name, value, rule in [*walk(Config()), *walk(ClusterConfig(), "cluster.")]:
        shown = value if isinstance(value, str) else json.dumps(value)
        allowed = f" [{'|'.join(map(str, rule['choices']))}]" if rule["choices"] else ""
        lines.append(f"{f'{name}={shown}':36} {rule['help']}{allowed}")
    return "\n".join(lines)


def group_help() -> str:
    """Every config group with its options, for `--help`."""
    loader = GlobalHydra.instance().config_loader()
    groups = {group: options(loader.get_group_options(group)) for group in loader.list_groups("") if group != "hydra"}
    return "\n".join(f"{group:8} {', '.join(names)}" for group, names in groups.items() if names)


def options(names: Iterable[str]) -> list[str]:
    """A group's options, resnet50 before resnet101, without the schema they start from."""
    return sorted(set(names) - {"schema"}, key=lambda name: (len(name), name))


def explain_config_error(error: Exception) -> UserError:
    """Word an error of Hydra's or OmegaConf's as one line: the value, what is allowed, the key to change."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = str(error)
    missing = re.search(r"Key '(\S+)' (?:is )?not in '(\w+)'", str(cause))
    override = re.search(
        r"(?:Could not override|merging override|Could not append|parsing override) '?([^'\n]+)'?", text
    )
    if missing:
        full = re.search(r"full_key: (\S+)", str(cause))
        wrong = full.group(1) if full else missing.group(1)
        where = re.search(r"In '(\S+)'", text)
        return unknown_key(wrong, f" in {where.group(1)}.yaml" if where else "")
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return UserError(f"{group}={option}: no such option; allowed are {', '.join(options(error.options))}")
    unloaded = re.search(r"Could not load '(\w+)/(\w+)'", text)
    if unloaded:  # one of a list
        group, option = unloaded.groups()
        folders = [Path(folder) for folder in re.findall(r"path=file://(\S+)", text)]
        allowed = options(file.stem for folder in folders for file in (folder / group).glob("*.yaml"))
        return UserError(f"{group}={option}: no such option; allowed are {', '.join(allowed)}")
    if override and cause is not error:
        return UserError(f"{override.group(1)}: {first_line(cause)}")
    if override and override.group(1) == "tune" and "Could not override" in text:
        return UserError("tune: only recipes.tune searches for settings; leave it out, or run that")
    if override and "Could not override" in text:
        return unknown_key(override.group(1), "")
    return UserError(" ".join(text.split()))


def unknown_key(name: str, where: str) -> UserError:
    """Name the nearest keys that do exist."""
    keys = [key for key, _, _ in walk(Config())] + [f"cluster.{key}" for key, _, _ in walk(ClusterConfig())]
    groups = ["model", "data", "optim", "logger"]
    near = difflib.get_close_matches(name, keys + groups, n=1, cutoff=0.5) or [
        key for key in keys if key.rpartition(".")[2] == name.rpartition(".")[2]
    ]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return UserError(f"unknown key {name}{where}; {hint}--help lists all keys")


def first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]
