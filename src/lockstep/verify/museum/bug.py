"""What a bug of the museum is, and how a recipe is broken by it."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

from lockstep.recipe import Proof, Recipe
from lockstep.run import Run

REFUSED = "an error"
GROUP = {"model.norm": "group"}  # BatchNorm on each rank's share would be another computation
CLIPPED = {"gradients.clip_norm": 0.1}  # below the norm of each step
Patch = Callable[[Run[Any]], AbstractContextManager[None]]


@dataclass(frozen=True)
class Bug:
    """A bug that was found elsewhere, and the mutant of a recipe that has it.

    Attributes:
        upstream: where it was reported or mended, owner/repository#number, the first one first.
        story: what was wrong, and what that did to a training; one or two sentences.
        recipe: the recipe that it breaks.
        row: the number of the recipe's row in recipes.verify by which it is seen first; REFUSED: there is none, for the
            recipe is stopped.
        settings, own: as `Proof` has them.
        edits: (lines of the recipe, what stands in their place).
        names: what the recipe has imported or defined by a name, replaced by something else.
        patch: called with the Run, changes the library while the recipe trains.
        prepare: as `Proof` has it, of both sides; None: the recipe's own.
        task: what both sides train in place of the recipe's own task.
        interrupt: the step after which the training is cut off, and resumed; None: it is not.
    """

    name: str
    upstream: tuple[str, ...]
    story: str
    recipe: str
    row: str
    settings: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    edits: tuple[tuple[str, str], ...] = ()
    names: dict[str, Any] | None = None
    patch: Patch | None = None
    prepare: Callable[[Run[Any], Any], None] | None = None
    task: str | None = None
    interrupt: int | None = None

    @property
    def links(self) -> list[str]:
        """The addresses of `upstream`; GitHub leads from an issue's to a pull request's."""
        return [f"https://github.com/{each.replace('#', '/issues/')}" for each in self.upstream]

    @property
    def steps(self) -> int:
        """After how many it is seen."""
        return 3 if self.interrupt is None else self.interrupt + 1

    @property
    def changes(self) -> list[str]:
        """What was taken out of the recipe, and what was put in."""
        found = []
        for old, new in self.edits:
            before, after = old.splitlines(), new.splitlines()
            found += [f"- {line.strip()}" for line in before if line not in after]
            found += [f"+ {line.strip()}" for line in after if line not in before]
        return found

    @property
    def told(self) -> str:
        """The story, and where it is from."""
        return f"{self.story} {', '.join(self.links)}"


def sound(bug: Bug, recipe: Recipe) -> Recipe:
    """The recipe as it is, held to the settings under which the bug is seen."""
    prepare = bug.prepare or next((proof.prepare for proof in recipe.proofs), None)
    proof = Proof(bug.settings, bug.own, precisions=("fp64",), prepare=prepare)
    return replace(recipe, proof=proof, task=bug.task or recipe.task)


def broken(bug: Bug, recipe: Recipe) -> Recipe:
    """A copy of the recipe that has the bug. The recipe itself, and whoever else uses the library, does not have it."""
    copy = edited(recipe, bug)

    @functools.wraps(recipe.train)
    def train(run: Run[Any]) -> None:
        with bug.patch(run) if bug.patch else contextlib.nullcontext():
            copy.train(run)

    return replace(sound(bug, recipe), train=train)


def edited(recipe: Recipe, bug: Bug) -> Recipe:
    """The recipe of a changed copy of its file."""
    original = sys.modules[recipe.train.__module__]
    source = recipe.path.read_text(encoding="utf-8")
    for old, new in bug.edits:
        if old not in source:
            raise LookupError(f"museum={bug.name}: recipes/{bug.recipe}.py has changed, and has no {old!r} any more")
        source = source.replace(old, new)
    module = ModuleType(original.__name__, original.__doc__)
    module.__dict__.update({"__spec__": original.__spec__, "__file__": original.__file__})
    exec(compile(source, str(recipe.path), "exec"), module.__dict__)
    for name, value in (bug.names or {}).items():
        if name not in source:
            raise LookupError(f"museum={bug.name}: recipes/{bug.recipe}.py has no {name} any more")
        setattr(module, name, value)
    found: Recipe = module.train
    return found


@contextlib.contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of a module, a class or an object has another value within."""
    own = name in vars(owner)
    before = vars(owner)[name] if own else getattr(owner, name)  # of a class: the function, not what it binds
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
