"""`@recipe`: turns a training function into a command that composes once, checks, freezes and launches, or is a rank.

The same file plays both parts. Started by a person it composes the config with Hydra, writes it into the run directory
and has a launcher start the ranks; started by a launcher (RANK is set) it is one of those ranks.
"""

from __future__ import annotations

import copy
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from lockstep.config import run_directory, unfinished
from lockstep.config.keys import AUTO
from lockstep.config.schema import LAST, ClusterConfig, Config
from lockstep.config.tasks import IMAGES, metric_of, short_name
from lockstep.distributed import environment
from lockstep.distributed.devices import check_nproc, default_nproc, resolve_device
from lockstep.distributed.environment import discover
from lockstep.distributed.signals import PREEMPTED
from lockstep.errors import UserError
from lockstep.launch import batch_size, cluster, worker
from lockstep.launch.from_python import RunResult, run_recipe
from lockstep.launch.launcher import load_launcher
from lockstep.launch.run_records import RunRecord, apart, read_record, settings_of, show_sweep
from lockstep.launch.validate import validate
from lockstep.recipe import Recipe
from lockstep.run import Run
from lockstep.utils.places import as_installed
from lockstep.utils.standard_streams import protect, show_meanwhile
from lockstep.utils.text import count, short


@dataclass(frozen=True)
class Command(Recipe):
    """A recipe that is started from a command line: `train.main()` under `__main__`."""

    def run(self, *words: str, **keys: Any) -> RunResult:
        """Run the recipe from Python, in a notebook or a script: `train.run(nproc=2, max_steps=20, task=MyTask)`.

        Args, returns, raises: as lockstep.launch.from_python.run_recipe.
        """
        return run_recipe(self, words, keys)

    def main(self) -> NoReturn:
        """Be the command: exit with the run's exit code, 2 for a mistake of the user's."""
        if not self.target:
            raise UserError(
                f"{self.name}: is defined in a notebook's cell, and has no file; start it with {self.name}.run()"
            )
        protect()
        show_meanwhile("")
        signal.signal(signal.SIGINT, signal.default_int_handler)  # recipes/__init__.py had it end the process at once
        try:
            cluster.adopt(self)
            take_local_rank(sys.argv, os.environ)
            place = discover(os.environ)
            code = launch_recipe(self) if place is None else None
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
        worker.work(self, place)


def take_local_rank(words: list[str], env: MutableMapping[str, str]) -> None:
    """Take `--local-rank=N` off a rank's command line, where torch.distributed.launch and deepspeed put it."""
    if "RANK" not in env:
        return
    for word in [word for word in words if word.partition("=")[0] in ("--local-rank", "--local_rank")]:
        at = words.index(word)
        name, _, value = words.pop(at).partition("=")
        if not value and words[at:]:
            value = words.pop(at)
        if not value.isdecimal():
            raise UserError(f"{name}={value}: allowed are whole numbers from 0 up")
        env.setdefault("LOCAL_RANK", value)


def make_recipe(train: Callable[[Run], None] | None = None, **options: Any) -> Any:
    """What `lockstep.recipe` does."""

    def make(function: Callable[[Run], None]) -> Command:
        spec = function.__globals__.get("__spec__")  # `python -m recipes.ddp` names the module here, not in __name__
        file = function.__globals__.get("__file__")  # a notebook's cell has none
        target = spec.name if spec else os.path.abspath(file) if file else ""
        return Command(function, target, **options)

    return make(train) if train else make


def complain(error: UserError) -> int:
    """Show a user's mistake as the one line it is; return the exit code for it."""
    print(as_installed(f"error: {error}"), file=sys.stderr)
    return error.exit_code


# The submitting process -------------------------------------------------------------------------------------------


