"""Errors of Hydra's and OmegaConf's, said in one line: the value, what is allowed, the key to change."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from lockstep.config.declared import CommandLine, neighbours, own_keys
from lockstep.config.keys import walk
from lockstep.config.schema import ClusterConfig, Config
from lockstep.errors import UserError

ALLOWED_OF_TYPE = {  # by what OmegaConf's errors have in them
    "to Integer": "whole numbers",
    "to Float": "numbers",
    "valid bool": "true and false",
    "not a ListConfig": "lists, such as [a,b]",
    "Incompatible key type": "texts as names in a dict",
    "subclass of str": "texts alone in it",
    "subclass of float": "numbers alone in it",
    "subclass of int": "whole numbers alone in it",
}
GROUPS = ("model", "data", "optim", "logger")
RENAMED = {  # a key, or a group of keys, by its name of before
    "batch_size": "global_batch_size",
    "monitor": "logger",
    "fsdp.replicas": "replicate",
    "fsdp": "",
    "zero": "",
    "tune.space.batch_size": "tune.space.global_batch_size",
}

BELOW_A_VALUE = "Unexpected type for root"  # what OmegaConf says of nproc.x=1


def options(names: Iterable[str]) -> list[str]:
    """A group's options, resnet50 before resnet101, without the schema they start from."""
    return sorted(set(names) - {"schema"}, key=lambda name: (len(name), name))


def explain(error: Exception, recipe: CommandLine, schema: type[Config]) -> UserError:
    """Word an error of Hydra's or OmegaConf's as one line."""
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
        return unknown_key(wrong, recipe, schema, f" in {where.group(1)}.yaml" if where else "")
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = str(error.missing_cfg_file).partition("/")
        return UserError(f"{group}={option}: no such option; allowed are {', '.join(options(error.options))}")
    unloaded = re.search(r"Could not load '(\w+)/(\w+)'", text)
    if unloaded:  # one of a list
        group, option = unloaded.groups()
        folders = [Path(folder) for folder in re.findall(r"path=file://(\S+)", text)]
        allowed = options(file.stem for folder in folders for file in (folder / group).glob("*.yaml"))
        return UserError(f"{group}={option}: no such option; allowed are {', '.join(allowed)}")
    several = re.search(r"(?:Sweep parameters|Ambiguous value for argument) '(.+?)'(?: requires|\n|$)", text)
    if several:
        return UserError(
            f"{several.group(1).lstrip('+')}: has several values, and a run has one; name one, or add --multirun for a run of "
            "each; a text or a list stands in quotes or brackets"
        )
    kept = re.search(r"Could not delete from config\. (?:The value of )?'([\w.]+)'(.*)", text)
    if kept:
        return UserError(f"~{kept.group(1)}: cannot be taken out, for it{kept.group(2)} set {kept.group(1)}=… instead")
    unresolved = re.search(r"full_key: (\S+)", text)
    if isinstance(error, OverrideParseException):
        if "missing EQUAL" in str(error):
            return UserError(
                f"{error.override}: is no setting; write KEY=VALUE, as in epochs=3 (--help shows the keys)"
            )
        said = str(error).partition("See https")[0].replace(f"Error parsing override '{error.override}'", "")
        said = "a sign in it is not Hydra's" if "LexerNoViable" in said else " ".join(said.split())
        return UserError(f"{error.override.lstrip('+')}: cannot be read: {said}; texts with such signs stand in quotes")
    if override and cause is not error:
        return UserError(f"{override.group(1).lstrip('+')}: {in_words(str(cause).splitlines()[0])}")
    if unresolved:
        return UserError(f"{unresolved.group(1)}: {str(cause).splitlines()[0]}")
    if override and "Could not override" in text:
        return unknown_key(override.group(1), recipe, schema)
    if BELOW_A_VALUE in text:
        text = "a key that holds a value has no keys below it; write KEY=VALUE"
    if "invalid literal for int" in text:  # OmegaConf looks for the number of a list's entry
        text = "a list's entries have no names; write KEY=[a,b]"
    named = "" if re.search(r"[a-z]=", text) else f"{' '.join(sys.argv[1:])}: "
    return UserError(f"{named}{' '.join(text.split())}")


def in_words(said: str) -> str:
    """What OmegaConf says of a value's type, with what is allowed."""
    if "is not Optional" in said:
        return "null is not allowed; leave it out, or give it a value"
    allowed = next((words for kind, words in ALLOWED_OF_TYPE.items() if kind in said), "")
    return f"{said.rstrip('.')}; allowed are {allowed}" if allowed else said


def renamed(name: str) -> str:
    """What a key is called now, by its name of before; empty where it never had another."""
    for old, new in RENAMED.items():
        if name == old or name.startswith(f"{old}."):
            return f"{new}{name.removeprefix(old)}" if new else name.partition(".")[2]
    return ""


def check_names(words: list[str], recipe: CommandLine, schema: type[Config]) -> None:
    """Refuse a key by its name of before, and one that is another recipe's own.

    Raises:
        UserError: with the name it has now, or the recipes that it belongs to, or why this one does without it.
    """
    known = {entry.name for entry in fields(schema)}
    for word in words:
        name = re.split("[=@]", word.lstrip("+~"))[0]
        if now := renamed(name):
            raise UserError(f"{name}: is called {now} now; write {word.replace(name, now, 1)}")
        if name not in known and name in schema.refuses:
            raise UserError(f"{word}: {schema.refuses[name]}")
        if name.partition(".")[0] not in known and (owners := owners_of(name, recipe)):
            raise UserError(f"{word}: recipes.{recipe.name} does not use it; it belongs to {owners}")


def owners_of(name: str, recipe: CommandLine) -> str:
    """The recipes beside this one that have a key of their own of this name, as words."""
    head = name.partition(".")[0]
    having = [each.name for each in neighbours(recipe.path).values() if head in own_keys(each.config)]
    *most, last = [f"recipes.{each}" for each in having if each != recipe.name] or [""]
    return f"{', '.join(most)} and {last}" if most else last


def unknown_key(name: str, recipe: CommandLine, schema: type[Config], where: str = "") -> UserError:
    """Say what a key is called now, which recipe has it, or which keys that do exist are nearest."""
    if now := renamed(name):
        return UserError(f"unknown key {name}{where}: it is called {now} now")
    if owners := owners_of(name, recipe):
        return UserError(f"unknown key {name}{where}: recipes.{recipe.name} does not use it; it belongs to {owners}")
    keys = [key for key, _, _ in walk(schema())] + [f"cluster.{key}" for key, _, _ in walk(ClusterConfig())]
    last = [key for key in keys if key.rpartition(".")[2] == name.rpartition(".")[2]]
    near = last or difflib.get_close_matches(name, [*keys, *GROUPS, *RENAMED], n=1, cutoff=0.5)
    near = [renamed(each) or each for each in near]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return UserError(f"unknown key {name}{where}; {hint}--help all lists all keys")
