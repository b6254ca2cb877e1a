"""The words of a command line, before Hydra reads them: which options there are, and texts taken as they are typed."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Quote, QuotedString
from hydra.errors import HydraException

from lockstep.config.schema import ClusterConfig, Config
from lockstep.errors import UserError

# Hydra's: https://hydra.cc/docs/advanced/hydra-command-line-flags
OPTIONS = (
    "--help -h --hydra-help --version --cfg -c --resolve --package -p --multirun -m --run -r --config-dir -cd "
    "--config-name -cn --config-path -cp --info -i --shell-completion -sc"
).split()
TAKING = "--cfg -c --package -p --config-dir -cd --config-name -cn --config-path -cp".split()  # a value
VALUES = {
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}
LONG = {"-c": "--cfg", "-i": "--info"}


def check_options(words: list[str]) -> None:
    """Refuse an option that is not Hydra's, or lacks its value, which would be answered with a page; and words that are
    no keys, or keys of Hydra's own, which would be ignored.

    Raises:
        UserError: naming it, or a word that this locale's encoding cannot read.
    """
    for word, following in zip(words, [*words, ""][1:], strict=True):
        if any("\ud800" <= sign <= "\udfff" for sign in word):  # bytes that Python could not decode
            shown = os.fsencode(word).decode(errors="backslashreplace")
            encoding = sys.getfilesystemencoding()
            other = "" if encoding == "utf-8" else "set LC_ALL=C.UTF-8, or "
            raise UserError(
                f"{shown}: is no text in this locale's encoding, {encoding}; {other}write it in plain letters"
            )
        if word.startswith("-") and word.partition("=")[0] not in OPTIONS:
            shown = ", ".join(option for option in OPTIONS if option.startswith("--"))
            raise UserError(f"{word}: no such option; allowed are words such as seed=1, and {shown}")
        check_option(word, following)
        name = re.split("[=@]", word.lstrip("+~"))[0]
        if not name:
            raise UserError(f"{word!r}: names no key; allowed are words such as seed=1")
        if re.search(r"[\n\r]", word):
            raise UserError(f"{name}={word.partition('=')[2]!r}: allowed are texts of one line")
        if name.replace("/", ".").partition(".")[0] == "hydra":
            raise UserError(
                f"{word}: Hydra only composes here, and this would be ignored; set out=FOLDER for a run directory, "
                "--config-dir=FOLDER for config files of your own"
            )


def check_option(word: str, following: str) -> None:
    """Hold an option to its value, which is behind its `=` or is the following word; raises UserError."""
    option, equals, value = word.partition("=")
    option = LONG.get(option, option)
    if not equals and not following.startswith("-") and (option in TAKING or "=" not in following):
        value = following
    if option in TAKING and not value:
        raise UserError(f"{word}: lacks its value; write {option}=…")
    if value and value not in VALUES.get(option, (value,)):
        raise UserError(f"{option}={value}: allowed are {', '.join(VALUES[option])}")


def check_groups(words: list[str], groups: Mapping[str, list[str]]) -> None:
    """Refuse a list for what a run has one of, of which Hydra would take the last, and what is no name of an option.

    Args:
        groups: {group: its options}.

    Raises:
        UserError: naming it.
    """
    for word in words:
        name, equals, value = word.partition("=")
        group = name.lstrip("+").partition("@")[0]
        if not equals or group not in groups:
            continue
        if group in ("model", "data", "optim", "cluster") and value.startswith("[") and value.strip("[] "):
            raise UserError(
                f"{word}: a run has one {group}; name one, or -m {name}={value.strip('[]')} for a run of each"
            )
        with contextlib.suppress(HydraException):  # composing it says what is wrong
            read = OverridesParser.create().parse_override(word).value()
            names = read.list if isinstance(read, ChoiceSweep) else read if isinstance(read, list) else [read]
            several = group in ("logger", "debug")
            if not isinstance(read, dict) and not (
                (names or several) and all(isinstance(each, str) and each for each in names)
            ):
                example = f"; several as [{','.join(groups[group][:2])}]" if several else ""
                raise UserError(f"{word}: allowed are {', '.join(groups[group])}{example}")


def verbatim(word: str, texts: set[str], sweeps: bool) -> str:
    """`out=1e3` or `out=a=b` as Hydra takes it for a text: in quotes, where it would read something else or nothing.

    Args:
        texts: the keys whose values are texts.
        sweeps: whether `KEY=a,b` stands for several points.
    """
    name, equals, value = word.partition("=")
    if not equals or name.lstrip("+") not in texts:
        return word
    try:
        read = OverridesParser.create().parse_override(word)
        given = "several" if read.is_sweep_override() and sweeps else read.value()
    except HydraException:
        given = NotImplemented
    if value and (given is None or isinstance(given, str)):
        return word
    return f"{name}={QuotedString(value, Quote.single).with_quotes()}"


def text_keys(schema: type, prefix: str = "") -> set[str]:
    """The keys whose values are texts, null perhaps."""
    found = set()
    for entry in fields(schema):
        inner = entry.default_factory
        if isinstance(inner, type) and is_dataclass(inner):
            found |= text_keys(inner, f"{prefix}{entry.name}.")
        elif str(entry.type) in ("str", "str | None", "<class 'str'>", "typing.Optional[str]"):
            found.add(f"{prefix}{entry.name}")
    return found | (set() if prefix or not issubclass(schema, Config) else text_keys(ClusterConfig, "cluster."))


def spelled_out(words: list[str], key: str, schema: type) -> list[str]:
    """`memory model=resnet50` as `check=memory model=resnet50`, for a tool that is told its task in a plain word; where
    that key is a list, `A B seed=1` as `runs=['A','B'] seed=1`, of any words."""
    if any(entry.name == key and "list" in str(entry.type) for entry in fields(schema)):
        plain = list(itertools.takewhile(lambda word: "=" not in word and not word.startswith("-"), words))
        quoted = [QuotedString(word, Quote.single).with_quotes() for word in plain]
        return [f"{key}=[{','.join(quoted)}]", *words[len(plain) :]] if plain else words
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
