"""`@recipe`: turns a training function into a command that composes once, checks, freezes and launches, or is a rank.

The same file plays both parts. Started by a person it composes the config with Hydra, writes it into the run directory
and has a launcher start the ranks; started by a launcher (RANK is set) it is one of those ranks.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from torch import nn

from lockstep import cluster, fit, rank, rundir, world
from lockstep.checks import complete
from lockstep.errors import UserError
from lockstep.preemption import PREEMPTED
from lockstep.run import NothingLeft, Run
from lockstep.schema import AUTO, ClusterConfig, Config
from lockstep.words import short


@dataclass(frozen=True)
class Proof:
    """What a recipe must compute the same as recipes.single, and under which settings that can be exact.

    Attributes:
        settings: {dotted key: value}, for this recipe and for `single` alike.
        own: further settings for this recipe alone, those that bring its technique to bear.
        differs: settings under which it is another computation; by how much is measured.
        because: why, for the reader of the table.
        precisions: those that it computes in. Without fp64 among them, all that is compared is fp32.
        prepare: what the recipe does to the model before it wraps it, where that changes the training itself: called
            with (run, model), it does the same to `single`'s.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    differs: dict[str, Any] = field(default_factory=dict)
    because: str = ""
    precisions: tuple[str, ...] = ("fp64", "fp32", "bf16", "fp16")
    prepare: Callable[[Run, nn.Module], None] | None = None


@dataclass(frozen=True)
class Recipe:
    """A training function and how it wants to be started.

    Attributes:
        train: the function, given a Run.
        target: how to start it again: a module name, or the path of a script.
        ranks: the only number of ranks it runs on; None: any.
        next_command: what the final summary suggests.
        global_batchnorm: BatchNorm sees all ranks' images, so a share of one image is enough.
        check: called with (config, images in a rank's share of the batch) before anything is created; raises UserError.
        proof: what `recipes.verify` holds it to, one or several; None: nothing.
        backbone: resume=PATH names what it takes a part of (Run.backbone), which its `check` looks at.
        needs: an optional package it cannot do without, which is also the name of lockstep's extra that installs it.
        stands_for: of a tool that looks at one recipe, called with the config: which one.
        word: the key that a first word without `=` on the command line is the value of.
        several: the key whose value is a list of whole numbers on this tool's command line; config has it as `<key>s`.
        alone: called with the config before anything else; where it returns an exit code it has done all there is to
            do, and no rank is started.
    """

    train: Callable[[Run], None]
    target: str
    ranks: int | None = None
    next_command: str = ""
    global_batchnorm: bool = False
    check: Callable[[Config, int], None] | None = None
    proof: Proof | tuple[Proof, ...] | None = None
    backbone: bool = False
    needs: str | None = None
    stands_for: Callable[[Config], Recipe] | None = None
    word: str | None = None
    several: str | None = None
    alone: Callable[[Config], int | None] | None = None

    def subject(self, config: Config) -> Recipe:
        """What is to be run in the end: this recipe, or the one that this tool looks at."""
        return self.stands_for(config) if self.stands_for else self

    @property
    def name(self) -> str:
        return Path(self.target).stem if self.target.endswith(".py") else self.target.rpartition(".")[2]

    @property
    def doc(self) -> str:
        return sys.modules[self.train.__module__].__doc__ or ""

    @property
    def proofs(self) -> tuple[Proof, ...]:
        return (self.proof,) if isinstance(self.proof, Proof) else self.proof or ()

    def __call__(self, run: Run) -> None:
        with contextlib.suppress(NothingLeft):  # it was cut off between its last step and its result
            self.train(run)
        run.finish()

    def main(self) -> NoReturn:
        """Be the command: exit with the run's exit code, 2 for a mistake of the user's."""
        signal.signal(signal.SIGINT, signal.default_int_handler)  # recipes/__init__.py had it end the process at once
        try:
            cluster.adopt(self, load_launcher)
            place = world.discover(os.environ)
            code = submit(self) if place is None else None
        except UserError as error:
            code = complain(error)
        except KeyboardInterrupt:
            code = 128 + signal.SIGINT
        if code is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            if self.train.__module__ == "__main__":
                os._exit(code)  # the interpreter would take a second to take torch apart
            sys.exit(code)
        assert place is not None
        rank.be_a_rank(self, place)


def recipe(train: Callable[[Run], None] | None = None, **options: Any) -> Any:
    """Make a recipe of a training function: `@recipe` or `@recipe(ranks=1)`, then `train.main()` under `__main__`.

    The options are Recipe's attributes.
    """

    def make(function: Callable[[Run], None]) -> Recipe:
        spec = function.__globals__.get("__spec__")  # `python -m recipes.ddp` names the module here, not in __name__
        target = spec.name if spec else os.path.abspath(function.__globals__["__file__"])
        return Recipe(function, target, **options)

    return make(train) if train else make


def complain(error: UserError) -> int:
    """Show a user's mistake as the one line it is; return the exit code for it."""
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


# The submitting process -------------------------------------------------------------------------------------------


