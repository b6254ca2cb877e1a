"""Which task a config names, and its fields as config keys: `task=my_task.py:Gpt task.hidden=64`.

The built-in `task=images` has its keys in the shared schema (`model.*`, `data.*`), so a command that trains it is
answered without loading it. Another task's file is imported: its fields are what its dataclass says.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, make_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from lockstep.config.keys import AUTO, NO_RULE, key, typed
from lockstep.config.schema import Config, TaskConfig
from lockstep.errors import UserError

IMAGES = "images"
BUILT_IN = {IMAGES: "lockstep.tasks.images:Images", "language": "lockstep.tasks.language:Language"}
TASKS = f"allowed are {', '.join(BUILT_IN)}, FILE.py:Class and package.module:Class"
REQUIRED = ("build_model", "loss")  # methods of every task


def named_task(words: Iterable[str]) -> str | None:
    """The task that a command's words name, the last one if several; None where none does."""
    given = [word.lstrip("+").partition("=")[2] for word in words if re.match(r"\+{0,2}task(\.name)?=", word)]
    return given[-1].strip("\"'") if given else None


def absolute(name: str) -> str:
    """A task's name with the whole path of its file, so that it is found from any folder."""
    file, colon, class_name = name.rpartition(":")
    return f"{Path(file).expanduser().resolve()}:{class_name}" if colon and file.endswith(".py") else name


def short_name(name: str) -> str:
    """A task's name as a person would say it: its class, or the name of one that is built in."""
    return name.rpartition(":")[2]


@functools.cache
def find_class(name: str) -> type:
    """The class that `task=NAME` names, imported.

    Raises:
        UserError: there is no such file, module or class; it cannot be imported; or it lacks a method.
    """
    source, colon, class_name = BUILT_IN.get(name, name).rpartition(":")
    if not colon or not source or not class_name:
        raise UserError(f"task={name}: {_without_class(name)}")
    module = import_file(f"task={name}", Path(source)) if source.endswith(".py") else _load_module(name, source)
    found = getattr(module, class_name, None)
    if found is None:
        near = difflib.get_close_matches(class_name, classes(module)) or classes(module)
        hint = f"it has {', '.join(near)}" if near else "it defines none"
        raise UserError(f"task={name}: {source} has no class {class_name}; {hint}")
    if not isinstance(found, type):
        raise UserError(f"task={name}: {class_name} is no class, but {type(found).__name__}; name one that is")
    for method in REQUIRED:
        if not callable(getattr(found, method, None)) or _inherits_stub(found, method):
            raise UserError(
                f"task={name}: {class_name} has no method {method}; a task needs {', '.join(REQUIRED)} and train_set"
            )
    return found


def _inherits_stub(found: type, method: str) -> bool:
    """Whether a method is only lockstep.Task's own, which says that there is none."""
    return getattr(found, method).__module__ == "lockstep.task"


def _without_class(name: str) -> str:
    """What is wrong with a name that has no class in it."""
    file = Path(name).expanduser()
    if name.endswith(".py") and file.is_file():
        found = [
            node.name for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)
        ]
        return f"names no class; write task={name}:{found[0] if found else 'Class'}"
    near = difflib.get_close_matches(name, BUILT_IN, n=1)
    return f"did you mean {near[0]}? {TASKS}" if near else TASKS