def launch_recipe(recipe: Recipe) -> int:
    """Compose, check, freeze and launch, once for every point of a sweep; return the exit code.

    Raises:
        UserError: nothing was created.
    """
    from lockstep.config.compose import compose  # Hydra: a submitting process needs it, a rank does not

    codes = [0]
    configs: list[Config] = []
    ended: list[RunRecord] = []  # the points of a sweep on this machine
    points: list[Config] = []  # of a cluster: submitted when all of them are known to be good

    def launch(config: Config) -> None:
        if recipe.alone and (code := recipe.alone(config)) is not None:
            codes.append(code)
            return
        there = config.cluster
        launcher = load_launcher(*((there.launcher, "cluster.launcher") if there else (config.launcher,)))
        if hasattr(launcher, "check"):
            launcher.check(there)
        if there and hasattr(launcher, "submit"):
            cluster.check_cluster(config, recipe)
            points.append(config)
            return
        device, backend = resolve_device(config.device, config.backend)
        asked = cluster.check_here(config) if there else config.nproc
        nproc = asked or recipe.ranks or recipe.subject(config).ranks or default_nproc(device)
        check_nproc(nproc, device, backend)
        how = how_to_start(config, device, launcher)
        config = replace(config, cluster=None)
        if there and there.nodes > 1:
            codes.append(launch_by_hand(config, there, launcher, nproc, how))
            return
        more = {"cluster": there} if there else {}

        def warm() -> None:  # what is refused before does not wait for it
            if how.get("start") == "fork":
                show_meanwhile(f"{recipe.name}: starting {count(nproc, 'rank')} …")
                worker.preload()
                show_meanwhile("")

        def start(out: Path, variables: dict[str, str], target: str) -> int:
            variables = {environment.RUN_DIRECTORY: str(out), environment.LAUNCHER: str(os.getpid()), **variables}
            restarts = 0 if environment.TRIAL in variables else config.max_restarts
            return int(launcher.launch(target, variables, nproc=nproc, max_restarts=restarts, **more, **how))

        searched = config.global_batch_size == AUTO and recipe.batch is None
        if searched:
            warm()
            target = recipe.subject(config).target
            config.global_batch_size = batch_size.find_batch_size(config, recipe, nproc, partial(start, target=target))
        validate(config, recipe, nproc)
        how = still_fork(config, how)
        if note := cluster.idle_nodes(os.environ):
            print(note, file=sys.stderr)
        unfinished.offer_or_continue(config, recipe.name, any_batch=searched)
        out = run_directory.freeze(config, recipe.name)
        if out is None:
            print(run_directory.already_finished(config))
            ended.append(read_record(Path(str(config.out))))
            return
        started, code = time.perf_counter(), 1
        try:
            warm()
            code = start(out, {}, recipe.target)
        finally:
            if code:
                run_directory.note_failure(out, recipe.name, nproc, time.perf_counter() - started)
        codes.append(code)
        if len(configs) > 1:
            ended.append(read_record(out))
        cut_off = code in (PREEMPTED, 128 + signal.SIGINT)
        if code == PREEMPTED or (cut_off and len(configs) > 1) or (code and run_directory.has_checkpoint(out)):
            whole = out.parent if len(configs) > 1 else out  # of a sweep: what has finished is not trained again
            print(f"to resume: {again(recipe, whole)}", file=sys.stderr)
        if cut_off:  # it ends a sweep, not just one point of it
            ended.extend(RunRecord(out.parent / str(number), {}) for number in range(len(ended), len(configs)))
            close_sweep()
            raise SystemExit(code)

    def launch_by_hand(
        config: Config, there: ClusterConfig, launcher: ModuleType, nproc: int, how: dict[str, str]
    ) -> int:
        """This machine's ranks of several machines': like all that are started by hand, they make the run directory."""
        validate(replace(config, nproc=None), recipe, nproc * there.nodes)
        variables = {environment.LAUNCHER: str(os.getpid())}
        return int(
            launcher.launch(
                recipe.target, variables, nproc=nproc, max_restarts=config.max_restarts, cluster=there, **how
            )
        )

    def close_sweep() -> None:
        if len(configs) > 1 and len(ended) == len(configs) and recipe.single_training:
            show_sweep(apart([settings_of(config) for config in configs]), ended, metric_of(configs[0]))

    compose(recipe, configs.append)
    if len(configs) > 1:
        for config in configs:
            check_point(recipe, copy.deepcopy(config))
    for config in configs:
        try:
            launch(config)
        except UserError as error:
            if len(configs) == 1 or points:
                raise
            codes.append(complain(error))  # found only now; the other points are trained all the same
            ended.append(read_record(Path(str(config.out)), str(error)))
    close_sweep()
    if points:
        codes.append(cluster.submit(recipe, points))
    return max(codes)


def check_point(recipe: Recipe, config: Config) -> None:
    """Look at a point of a sweep before the first one is trained; raises UserError where it would be refused.

    Those of a cluster are looked at before any is submitted; what is found by trials is found when its turn comes.
    """
    there = config.cluster
    if recipe.alone or config.global_batch_size == AUTO or there:
        return
    launcher = load_launcher(config.launcher)
    device, backend = resolve_device(config.device, config.backend)
    nproc = config.nproc or recipe.ranks or recipe.subject(config).ranks or default_nproc(device)
    check_nproc(nproc, device, backend)
    how_to_start(config, device, launcher)
    validate(config, recipe, nproc)
    run_directory.found_in(config, recipe.name)


def how_to_start(config: Config, device: str, launcher: ModuleType) -> dict[str, str]:
    """`start` for a launcher that can start ranks in more than one way, resolved; nothing for another one.

    Raises:
        UserError: it cannot start them as asked, or they could not use their device.
    """
    ways = getattr(launcher, "STARTS", ("spawn",))
    if config.start not in ("auto", *ways):
        raise UserError(f"start={config.start}: {config.launcher} cannot; allowed are auto, {', '.join(ways)}")
    if config.start == "fork" and device == "cuda":
        raise UserError("start=fork: a copied process cannot use a GPU; set start=spawn, or device=cpu")
    # In a copy, OpenMP would wait for ever for threads that only the original has.
    can = "fork" in ways and device == "cpu" and threads() <= THREADS
    fork = config.start == "fork" or (config.start == "auto" and can)
    return {"start": "fork" if fork else "spawn"} if len(ways) > 1 else {}


def still_fork(config: Config, how: dict[str, str]) -> dict[str, str]:
    """`how_to_start` once more, when the task has been made: its code may have started threads in this process.

    Raises:
        UserError: it has, and start=fork was asked for.
    """
    if how.get("start") != "fork" or config.task.name == IMAGES or threads() <= THREADS:
        return how
    if config.start == "fork":
        raise UserError(f"start=fork: task={short_name(config.task.name)} has started threads; set start=spawn")
    return {**how, "start": "spawn"}


def threads() -> int:
    """Threads of this process."""
    return len(os.listdir("/proc/self/task"))


THREADS = threads()  # those of imported libraries, which know what to do in a copy


def again(recipe: Recipe, out: Path) -> str:
    """The command that continues the run in `out`: the one that was typed, with the folder."""
    program = shlex.quote(recipe.target) if recipe.target.endswith(".py") else f"-m {recipe.target}"
    words = [word for word in sys.argv[1:] if not word.startswith("out=") and word != f"resume={LAST}"]
    return f"python {program} {shlex.join([*words, f'out={short(out)}'])}"