def submit(recipe: Recipe) -> int:
    """Compose, check, freeze and launch, once for every point of a sweep; return the exit code.

    Raises:
        UserError: nothing was created.
    """
    from lockstep.compose import compose  # Hydra: a submitting process needs it, a rank does not

    codes = [0]
    points: list[Config] = []  # of a cluster: submitted when all of them are known to be good

    def launch(config: Config) -> None:
        if recipe.alone and (code := recipe.alone(config)) is not None:
            codes.append(code)
            return
        there = config.cluster
        launcher = load_launcher(there.launcher if there else config.launcher)
        if hasattr(launcher, "check"):
            launcher.check(there)
        if there and hasattr(launcher, "submit"):
            cluster.check(config, recipe)
            points.append(config)
            return
        device, backend = world.resolve_device(config.device, config.backend)
        asked = cluster.check_here(config) if there else config.nproc
        nproc = asked or recipe.ranks or recipe.subject(config).ranks or world.default_nproc(device)
        world.check_nproc(nproc, device, backend)
        how = how_to_start(config, device, launcher)
        config = replace(config, cluster=None)
        if there and there.nodes > 1:
            codes.append(launch_by_hand(config, there, launcher, nproc, how))
            return
        more = {"cluster": there} if there else {}

        def warm() -> None:  # what is refused before does not wait for it
            if how.get("start") == "fork":
                rank.preload()

        def start(out: Path, variables: dict[str, str], target: str) -> int:
            environment = {rank.RUN_DIRECTORY: str(out), rank.LAUNCHER: str(os.getpid()), **variables}
            restarts = 0 if rank.TRIAL in variables else config.max_restarts
            return int(launcher.launch(target, environment, nproc=nproc, max_restarts=restarts, **more, **how))

        if config.batch_size == AUTO:
            warm()
            target = recipe.subject(config).target
            config.batch_size = fit.settle(config, recipe, nproc, partial(start, target=target))
        complete(config, recipe, nproc)
        if note := cluster.idle_nodes(os.environ):
            print(note, file=sys.stderr)
        out = rundir.freeze(config, recipe.name)
        if out is None:
            print(rundir.ALREADY_FINISHED.format(out=config.out))
            return
        started, code = time.perf_counter(), 1
        try:
            warm()
            code = start(out, {}, recipe.target)
        finally:
            if code:
                rundir.note_failure(out, recipe.name, nproc, time.perf_counter() - started)
        codes.append(code)
        if code == PREEMPTED or (code and rundir.has_checkpoint(out)):
            print(f"to go on: {again(recipe, out)}", file=sys.stderr)
        if code in (PREEMPTED, 128 + signal.SIGINT):  # it ends a sweep, not just one point of it
            raise SystemExit(code)

    def launch_by_hand(
        config: Config, there: ClusterConfig, launcher: ModuleType, nproc: int, how: dict[str, str]
    ) -> int:
        """This machine's ranks of several machines': like all that are started by hand, they make the run directory."""
        complete(replace(config, nproc=None), recipe, nproc * there.nodes)
        environment = {rank.LAUNCHER: str(os.getpid())}
        return int(
            launcher.launch(
                recipe.target, environment, nproc=nproc, max_restarts=config.max_restarts, cluster=there, **how
            )
        )

    compose(recipe, launch)
    if points:
        codes.append(cluster.submit(recipe, points, load_launcher))
    return max(codes)


def how_to_start(config: Config, device: str, launcher: ModuleType) -> dict[str, str]:
    """`start` for a launcher that can start ranks in more than one way, resolved; nothing for another one.

    Raises:
        UserError: it cannot start them as asked, or they could not use their device.
    """
    ways = getattr(launcher, "STARTS", ("spawn",))
    if config.start not in ("auto", *ways):
        raise UserError(f"start={config.start}: {launcher.__name__} cannot; allowed are auto, {', '.join(ways)}")
    if config.start == "fork" and device == "cuda":
        raise UserError("start=fork: a copied process cannot use a GPU; set start=spawn, or device=cpu")
    # In a copy, OpenMP would wait for ever for threads that only the original has.
    can = "fork" in ways and device == "cpu" and threads() <= THREADS
    fork = config.start == "fork" or (config.start == "auto" and can)
    return {"start": "fork" if fork else "spawn"} if len(ways) > 1 else {}


def threads() -> int:
    """Threads of this process."""
    return len(os.listdir("/proc/self/task"))


THREADS = threads()  # those of imported libraries, which know what to do in a copy


def again(recipe: Recipe, out: Path) -> str:
    """The command that continues the run in `out`: the one that was typed, with the folder."""
    program = recipe.target if recipe.target.endswith(".py") else f"-m {recipe.target}"
    words = [word for word in sys.argv[1:] if not word.startswith("out=")]
    return f"python {program} {shlex.join([*words, f'out={short(out)}'])}"


def load_launcher(name: str) -> ModuleType:
    """Import the module that a config names to start the ranks."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not name.startswith(str(error.name)):
            raise  # the launcher is there, and something it needs is not
        raise UserError(f"launcher={name}: no such module; allowed are launchers.torchrun, or one of yours") from None
