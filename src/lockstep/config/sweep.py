"""`-m seed=1,2 optim.lr=0.1,0.2`: the points of a sweep, before any of them is composed.

Hydra's own sweeper would write a multirun.yaml beside the runs, also of a sweep that is refused, and begin the first point
before it has looked at the second.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException

from lockstep.errors import UserError

FLAGS = {"-m", "--multirun"}


def is_sweep(words: list[str]) -> bool:
    """Whether a command asks for a run for each point."""
    return bool(FLAGS & set(words))


def is_plain(words: list[str]) -> bool:
    """Whether a sweep needs nothing of Hydra's own options."""
    options = [word for word in words if word.startswith("-") and word not in FLAGS]
    folders = [word.partition("=")[2] for word in options if word.startswith("--config-dir=")]
    return len(folders) == len(options) and all(Path(folder).is_dir() for folder in folders)


def points(words: list[str]) -> list[list[str]]:
    """The words of each point of a sweep, the last key's values changing first, as Hydra has it.

    Raises:
        UserError: there is none.
        hydra.errors.OverrideParseException: a word that is none of Hydra's.
    """
    folders = [
        f"file://{Path(word.partition('=')[2]).absolute()}" for word in words if word.startswith("--config-dir=")
    ]
    every: list[list[str]] = [[f"hydra.searchpath=[{','.join(folders)}]"]] if folders else []
    parser = OverridesParser.create()
    for word in words:
        if word.startswith("-"):
            continue
        try:
            override = parser.parse_override(word)
        except HydraException as error:
            raise OverrideParseException(override=word, message=str(error)) from None  # which says which word it is
        if not override.is_sweep_override():
            every.append([word])
        elif override.is_discrete_sweep():
            values = [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
            if not values:
                raise UserError(f"{word}: has no values, so this sweep has no runs; name some, such as seed=1,2")
            every.append(values)
        else:
            raise UserError(f"{word}: an interval has no end of values; name some, such as seed=1,2")
    return [list(point) for point in itertools.product(*every)]
