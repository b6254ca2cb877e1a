"""The words of a command line, before Hydra reads them: which options there are, and texts taken as they are typed."""

from __future__ import annotations

import os
import sys
from dataclasses import fields, is_dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from lockstep.config.schema import ClusterConfig, Config
from lockstep.errors import UserError

# Hydra's: https://hydra.cc/docs/advanced/hydra-command-line-flags
OPTIONS = (
    "--help -h --hydra-help --version --cfg -c --resolve --package -p --multirun -m --run -r --config-dir -cd "
    "--config-name -cn --config-path -cp --info -i --shell-completion -sc --experimental-rerun"
).split()


def check_options(words: list[str]) -> None:
    """Refuse an option that is not Hydra's, which would answer with a page.

    Raises:
        UserError: naming it, or a word that this locale's encoding cannot read.
    """
    for word in words:
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


def check_single(words: list[str]) -> None:
    """Refuse a list for what a run has one of: Hydra would take its last.

    Raises:
        UserError: naming it.
    """
    for word in words:
        name, _, value = word.partition("=")
        if name.lstrip("+") in ("model", "data", "optim", "cluster") and value.startswith("["):
            several = value.strip("[]")
            raise UserError(
                f"{word}: a run has one {name.lstrip('+')}; name one, or -m {name}={several} for a run of each"
            )


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
