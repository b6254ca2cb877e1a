"""A trial of a search: what it is told, what it may use, and the actor of Ray's that holds its process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lockstep.config.keys import typed
from lockstep.config.schema import Config
from lockstep.config.tasks import metric_of
from lockstep.distributed.cores import usable_cores, wished_threads
from lockstep.distributed.devices import default_nproc
from lockstep.errors import UserError
from lockstep.launch.recipe_process import RecipeFailed, RecipeProcess
from lockstep.launch.validate import validate
from lockstep.recipe import Recipe
from lockstep.run import Run
from lockstep.tune.config import TuneConfig
from lockstep.tune.search_space import SearchSpace
from lockstep.tune.trial_record import TrialRecord, evaluation_lines, read_metrics

# Keys that mean recipes.tune itself, and not the trials.
TUNE_KEYS = {"tune", "out", "nproc", "threads", "resume", "launcher", "recipes", "rounds"}
SAME_FOR_ALL = {"epochs", "max_steps", "eval_every", "metric", "patience"}  # else trials could not be compared


@dataclass(frozen=True)
class TrialPlan:
    """How many trials run at once, and with what."""

    ranks: int  # of a trial
    threads: int  # of a rank
    concurrent: int | None  # None: as many as the cluster has room for
    gpus: int  # of a trial


def plan_trials(config: TuneConfig, recipe: Recipe, device: str) -> TrialPlan:
    """Divide this machine among the trials; on a cluster, Ray does."""
    tune = config.tune
    ranks = tune.nproc or recipe.ranks or default_nproc(device)
    gpus = ranks if device == "cuda" else 0
    if tune.address is not None:
        return TrialPlan(ranks, config.threads or 1, tune.concurrent, gpus)
    cores, asked = usable_cores(), config.threads or wished_threads(os.environ)
    room = torch.cuda.device_count() // ranks if gpus else cores // ranks
    concurrent = min(tune.trials, tune.concurrent or max(1, room))
    return TrialPlan(ranks, asked or max(1, cores // (concurrent * ranks)), concurrent, gpus)


def trial_words(config: TuneConfig, tool: Recipe, recipe: Recipe, plan: TrialPlan) -> list[str]:
    """The overrides that all trials have in common. The threads are part of them: other threads, other last bits."""
    from lockstep.config.compose import overrides  # Hydra

    rest = overrides(
        tool, config, recipe, TUNE_KEYS | set(SearchSpace(config.tune.space, recipe, config.task.name).texts)
    )
    numbers = [f"nproc={plan.ranks}", f"threads={plan.threads}"]
    if config.tune.address is not None and config.device == "auto":  # it might be another one on each node
        numbers.append(f"device={'cuda' if plan.gpus else 'cpu'}")
    return [*rest, *numbers]


def unused_words(config: TuneConfig, tool: Recipe, recipe: Recipe) -> list[str]:
    """A line for each key that has a value although each trial draws its own."""
    from lockstep.config.compose import overrides  # Hydra

    drawn = SearchSpace(config.tune.space, recipe, config.task.name).texts
    given = [(word, word.partition("=")[0]) for word in overrides(tool, config, recipe, TUNE_KEYS)]
    return [
        f"warning: {word} is not used: each trial draws its own, {drawn[key]}; ~tune.space.{key} has it for all trials"
        for word, key in given
        if key in drawn
    ]


def check_draws(space: SearchSpace, base: Config, recipe: Recipe, ranks: int, counted: tuple[int, int] | None) -> None:
    """Hold whatever can be drawn to what the recipe takes.

    Args:
        base: the config that all trials have in common.
        counted: classes and training images, where they are the same for all trials.

    Raises:
        UserError: it names the values that are refused, and why.
    """
    tree = OmegaConf.structured(base)
    for drawn in space.examples():
        values = space.values(drawn, base)
        try:
            one = tree.copy()
            for key, value in values.items():
                OmegaConf.update(one, key, value)
            made: Any = OmegaConf.to_object(one)
            validate(made, recipe, ranks, counted)
        except (UserError, OmegaConfBaseException) as error:
            shown = ", ".join(typed(*pair) for pair in values.items())
            raise UserError(f"tune.space can draw {shown}: {str(error).splitlines()[0]}") from None


def make_trainable(run: Run[TuneConfig], recipe: Recipe) -> Any:
    """What Ray runs as an actor, one for each trial, where it finds room: it holds the command that trains."""
    from ray.tune import Trainable

    config = run.config
    target, folder, metric = recipe.target, run.out / "trials", metric_of(config)
    ends = {"step": config.max_steps, "epoch": config.epochs}  # of the last evaluation, one or the other
    here, variables = os.getcwd(), {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}

    class Trial(Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self.record = TrialRecord(folder, config["number"], config["words"], config["values"])
            self.process: RecipeProcess | None = None
            if not self.record.has_ended():  # an earlier start may have been killed before Tune had noted it
                self.process = RecipeProcess(target, config["words"], self.record.start(), here, variables)
            self.pending: list[dict[str, Any]] = []  # evaluations that are not reported yet
            self.latest: dict[str, Any] = {"evaluations": 0}

        def step(self) -> dict[str, Any]:
            """The next evaluation, or after a second without one the latest: Tune can stop a trial only in between."""
            try:
                ended = self.process is None or self.process.ended(seconds=0 if self.can_report() else 1)
            except RecipeFailed as error:
                self.record.change(state="failed", problem=str(error))
                return self.latest | {"done": True}
            known = self.latest["evaluations"] + len(self.pending)
            self.pending += evaluation_lines(read_metrics(self.record.out), metric)[known:]
            if self.pending and (ended or self.can_report()):
                self.latest = self.pending.pop(0)
            done = ended and not self.pending
            if done and self.process:
                self.record.change(state="finished")
            return self.latest | {"done": done}

        def can_report(self) -> bool:
            """Whether there is an evaluation, other than the last: with that one the trial is over for Tune, while its
            process has yet to write its model."""
            return bool(self.pending) and all(self.pending[0][name] != end for name, end in ends.items())

        def cleanup(self) -> None:
            if self.process is None or self.record.content["state"] != "running":
                return
            if self.process.stop():
                self.record.change(state="stopped" if self.process.process.returncode else "finished")
                return
            try:  # it had ended by itself, which no step has seen yet
                self.process.ended(seconds=0)
                self.record.change(state="finished")
            except RecipeFailed as error:
                self.record.change(state="failed", problem=str(error))

    return Trial