def import_file(asked: str, file: Path) -> ModuleType:
    """The module of a file, imported once, wherever it lies.

    Args:
        asked: the key and value that name it, which an error begins with.

    Raises:
        UserError: there is none, or it cannot be imported.
    """
    file = file.expanduser().resolve()
    if not file.is_file():
        raise UserError(f"{asked}: no such file" + f"; {TASKS}" * asked.startswith("task="))
    for module in list(sys.modules.values()):  # the recipe's own file, or a task that is loaded already
        if getattr(module, "__file__", None) and Path(str(module.__file__)).resolve() == file:
            return module
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))  # as for a script: its neighbours can be imported
    known = file.stem if file.stem not in sys.modules else f"{file.stem}_of_{file.parent.name}"
    spec = importlib.util.spec_from_file_location(known, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[known] = module
    try:
        spec.loader.exec_module(module)
    except UserError:
        del sys.modules[known]
        raise
    except Exception as error:
        del sys.modules[known]
        raise UserError(f"{asked}: cannot be imported: {where(error, file)}") from None
    return module


def _load_module(name: str, source: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name and (source == error.name or source.startswith(f"{error.name}.")):
            raise UserError(f"task={name}: no module {error.name}; {TASKS}") from None
        raise UserError(f"task={name}: cannot be imported: {where(error, None)}") from None
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"task={name}: cannot be imported: {where(error, None)}") from None


def where(error: BaseException, file: Path | None) -> str:
    """An error of a user's code in one line: `ValueError: no data (my_task.py, line 12)`."""
    frames = traceback.extract_tb(error.__traceback__)
    mine = [each for each in frames if file is not None and Path(each.filename).resolve() == file] or frames[-1:]
    if isinstance(error, SyntaxError):
        place = f"{Path(str(error.filename)).name}, line {error.lineno}"
    else:
        place = f"{Path(mine[-1].filename).name}, line {mine[-1].lineno}" if mine else "no line"
    text = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    return f"{type(error).__name__}: {text} ({place})"


def classes(module: ModuleType) -> list[str]:
    """The classes that a module itself defines."""
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == module.__name__ and not name.startswith("_")
    ]


@functools.cache
def task_schema(name: str) -> type[TaskConfig]:
    """The config class of a task: `name`, and a key for every field that its constructor takes.

    Raises:
        UserError: as `find_class`; or a field that no config can hold has no default.
    """
    if name == IMAGES:
        return TaskConfig
    found = find_class(name)
    entries = [_as_key(name, found, entry) for entry in _fields(name, found)]
    base = make_dataclass(f"{found.__name__}Config", [("name", str, key(name, "what is trained"))], bases=(TaskConfig,))
    return make_dataclass(base.__name__, [entry for entry in entries if entry is not None], bases=(base,))


def _fields(name: str, found: type) -> list[Field[Any]]:
    if dataclasses.is_dataclass(found):
        return [entry for entry in dataclasses.fields(found) if entry.init]
    needed = [
        each.name
        for each in list(inspect.signature(found).parameters.values())
        if each.default is each.empty and each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
    ]
    if needed and not hasattr(found, "from_config"):
        raise UserError(
            f"task={name}: {found.__name__}({', '.join(needed)}) takes arguments that no key can set; make it a "
            "dataclass, whose fields are keys"
        )
    return []


