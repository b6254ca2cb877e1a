"""The search: Ray's tuner with a searcher that draws settings and a scheduler that stops trials early."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lockstep.config import run_directory
from lockstep.config.keys import typed
from lockstep.config.tasks import metric_of
from lockstep.errors import UserError
from lockstep.launch.recipe_process import SAVING_SECONDS
from lockstep.recipe import Recipe
from lockstep.run import Run
from lockstep.tune.config import TuneConfig
from lockstep.tune.search_space import SearchSpace
from lockstep.tune.standings import metric_mode
from lockstep.tune.trial import TrialPlan, make_trainable
from lockstep.tune.trial_record import evaluation_lines, read_metrics


def make_searcher(config: TuneConfig, recipe: Recipe, common: list[str]) -> Any:
    """What draws the settings of each trial, at random or Optuna's TPE, and numbers them."""
    from ray.tune.search import Searcher
    from ray.tune.search.optuna import OptunaSearch

    from lockstep.config.compose import compose_another

    space, base = SearchSpace(config.tune.space, recipe, config.task.name), compose_another(recipe, common)

    class Numbered(Searcher):
        number = 0
        draw: Callable[[str], dict[str, Any]]

        def suggest(self, trial_id: str) -> dict[str, Any]:
            values = space.values(self.draw(trial_id), base)
            number, self.number = self.number, self.number + 1
            return {"number": number, "values": values, "words": [*common, *(typed(*pair) for pair in values.items())]}

        def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
            pass  # what counts is what a trial comes to

    class Random(Numbered):
        """Each trial's settings depend on the seed and its number alone."""

        def draw(self, trial_id: str) -> dict[str, Any]:
            return space.sample(config.seed, self.number)

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            pass

        def save(self, checkpoint_path: str) -> None:
            Path(checkpoint_path).write_text(str(self.number), encoding="utf-8")

        def restore(self, checkpoint_path: str) -> None:
            self.number = int(Path(checkpoint_path).read_text(encoding="utf-8"))

    class Optuna(Numbered, OptunaSearch):
        def draw(self, trial_id: str) -> dict[str, Any]:
            return OptunaSearch.suggest(self, trial_id) or {}

    if config.tune.search == "random":
        return Random()
    domains = {name: draw.domain() for name, draw in space.draws.items()}
    distributions = OptunaSearch.convert_search_space(domains)
    return Optuna(distributions, metric=metric_of(config), mode=metric_mode(config), seed=config.seed)


def make_scheduler(run: Run[TuneConfig]) -> Any:
    """ASHA, by the number of evaluations, or nothing that stops a trial."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    config, folder = run.config, run.out / "trials"
    metric = metric_of(config)

    class Asha(ASHAScheduler):
        def on_trial_add(self, controller: Any, added: Any) -> None:
            """Tune restores trials, but not what its scheduler knew of them: that is read from what they logged."""
            super().on_trial_add(controller, added)
            for line in evaluation_lines(read_metrics(folder / str(added.config["number"])), metric):
                self.on_trial_result(controller, added, line)

    if config.tune.scheduler == "none":
        return FIFOScheduler()
    evaluations = math.ceil(config.epochs / config.eval_every) if config.eval_every else 1
    return Asha(
        time_attr="evaluations",
        grace_period=config.tune.grace,
        reduction_factor=config.tune.reduction,
        max_t=max(evaluations, config.tune.grace) + 1,  # a trial's last evaluation is its own end, not ASHA's
    )


def make_tuner(run: Run[TuneConfig], recipe: Recipe, plan: TrialPlan, common: list[str]) -> Any:
    """The search in the run directory, as it was when it was cut off; else a new one.

    Args:
        common: the overrides that all trials have in common.
    """
    from ray import tune

    tuned = run.config.tune
    resources: Any = {"CPU": plan.ranks * plan.threads, "GPU": plan.gpus}
    trainable = tune.with_resources(make_trainable(run, recipe), resources)
    state = run.out / "ray"
    if any(state.glob("experiment_state-*.json")) and tune.Tuner.can_restore(str(state)):
        try:
            found = tune.Tuner.restore(str(state), trainable=trainable)
            run.report.line("resuming the search")
            return found
        except Exception as error:
            # It was killed while it wrote. The trials are still there; those that are drawn again resume, or have ended.
            run.report.line(
                f"the search in {state} cannot be read ({error}); starting it again with the trials it left"
            )
    shutil.rmtree(state, ignore_errors=True)
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            metric=metric_of(run.config),
            mode=metric_mode(run.config),
            num_samples=tuned.trials,
            max_concurrent_trials=plan.concurrent,
            search_alg=make_searcher(run.config, recipe, common),
            scheduler=make_scheduler(run),
            trial_dirname_creator=lambda trial: str(trial.config["number"]),
        ),
        run_config=tune.RunConfig(
            name=state.name,
            storage_path=str(run.out),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # a trial's own are better
            verbose=0,
        ),
    )


def wait_for_trials(run: Run[TuneConfig]) -> UserError | None:
    """Wait for those that were asked to end, and may be saving still; the error to raise where one does not end."""
    problem = None
    for config in (run.out / "trials").glob("[0-9]*/config.yaml"):
        try:
            run_directory.lock(config.parent, SAVING_SECONDS).close()
        except UserError as error:
            problem = error
    return problem
