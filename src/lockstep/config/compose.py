"""Hydra, run once: from `conf/` and the command line to a checked Config, with its errors said in one line.

Hydra only composes. It does not change the working directory, makes no output directory and configures no logging.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import fields
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lockstep.config import help, sweep
from lockstep.config.declared import CommandLine, listed, schema_of
from lockstep.config.explain import BELOW_A_VALUE, check_names, explain, unknown_key
from lockstep.config.keys import typed, walk
from lockstep.config.schema import LAST, RESNETS, ClusterConfig, Config
from lockstep.config.tasks import BUILT_IN, IMAGES, TASKS, absolute, check_group_words, named_task, with_defaults
from lockstep.config.words import check_groups, check_options, in_plural, spelled_out, text_keys, verbatim
from lockstep.errors import UserError
from lockstep.utils.places import folder

MODEL_SIZE = ("model", "model.name", "task.size")  # that may say how large a model is
QUOTES = "\"'"

UNREADABLE = (HydraException, OmegaConfBaseException, ValueError, YAMLError, AssertionError)  # OmegaConf asserts, too


def compose(recipe: CommandLine, use: Callable[[Config], None]) -> None:
    """Compose the command line's config and call `use` with it; with `--multirun`, once for each point.

    Raises:
        UserError: an unknown key or option, a wrong type, a syntax error.
        SystemExit: something was to be printed (--help), and is.
    """
    check_options(sys.argv[1:])
    tasks, typed_words = swept_tasks(sys.argv[1:]), sys.argv[1:]
    if {"--help", "-h"} & set(typed_words):
        words = [spelled_task(word) for word in typed_words]
        print(help.text(recipe, schema_of(recipe, words), config_folders(recipe), everything="all" in words))
        raise SystemExit(0)
    if not tasks:
        run_hydra(recipe, *spelled(recipe, typed_words), use)
        return
    # Each task has keys of its own, so it is a sweep of its own; the points are numbered through.
    sweeps = [spelled(recipe, [f"task={task}" if is_task(word) else word for word in typed_words]) for task in tasks]
    points: list[Config] = []
    for words, schema in sweeps:
        run_hydra(recipe, words, schema, points.append)
    root = Path(str(points[0].out)).parent
    for number, config in enumerate(points):
        name = Path(str(config.out)).name
        config.out = str(root / (str(number) if name.isdecimal() else name))
        use(config)


def is_task(word: str) -> bool:
    return re.match(r"\+{0,2}task(\.name)?=", word) is not None


def swept_tasks(words: list[str]) -> list[str]:
    """The tasks of `-m task=a.py:A,b.py:B`; none where there are not several.

    Raises:
        UserError: there are, and this is no sweep.
    """
    value = named_task(words) or ""
    names = [each.strip(f" {QUOTES}") for each in value.split(",")]
    if len(names) == 1 or not all(name in BUILT_IN or ":" in name for name in names):
        return []
    if not sweep.is_sweep(words):
        raise UserError(f"task={value}: several tasks are a sweep, a run for each; add -m, or name one")
    return names


def spelled(recipe: CommandLine, words: list[str]) -> tuple[list[str], type[Config]]:
    """(a command's words as Hydra takes them, the config class of its keys).

    Raises:
        UserError: an unknown key, or a task that is none.
    """
    if named_task(words) == "":
        raise UserError(f"task=: is empty; {TASKS}")
    words = [spelled_task(word) for word in words]
    if recipe.word:
        words = spelled_out(words, recipe.word, recipe.config)
    words = [by_name(word, recipe) for word in words]
    if recipe.looks_at:
        words = [spelled_files(word, recipe.looks_at) for word in words]
    if recipe.several:
        words = [in_plural(word, recipe.several) for word in words]
    schema = schema_of(recipe, words)
    words = [by_model_size(word, schema) for word in words]
    words = [added(quoted(word, open_keys(schema, texts=True)), schema) for word in words]
    texts, sweeps = text_keys(schema), sweep.is_sweep(words)
    words = [verbatim(word, texts, sweeps) for word in words]
    check_names(words, recipe, schema)
    check_groups(words, help.config_groups(config_folders(recipe)))
    check_group_words(words, schema().task.name, recipe.name)
    check_cluster_words(words)
    return with_defaults(words, schema), schema


def run_hydra(recipe: CommandLine, words: list[str], schema: type[Config], use: Callable[[Config], None]) -> None:
    """Have Hydra compose these words, and call `use` with each config when all are known; raises as `compose`."""
    typed_words, sys.argv = sys.argv, [sys.argv[0], *words]
    GlobalHydra.instance().clear()  # a rank that is a copy of the submitting process has that one's
    register(recipe, schema)
    directory, name = config_source(recipe)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through: `explain` words them
    found: list[BaseException] = []
    configs: list[Config] = []
    place = ""

    def task(composed: DictConfig) -> None:
        if found:
            return
        try:
            configs.append(to_config(composed, recipe, schema))
        except BaseException as error:
            found.append(error)  # kept out of Hydra: it is not Hydra's, nor to be worded as if it were

    try:
        with explained(recipe, schema):
            if sweep.is_sweep(words) and sweep.is_plain(words):
                with hydra.initialize_config_dir(str(directory), version_base="1.3"):
                    for number, point in enumerate(sweep.points(words)):
                        composed = load_config(name, point, RunMode.MULTIRUN)
                        with read_write(composed), open_dict(composed):
                            composed.hydra.mode, composed.hydra.job.num = RunMode.MULTIRUN, number
                            place = place or composed.hydra.sweep.dir  # named by the time
                            composed.hydra.sweep.dir = place
                        HydraConfig.instance().set_config(copy.deepcopy(composed))
                        task(without_hydra(composed))
            elif any(word.startswith("-") for word in words):
                hydra.main(version_base="1.3", config_path=str(directory), config_name=name)(task)()
            else:  # it would compose twice, the first time to learn whether this is a sweep, which it is not
                with hydra.initialize_config_dir(str(directory), version_base="1.3"):
                    composed = load_config(name, words)
                    HydraConfig.instance().set_config(composed)
                    task(without_hydra(composed))
    finally:
        sys.argv = typed_words
    if found:
        raise found[0]
    for config in configs:
        use(config)


@contextlib.contextmanager
def explained(recipe: CommandLine, schema: type[Config]) -> Iterator[None]:
    """Word what Hydra and OmegaConf refuse as one line; an assertion of somebody else's stays what it is."""
    try:
        yield
    except UNREADABLE as error:
        if isinstance(error, AssertionError) and BELOW_A_VALUE not in str(error):
            raise
        raise explain(error, recipe, schema) from None


def compose_another(recipe: CommandLine, words: list[str]) -> Config:
    """The config that another recipe's command with these words would compose.

    Raises:
        UserError: it would be refused.
    """
    schema = schema_of(recipe, words)
    register(recipe, schema)
    directory, name = config_source(recipe)
    words = with_defaults(words, schema)
    with other_source(directory), explained(recipe, schema):
        config = OmegaConf.to_object(without_hydra(load_config(name, words)))
    assert isinstance(config, Config)
    return config


@contextlib.contextmanager
def other_source(directory: Path) -> Iterator[None]:
    """Within it Hydra reads from this folder, unless it is reading already: for another recipe's command of the same
    project, whose folder it is."""
    if GlobalHydra.instance().is_initialized():
        yield
        return
    with hydra.initialize_config_dir(str(directory), version_base="1.3"):
        yield


def load_config(name: str | None, words: list[str], mode: RunMode = RunMode.RUN) -> DictConfig:
    """The config of this name with these overrides, and Hydra's own part in it."""
    return GlobalHydra.instance().config_loader().load_configuration(name, overrides=words, run_mode=mode)


def without_hydra(composed: DictConfig) -> DictConfig:
    """Take out Hydra's own part."""
    with open_dict(composed):
        del composed["hydra"]
    return composed


def spelled_task(word: str) -> str:
    """`task=my_task.py:Gpt` as `task.name=/home/me/my_task.py:Gpt`: Hydra would take the first for a whole group."""
    if not is_task(word):
        return word
    value = word.partition("=")[2]
    return f"task.name={json.dumps(absolute(value.strip(QUOTES)))}"


def spelled_files(word: str, key: str) -> str:
    """`recipes=[ddp,my_recipe.py]` with the whole path of the file, so that it is found from any folder."""
    name, _, value = word.partition("=")
    if name.lstrip("+") != key or ".py" not in value:
        return word
    names = [str(Path(each).expanduser().resolve()) if each.endswith(".py") else each for each in listed(value)]
    spelled = ",".join(map(json.dumps, names))
    return f"{name}=[{spelled}]" if value.startswith("[") else f"{name}={spelled}"


def by_name(word: str, recipe: CommandLine) -> str:
    """`model=vit_b_16`, of which no YAML tells, as `model.name=vit_b_16`; of several, none by its YAML."""
    name, _, value = word.partition("=")
    if name != "model" or not re.fullmatch(r"\w+(,\w+)*", value):
        return word
    known = set(help.config_groups(config_folders(recipe))["model"])
    return word if known.issuperset(value.split(",")) else f"model.name={value}"


def by_model_size(word: str, schema: type[Config]) -> str:
    """`model=1b` of a task that has its models by size, such as task=language, as `task.size=1B`."""
    name, _, value = word.partition("=")
    sizes = next((entry.metadata.get("choices", ()) for entry in fields(schema().task) if entry.name == "size"), ())
    known = {str(each).lower(): each for each in sizes}
    return f"task.size={known[value.lower()]}" if name in MODEL_SIZE and value.lower() in known else word


def quoted(word: str, texts: tuple[str, ...]) -> str:
    """`tune.space.KEY=choice(1, 2)` as Hydra takes it: parentheses are its own, and a key that is new needs pluses.

    Args:
        texts: what the keys begin with whose values are texts, under names of the user's.
    """
    name, equals, value = word.partition("=")
    if not equals or not name.lstrip("+").startswith(texts) or value[:1] in "\"'":
        return word
    return f"++{name.lstrip('+')}={json.dumps(value)}"


def added(word: str, schema: type[Config]) -> str:
    """`optim.arguments={dampening: 0.1}`, or `optim.arguments.dampening=0.1`, as Hydra takes it: with pluses.

    Raises:
        UserError: an empty dict where there is one, as in `tune.space={}`: it would add nothing and take nothing away.
    """
    name, equals, given = word.partition("=")
    dicts = [each for each, value, rule in walk(schema()) if rule["open"] and isinstance(value, dict)]
    if name in dicts and not given.strip("{} "):
        raise UserError(f"{word}: changes nothing; set {name}.NAME=VALUE, or take a part out with ~{name}.NAME")
    return f"++{word}" if equals and any(name == each or name.startswith(f"{each}.") for each in dicts) else word


def open_keys(schema: type[Config], texts: bool = False) -> tuple[str, ...]:
    """What the keys begin with whose last part is the user's to name, such as `tune.space.`; or those with `texts`."""
    keys = [*walk(schema()), *walk(ClusterConfig(), "cluster.")]
    return tuple(f"{name}." for name, _, rule in keys if rule["texts" if texts else "open"])


def overrides(tool: CommandLine, config: Config, recipe: CommandLine, without: Collection[str] = ()) -> list[str]:
    """The words that give a recipe's command what a tool was given: what differs from the tool's own defaults.

    Args:
        recipe: whose command it is; keys that it does not have are left out.
        without: further keys that are left out, and groups of them.
    """
    task = [typed("task.name", config.task.name)] if config.task.name != IMAGES else []
    # Where the tool runs, its recipes run too; a task builds its own model, whatever a tool's model of images is.
    skip, default = {"cluster", *(["model"] if task else []), *without}, tool.config()
    skip |= {entry.name for entry in fields(config)} - {entry.name for entry in fields(recipe.config)}
    groups = [
        f"model.name={name}" if group == "model" and name not in RESNETS else f"{group}={name}"
        for group in ("model", "data", "optim")
        if (name := getattr(config, group).name) != getattr(default, group).name and not {group, f"{group}.name"} & skip
    ]
    # Keys of the recipes that a tool looks at have their defaults in its own config class, whatever each recipe's are.
    plain = {name: value for name, value, _ in [*walk(type(config)()), *walk(compose_another(tool, [*task, *groups]))]}
    plain["task.name"] = IMAGES
    follows = {  # what `complete` fills in, and will fill in again
        "data.num_classes": config.data.name != "synthetic" or config.data.num_classes == 10,
        "model.num_classes": config.model.num_classes == config.data.num_classes,
        "model.image_size": config.model.image_size == config.data.image_size,
    }
    own = {f"task.{name}" for name in recipe.config.task_defaults}  # a recipe's own default may be another one
    return groups + [
        typed(name, value)
        for name, value, _ in walk(config)
        if not (follows.get(name) or {name, name.partition(".")[0]} & skip) and (value != plain[name] or name in own)
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


def register(recipe: CommandLine, schema: type[Config]) -> None:
    """Tell Hydra the schema, and the recipe's name."""
    store = ConfigStore.instance()
    store.store(name="schema", node=schema)
    store.store(group="cluster", name="schema", node=ClusterConfig)
    OmegaConf.register_new_resolver("recipe_name", lambda: recipe.name, replace=True)


def config_source(recipe: CommandLine) -> tuple[Path, str]:
    """(config directory, config name) of a recipe: `conf/<name>.yaml` beside its file or its package, else the base.

    A recipe needs a YAML of its own only where it has other defaults than `conf/base.yaml`.
    """
    here = recipe.path.resolve().parent
    for directory in (here / "conf", here.parent / "conf"):
        if (directory / f"{recipe.name}.yaml").is_file():
            return directory, recipe.name
    return folder("conf"), "base"


def config_folders(recipe: CommandLine) -> list[Path]:
    """The folders in which this command's config files are looked for."""
    given = [Path(word.partition("=")[2]) for word in sys.argv[1:] if word.startswith("--config-dir=")]
    return list(dict.fromkeys([folder("conf"), config_source(recipe)[0], *given]))


def to_config(composed: DictConfig, recipe: CommandLine, schema: type[Config]) -> Config:
    """Hydra's composed tree as a Config, after holding a cluster file to `cluster.*`.

    Raises:
        UserError: a cluster file sets something else, or a value does not resolve.
    """
    # `+key=value` adds to any node, typed or not; a key that no one reads is a mistake, not an addition.
    known = {name for name, _, _ in walk(schema())} | {f"cluster.{name}" for name, _, _ in walk(ClusterConfig())}
    opened = open_keys(schema)
    for name in leaves(composed):
        if name not in known and not name.startswith(opened):
            raise unknown_key(name, recipe, schema)
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise explain(error, recipe, schema) from None
    assert isinstance(config, Config)
    if config.task.name != schema().task.name:
        raise UserError(
            f"task.name={config.task.name}: a YAML file cannot choose the task; write task={config.task.name} on the "
            "command line, or @recipe(task=Class) in the recipe"
        )
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        if config.resume == LAST:
            raise UserError(f"resume={LAST}: is for one run; a sweep is continued by its folder, out=FOLDER")
        root = Path(config.out) if config.out else Path(hydra_config.sweep.dir)
        config.out = str(root / hydra_config.sweep.subdir)
    if config.cluster is not None:
        register(recipe, schema)
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