def _as_key(name: str, found: type, entry: Field[Any]) -> tuple[str, Any, Any] | None:
    """(name, type, default) of a field as a config key; None where no config could hold it, which keeps its default."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if entry.name == "name":
        raise UserError(f"task={name}: its field `name` would be task.name, which names the task; rename the field")
    try:
        kind: Any = typing.get_type_hints(found).get(entry.name, Any)
    except NameError as error:
        raise UserError(f"task={name}: the type of field {entry.name} is not known: {error}") from None
    rule = dict(entry.metadata)
    if typing.get_origin(kind) is typing.Literal:
        rule = {"choices": typing.get_args(kind)} | rule
        kind = type(typing.get_args(kind)[0])
    missing = type(MISSING)  # a class that was pickled in a notebook has a copy of the object
    required = isinstance(entry.default, missing) and isinstance(entry.default_factory, missing)
    default: Any = "???" if required else entry.default
    if not isinstance(entry.default_factory, missing):
        default = cast(Any, entry.default_factory)()
    rule = NO_RULE | {each: value for each, value in rule.items() if each in NO_RULE}
    if isinstance(default, list | dict | set) or dataclasses.is_dataclass(default):
        made = field(default_factory=lambda: default, metadata=rule)
    else:
        made = field(default=default, metadata=rule)
    try:
        OmegaConf.structured(make_dataclass("Probe", [(entry.name, kind, made)]))
    except (OmegaConfBaseException, ValueError, TypeError):
        if required:
            raise UserError(
                f"task={name}: field {entry.name} is a {getattr(kind, '__name__', kind)}, which no key can set; give it "
                "a default, or a type such as int, float, str, bool, list or dict of them"
            ) from None
        return None
    return entry.name, kind, made


def with_task(schema: type[Config], name: str | None) -> type[Config]:
    """A recipe's config class, with a task's own keys in it.

    Raises:
        UserError: as `task_schema`.
    """
    if name in (None, IMAGES):
        return schema
    made: type[Config] = _with_task(cast(Any, schema), str(name))
    return made


@functools.cache
def _with_task(schema: Any, name: str) -> Any:
    task = task_schema(name)
    return dataclass(
        type(schema.__name__, (schema,), {"__annotations__": {"task": task}, "task": field(default_factory=task)})
    )


def with_defaults(words: list[str], schema: type[Config]) -> list[str]:
    """A command's words after those that its task declares (`defaults = {"optim": "adamw", "optim.lr": 0.003}`), and its
    recipe for the task; none for a key that is typed, nor below a group that is."""
    task = schema().task.name
    declared = {} if task == IMAGES else dict(getattr(find_class(task), "defaults", {}))
    keys = {entry.name for entry in dataclasses.fields(schema().task)}
    declared |= {f"task.{name}": value for name, value in schema.task_defaults.items() if name in keys}
    given = {re.split("[=@]", word.lstrip("+~"))[0] for word in words}
    if schema().global_batch_size == AUTO:  # a tool that chooses its batch itself
        given.add("global_batch_size")
    given.discard("task")  # which task, and nothing of its keys
    mine = [typed(name, value) for name, value in declared.items() if not {name, name.partition(".")[0]} & given]
    return [*mine, *words]


def unit_of(config: Config) -> str:
    """What a sample of the task is called, in the plural."""
    return "images" if config.task.name == IMAGES else getattr(find_class(config.task.name), "unit", "samples")


def metric_of(config: Config) -> str:
    """What is best, as it is logged: `metric`, or what the task says."""
    own = "accuracy" if config.task.name == IMAGES else getattr(find_class(config.task.name), "best", "loss")
    name = config.metric or own
    return name if name.startswith("eval_") else f"eval_{name}"


def is_larger_better(config: Config) -> bool:
    """Whether `metric_of` is better when larger: `metric_mode`, or what the task says."""
    if config.metric_mode != AUTO:
        return config.metric_mode == "max"
    smaller = () if config.task.name == IMAGES else getattr(find_class(config.task.name), "lower_is_better", ())
    return metric_of(config) not in ("eval_loss", *(f"eval_{name}" for name in smaller))


def task_of_content(content: Mapping[str, Any]) -> str | None:
    """The task of a frozen config's content; None where it is from before there were tasks."""
    name = (content.get("task") or {}).get("name")
    return None if name is None else str(name)


def check_group_words(words: Iterable[str], task: str, recipe: str) -> None:
    """Refuse `model=…` and `data=…`, which are keys of task=images, where another task is trained.

    Raises:
        UserError: with the keys that the task has.
    """
    if task == IMAGES:
        return
    for word in words:
        name = re.split("[=@]", word.lstrip("+~"))[0]
        if name.partition(".")[0] in ("model", "data") and name != "data.workers":
            own = [f"task.{entry.name}" for entry in dataclasses.fields(task_schema(task)) if entry.name != "name"]
            keys = f"its own keys are {', '.join(own)}" if own else "it has no keys of its own"
            raise UserError(f"{word}: {name} belongs to task=images; task={short_name(task)} builds its own: {keys}")
