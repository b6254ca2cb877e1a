"""What a recipe's file says of its command line, read from the source: nothing of it is run, and torch is not loaded.

A recipe begins with `import torch`, which takes seconds. `--help`, a misspelt key and a wrong type are answered before
that, so the few facts they need are read from the file's syntax tree: its docstring, the arguments of `@recipe`, and
its config class, whose definition is the only thing that is executed.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast, get_type_hints

from lockstep.config.schema import Config, from_yaml
from lockstep.config.tasks import absolute, import_file, named_task, short_name, task_of_content, with_task
from lockstep.errors import UserError

OF_A_CONFIG = re.compile(r"dataclasses|typing|lockstep\.config(\.\w+)?|lockstep\.\w+\.config")  # modules without torch


class CommandLine(Protocol):
    """What is asked of a recipe to compose its config; `Declared` and lockstep.recipe.Recipe have it."""

    @property
    def name(self) -> str: ...
    @property
    def doc(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def config(self) -> type[Config]: ...
    @property
    def word(self) -> str | None: ...
    @property
    def several(self) -> str | None: ...
    @property
    def looks_at(self) -> str | None: ...
    @property
    def task(self) -> str | type | None: ...


@dataclass(frozen=True)
class Declared:
    """A recipe's file as its command line knows it; lockstep.recipe.Recipe describes the attributes."""

    path: Path
    doc: str
    config: type[Config] = Config
    word: str | None = None
    several: str | None = None
    looks_at: str | None = None
    task: str | None = None

    @property
    def name(self) -> str:
        return self.path.stem


@functools.cache
def declared(path: Path) -> Declared | None:
    """What the file of a recipe says of itself; None where it holds no recipe, or one that must be run to know it."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):  # a file beside a recipe of yours may be anything
        return None
    for node in tree.body:
        for decorator in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
            called = decorator.func if isinstance(decorator, ast.Call) else decorator
            if not (isinstance(called, ast.Name) and called.id == "recipe"):
                continue
            given = {each.arg: each.value for each in decorator.keywords} if isinstance(decorator, ast.Call) else {}
            try:
                config = _execute(tree, given["config"], path) if "config" in given else Config
            except Exception:  # it needs more of its file than a config class may: whoever imports it will know
                return None
            constants: dict[str, Any] = {
                name: value.value
                for name in ("word", "several", "looks_at")
                if isinstance(value := given.get(name), ast.Constant)
            }
            if isinstance(task := given.get("task"), ast.Name):  # a class in the recipe's own file
                constants["task"] = f"{path.resolve()}:{task.id}"
            elif isinstance(task, ast.Constant):
                constants["task"] = task.value
            return Declared(path, ast.get_docstring(tree, clean=False) or "", config, **constants)
    return None


def _execute(tree: ast.Module, name: ast.expr, path: Path) -> type[Config]:
    """The config class of this name, from its definition and the imports from modules that do not load torch.

    It belongs to a module of its own, in which its annotations are looked up where they are texts.
    """
    assert isinstance(name, ast.Name)
    wanted: list[ast.stmt] = []
    for node in tree.body:
        future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
        plain = isinstance(node, ast.ImportFrom) and OF_A_CONFIG.fullmatch(node.module or "")
        literal = isinstance(node, ast.Assign) and not _uses_names(node.value)
        if future or plain or literal or (isinstance(node, ast.ClassDef) and _is_dataclass(node)):
            wanted.append(node)
    module = ModuleType(f"{__name__}:{path}")
    sys.modules[module.__name__] = module
    exec(compile(ast.Module(wanted, []), str(path), "exec", dont_inherit=True), module.__dict__)
    found: type[Config] = getattr(module, name.id)
    assert issubclass(found, Config)
    return found


def _uses_names(value: ast.expr) -> bool:
    return any(isinstance(each, ast.Name | ast.Call) for each in ast.walk(value))


def _is_dataclass(node: ast.ClassDef) -> bool:
    names = [each.func if isinstance(each, ast.Call) else each for each in node.decorator_list]
    return any(isinstance(each, ast.Name) and each.id == "dataclass" for each in names) and any(
        isinstance(base, ast.Name) and base.id.endswith("Config") for base in node.bases
    )


def neighbours(path: Path) -> dict[str, Declared]:
    """The recipes in the folder of this one, by name."""
    files = sorted(path.parent.glob("[!_]*.py"))
    return {file.stem: found for file in files if (found := declared(file))}


def schema_of(recipe: CommandLine, values: Mapping[str, Any] | Iterable[str]) -> type[Config]:
    """The config class of a command: the recipe's, for a tool also the own keys of the recipes it is told to run, and
    the keys of the task that is trained.

    Args:
        values: the words of the command line, or a frozen config's content.

    Raises:
        UserError: there is no such task, or recipes that are to be run on the same work have two of their own.
    """
    values = values if isinstance(values, Mapping) else list(values)
    names = _names(recipe, values) if recipe.looks_at else []
    others = [found for name in names if (found := _find(recipe, name))]
    bases = list(dict.fromkeys([recipe.config, *(other.config for other in others)]))
    bases = [each for each in bases if not any(each is not other and issubclass(other, each) for other in bases)]
    schema = bases[0] if len(bases) == 1 else _combined(tuple(bases))
    named = task_of_content(values) if isinstance(values, Mapping) else named_task(values) or _only_task(recipe, others)
    return with_task(schema, absolute(named) if named else None)


def own_task(recipe: CommandLine) -> str | None:
    """The task that a recipe declares (`@recipe(task=Class)`), by its name; None where it trains any."""
    task = recipe.task
    return f"{recipe.path.resolve()}:{task.__qualname__}" if isinstance(task, type) else task


def _only_task(recipe: CommandLine, others: Iterable[CommandLine]) -> str | None:
    """The task that a recipe, or one of those that a tool is told to run, has of its own."""
    found = list(dict.fromkeys(task for each in (recipe, *others) if (task := own_task(each))))
    if len(found) > 1:
        names = ", ".join(map(short_name, found))
        raise UserError(f"these recipes train tasks of their own, {names}: name one for all with task=FILE.py:Class")
    return found[0] if found else None


@functools.cache
def _combined(bases: tuple[type[Config], ...]) -> type[Config]:
    """One class with the keys of all; a key that two of them have with other defaults is null: each recipe's own."""
    shared, found = {entry.name for entry in fields(Config)}, dict[str, list[Field[Any]]]()
    for entry in [entry for base in bases for entry in fields(base) if entry.name not in shared]:
        found.setdefault(entry.name, []).append(entry)
    space: dict[str, Any] = {"__annotations__": {}}
    for name, entries in found.items():
        if any(entry.default != entries[0].default for entry in entries):
            first = dict(entries[0].metadata)
            own = {"nullable": True, "help": f"{first.get('help', '')} (null: what each recipe has)"}
            space[name] = field(default=None, metadata=first | own)
            hints = [get_type_hints(base) for base in bases]
            space["__annotations__"][name] = next(each[name] for each in hints if name in each) | None
    return dataclass(type("".join(each.__name__ for each in bases), bases, space))


