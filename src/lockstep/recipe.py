"""What a recipe is: a training function, how it wants to be started, and what `recipes.verify` holds it to."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.config.declared import own_task
from lockstep.config.schema import Config
from lockstep.config.tasks import short_name

if TYPE_CHECKING:
    from torch import nn

    from lockstep.run import Run


@dataclass(frozen=True)
class Proof:
    """What a recipe must compute the same as recipes.single, and under which settings that can be exact.

    Attributes:
        settings: {dotted key: value}, for this recipe and for `single` alike.
        own: further settings for this recipe alone, those that bring its technique to bear.
        differs: settings under which it is another computation; by how much is measured.
        because: why, for the reader of the table.
        precisions: those that it computes in. Without fp64 among them, all that is compared is fp32.
        images: whether it is of task=images alone, whose layers it names.
        prepare: what the recipe does to the model before it wraps it, where that changes the training itself: called
            with (run, model), it does the same to `single`'s.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    differs: dict[str, Any] = field(default_factory=dict)
    because: str = ""
    precisions: tuple[str, ...] = ("fp64", "fp32", "bf16", "fp16")
    images: bool = False
    prepare: Callable[[Run, nn.Module], None] | None = None


@dataclass(frozen=True)
class Recipe:
    """A training function and how it wants to be started.

    Attributes:
        train: the function, given a Run.
        config: its config class: Config, or a subclass with keys of the recipe's own.
        target: how to start it again: a module name, or the path of a script; nothing in a notebook's cell.
        ranks: the only number of ranks it runs on; None: any.
        next_command: what the final summary suggests.
        global_batchnorm: whether BatchNorm sees all ranks' images, so that a share of one image is enough; or a function
            that says so of a config.
        check: called with (config, images in a rank's share of the batch) before anything is created; raises UserError.
        proof: what `recipes.verify` holds it to, one or several; None: nothing.
        local_updates: whether each rank updates weights of its own, by gradients of its own: `recipes.verify` compares the
            mean of all ranks' gradients.
        backbone: resume=PATH names what it takes a part of (Run.backbone), which its `check` looks at.
        task: what it trains where the command names no task: a class in its own file, or a name as `task=` takes it.
        needs: an optional package it cannot do without, which is also the name of lockstep's extra that installs it.
        stands_for: of a tool that looks at one recipe, called with the config: which one.
        looks_at: of a tool: the key that names the recipes it runs, whose own keys it then has, too.
        single_training: whether it is one training, for which one batch size can be found.
        batch: of a tool for which global_batch_size=auto is a number to be chosen, and none to be found by trials:
            called with (samples in the training set, ranks).
        word: the key that a first word without `=` on the command line is the value of; of a list, all such words before
            the first key.
        several: the key whose value is a list of whole numbers on this tool's command line; config has it as `<key>s`.
        alone: called with the config before anything else; where it returns an exit code it has done all there is to
            do, and no rank is started.
    """

    train: Callable[[Run], None]
    target: str
    ranks: int | None = None
    next_command: str = ""
    config: type[Config] = Config
    global_batchnorm: bool | Callable[[Any], bool] = False
    check: Callable[[Any, int], None] | None = None
    proof: Proof | tuple[Proof, ...] | None = None
    local_updates: bool = False
    backbone: bool = False
    task: type | str | None = None
    needs: str | None = None
    stands_for: Callable[[Any], Recipe] | None = None
    looks_at: str | None = None
    single_training: bool = True
    batch: Callable[[int, int], int] | None = None
    word: str | None = None
    several: str | None = None
    alone: Callable[[Any], int | None] | None = None

    def subject(self, config: Config) -> Recipe:
        """What is to be run in the end: this recipe, or the one that this tool looks at."""
        return self.stands_for(config) if self.stands_for else self

    @property
    def name(self) -> str:
        if not self.target:  # a notebook's cell
            return self.train.__name__
        return Path(self.target).stem if self.target.endswith(".py") else self.target.rpartition(".")[2]

    @property
    def path(self) -> Path:
        """Its file."""
        return Path(sys.modules[self.train.__module__].__file__ or ".")

    def has_global_batchnorm(self, config: Config) -> bool:
        """Whether BatchNorm sees all ranks' images under this config."""
        given = self.global_batchnorm
        return given(config) if callable(given) else given

    @property
    def doc(self) -> str:
        return sys.modules[self.train.__module__].__doc__ or ""

    @property
    def proofs(self) -> tuple[Proof, ...]:
        return (self.proof,) if isinstance(self.proof, Proof) else self.proof or ()

    def __call__(self, run: Run) -> None:
        from lockstep.loop.training_loop import NothingLeft  # torch

        own, named = own_task(self), run.config.task.name
        if own not in (None, named):
            run.report.line(f"task={short_name(named)} instead of the recipe's own task, {short_name(str(own))}")
        with contextlib.suppress(NothingLeft):  # it was cut off between its last step and its result
            self.train(run)
        run.finish()