def _find(tool: CommandLine, name: str) -> CommandLine | None:
    if name.endswith(".py"):
        file = Path(name).expanduser().resolve()
        asked = f"recipes=[{name}]" if tool.looks_at == "recipes" else f"{tool.looks_at}={name}"
        return declared(file) or own_recipe(asked, file)
    file = tool.path.parent / f"{name}.py"
    return declared(file) if name.isidentifier() and len(name) < 100 and file.is_file() else None


def own_recipe(asked: str, file: Path) -> Any:
    """The recipe in a file of one's own, imported.

    Args:
        asked: key and value, which an error begins with.

    Raises:
        UserError: there is no such file, or not one recipe in it.
    """
    module = import_file(asked, file)
    found = [
        each
        for each in vars(module).values()
        if hasattr(each, "looks_at") and getattr(each.train, "__module__", None) == module.__name__
    ]
    if len(found) != 1:
        raise UserError(f"{asked}: the file holds {len(found)} recipes; write @recipe above one function, its training")
    return found[0]


def _names(tool: CommandLine, values: Mapping[str, Any] | Iterable[str]) -> list[str]:
    """The recipes that a tool is told to run: in a config, else on the command line (the last one counts), else its own
    default."""
    path = str(tool.looks_at).split(".")
    if not isinstance(values, Mapping):
        given = [word.partition("=")[2] for word in values if word.lstrip("+").startswith(f"{tool.looks_at}=")]
        if given:
            return listed(given[-1])
        values = asdict(tool.config())
    found: Any = values
    for part in path:
        found = (found or {}).get(part)
    return [found] if isinstance(found, str) else [str(each) for each in found or []]


def listed(value: str) -> list[str]:
    """`[ddp,my_recipe.py]`, or one name alone, as names."""
    return [name.strip(" \"'") for name in value.strip("[] ").split(",")]


def read_config(recipe: CommandLine, text: str) -> Config:
    """A recipe's frozen config, from `to_yaml`'s text."""
    from omegaconf import OmegaConf  # not above: `lockstep.registry` imports this module, and needs no configs

    content = OmegaConf.to_container(OmegaConf.create(text))
    return from_yaml(text, schema_of(recipe, cast(dict[str, Any], content)))


def own_keys(config: type[Config]) -> set[str]:
    """The names of the fields that a config class has beside those of every recipe."""
    return {entry.name for entry in fields(config)} - {entry.name for entry in fields(Config)}
