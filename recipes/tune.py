"""Tune: a search for good settings of any recipe with Ray Tune, in which trials that are behind are stopped early.

A trial is the command that a person would type, `python -m recipes.ddp optim.lr=0.0123 global_batch_size=48 …`, with launcher,
ranks and run directory of its own. An actor of Ray's starts it where there is room, follows its metrics.jsonl, and
reports each evaluation to this process, which holds the search: a searcher that draws settings (at random, or Optuna's
TPE from what earlier ones came to) and a scheduler, ASHA: of the trials that get to a rung, grace × reductionᵏ
evaluations, those among the better 1/reduction so far go on, the others are asked to leave; they save, and are gone.
Nobody waits at a rung for the others, so no core is idle.

`tune.space` says for each config key what to draw it from (search_space.py has the words); `conf/tune/` holds spaces,
and every other key is the same for all trials. Trials at once share the cores: each gets `threads` for each of its
ranks, which Ray counts as its CPUs; of GPUs, Ray gives each trial `tune.nproc` of its own. What Ray sets for its own
workers (OMP_NUM_THREADS, RAY_…) does not get as far as the ranks. With `tune.address` the trials run wherever an
existing Ray cluster has room, on nodes that must share the run directory's file system.

    python -m recipes.tune tune.recipe=ddp epochs=4
    python -m recipes.tune tune=optuna tune.concurrent=4 'tune.space.model.norm=choice(batch, group)'

Ctrl-C it, kill it, and type it again with the `out=` it had: what has ended is not run again, what was cut off goes on
from its own checkpoint, and the settings still to come are those that would have come. (Ray keeps the search as a
pickle in `ray/`: go on only in a run directory that you trust.)

Expect: a table of eight trials after some minutes on two CPU cores, and the best settings as a command, which gives the
same model to the last bit.
Source: https://arxiv.org/abs/1810.05934 (ASHA)
"""

import importlib.util
import math
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lockstep import Recipe, Run, UserError, recipe
from lockstep.config import run_directory
from lockstep.config.keys import AUTO, typed
from lockstep.data.image_files import check_data
from lockstep.distributed.devices import check_nproc, default_nproc, resolve_device
from lockstep.distributed.rendezvous import is_listening
from lockstep.distributed.signals import Preempted
from lockstep.errors import CheckFailed
from lockstep.integrations.ray import ray_for
from lockstep.launch import recipe_process
from lockstep.launch.validate import validate
from lockstep.registry import choose, get_recipe
from lockstep.tune.config import TuneConfig
from lockstep.tune.search_space import Space
from lockstep.tune.standings import Watch, mode, results, table, write_results
from lockstep.utils.text import count

OURS = {"tune", "out", "nproc", "threads", "resume", "launcher", "recipes", "rounds"}  # keys that mean this tool
SAME = {"epochs", "max_steps", "eval_every", "metric", "patience"}  # trials of different lengths are not to be compared
WAIT_SECONDS = 60  # for runs of trials that a killed start has left behind, and that are saving


# What a trial is -----------------------------------------------------------------------------------------------------


def find(config: TuneConfig) -> Recipe:
    """The recipe that is tuned; UserError where there is none of that name, or no one batch for all trials' ranks."""
    if config.global_batch_size == AUTO:
        raise UserError(
            "global_batch_size=auto: is found for one training; set a number, or draw it with tune.space.global_batch_size"
        )
    name, every = config.tune.recipe, choose(None)
    if name not in every:
        raise UserError(f"tune.recipe={name}: no such recipe; allowed are {', '.join(every)}")
    return get_recipe(name)


@dataclass(frozen=True)
class Plan:
    """How many trials run at once, and with what."""

    ranks: int  # of a trial
    threads: int  # of a rank
    concurrent: int | None  # None: as many as the cluster has room for
    gpus: int  # of a trial


def plan(config: TuneConfig, each: Recipe, device: str) -> Plan:
    """Divide this machine among the trials; on a cluster, Ray does."""
    tune = config.tune
    ranks = tune.nproc or each.ranks or default_nproc(device)
    gpus = ranks if device == "cuda" else 0
    if tune.address is not None:
        return Plan(ranks, config.threads or 1, tune.concurrent, gpus)
    cores = len(os.sched_getaffinity(0))
    room = torch.cuda.device_count() // ranks if gpus else cores // ranks
    concurrent = min(tune.trials, tune.concurrent or max(1, room))
    return Plan(ranks, config.threads or max(1, cores // (concurrent * ranks)), concurrent, gpus)


def words(config: TuneConfig, each: Recipe, how: Plan) -> list[str]:
    """The overrides that all trials have in common. The threads are part of them: other threads, other last bits."""
    from lockstep.config.compose import overrides  # Hydra

    rest = overrides(train, config, each, OURS | set(Space(config.tune.space, each).texts))
    numbers = [f"nproc={how.ranks}", f"threads={how.threads}"]
    if config.tune.address is not None and config.device == "auto":  # it might be another one on each node
        numbers.append(f"device={'cuda' if how.gpus else 'cpu'}")
    return [*rest, *numbers]


def check(config: TuneConfig, share: int) -> None:
    """Whatever can be drawn must be what the recipe takes; and an earlier search can only go on as it was."""
    tune, each = config.tune, find(config)
    space = Space(tune.space, each)
    if not space.texts:
        raise UserError("tune.space: is empty; choose tune=asha, or set 'tune.space.optim.lr=loguniform(1e-4, 1e-1)'")
    for key in space.texts:
        if key in SAME or {key, key.partition(".")[0]} & OURS:
            raise UserError(f"tune.space.{key}: must be the same for all trials; set {key}=… without tune.space")
    if tune.search == "optuna" and importlib.util.find_spec("optuna") is None:
        raise UserError("tune.search=optuna: optuna is not installed: pip install 'lockstep[ray]'")
    check_address(tune.address)
    before = run_directory.found_in(config, "tune")
    if before and before[1].max_steps != config.max_steps:
        raise UserError(
            f"max_steps={config.max_steps}: the trials in out={config.out} have max_steps={before[1].max_steps}; "
            "set it as it was, or name a new out"
        )
    from lockstep.config.compose import compose_another  # Hydra: only who checks needs it

    device, backend = resolve_device(config.device, config.backend)
    how = plan(config, each, device)
    if tune.address is None:
        check_nproc(how.ranks, device, backend)
    common = words(config, each, how)
    base = compose_another(each, common)
    counted = None if any(key.startswith("data.") for key in space.texts) else check_data(base.data)
    tree = OmegaConf.structured(base)
    for drawn in space.examples():
        values = space.values(drawn, base)
        shown = ", ".join(typed(*pair) for pair in values.items())
        try:
            one = tree.copy()
            for key, value in values.items():
                OmegaConf.update(one, key, value)
            made: Any = OmegaConf.to_object(one)
            validate(made, each, how.ranks, counted)
        except (UserError, OmegaConfBaseException) as error:
            raise UserError(f"tune.space can draw {shown}: {str(error).splitlines()[0]}") from None


def check_address(address: str | None) -> None:
    """Hold tune.address to what Ray can connect to."""
    if address in (None, "auto"):
        return
    host, _, port = str(address).rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise UserError(f"tune.address={address}: allowed are auto, and HOST:PORT of a cluster's head node")
    if not is_listening(host, int(port), 1):
        raise UserError(f"tune.address={address}: nobody answers there; start it with ray start --head --port={port}")


def trainable(run: Run[TuneConfig], each: Recipe) -> Any:
    """What Ray runs as an actor, one for each trial, where it finds room: it holds the command that trains."""
    from ray.tune import Trainable

    config = run.config
    target, folder, metric = each.target, run.out / "trials", config.metric
    ends = {"step": config.max_steps, "epoch": config.epochs}  # of the last evaluation, one or the other
    here, variables = os.getcwd(), {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}

    class Trial(Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self.record = recipe_process.Record(folder, config["number"], config["words"], config["values"])
            self.command = None
            if not self.record.has_ended():  # an earlier start may have been killed before Tune had noted it
                self.command = recipe_process.Command(target, config["words"], self.record.start(), here, variables)
            self.coming: list[dict[str, Any]] = []  # evaluations that are not reported yet
            self.latest: dict[str, Any] = {"evaluations": 0}

        def step(self) -> dict[str, Any]:
            """The next evaluation, or after a second without one the latest: Tune can stop a trial only in between."""
            try:
                ended = self.command is None or self.command.ended(seconds=0 if self.can_report() else 1)
            except recipe_process.Failed as error:
                self.record.change(state="failed", problem=str(error))
                return self.latest | {"done": True}
            known = self.latest["evaluations"] + len(self.coming)
            self.coming += recipe_process.evaluations(recipe_process.metrics(self.record.out), metric)[known:]
            if self.coming and (ended or self.can_report()):
                self.latest = self.coming.pop(0)
            done = ended and not self.coming
            if done and self.command:
                self.record.change(state="finished")
            return self.latest | {"done": done}

        def can_report(self) -> bool:
            """Whether there is an evaluation, other than the last: with that one the trial is over for Tune, while its
            process has yet to write its model."""
            return bool(self.coming) and all(self.coming[0][name] != end for name, end in ends.items())

        def cleanup(self) -> None:
            if self.command and self.command.leaves():
                self.record.change(state="stopped" if self.command.process.returncode else "finished")

    return Trial


def searcher(config: TuneConfig, each: Recipe, common: list[str]) -> Any:
    """What draws the settings of each trial, at random or Optuna's TPE, and numbers them."""
    from ray import tune
    from ray.tune.search import Searcher
    from ray.tune.search.optuna import OptunaSearch

    from lockstep.config.compose import compose_another

    space, base = Space(config.tune.space, each), compose_another(each, common)

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
            Path(checkpoint_path).write_text(str(self.number))

        def restore(self, checkpoint_path: str) -> None:
            self.number = int(Path(checkpoint_path).read_text())

    class Optuna(Numbered, OptunaSearch):
        def draw(self, trial_id: str) -> dict[str, Any]:
            return OptunaSearch.suggest(self, trial_id) or {}

    if config.tune.search == "random":
        return Random()
    domains = {
        name: tune.choice(draw.arguments) if draw.kind == "choice" else getattr(tune, draw.kind)(*draw.arguments)
        for name, draw in space.draws.items()
    }
    distributions = OptunaSearch.convert_search_space(domains)
    return Optuna(distributions, metric=config.metric, mode=mode(config), seed=config.seed)


def scheduler(run: Run[TuneConfig]) -> Any:
    """ASHA, by the number of evaluations, or nothing that stops a trial."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    config, folder = run.config, run.out / "trials"
    metric = config.metric

    class Asha(ASHAScheduler):
        def on_trial_add(self, controller: Any, added: Any) -> None:
            """Tune restores trials, but not what its scheduler knew of them: that is read from what they logged."""
            super().on_trial_add(controller, added)
            for line in recipe_process.evaluations(
                recipe_process.metrics(folder / str(added.config["number"])), metric
            ):
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


def tuner(run: Run[TuneConfig], each: Recipe, how: Plan) -> Any:
    """The search in the run directory, as it was when it was cut off; else a new one."""
    from ray import tune

    tuned = run.config.tune
    resources: Any = {"CPU": how.ranks * how.threads, "GPU": how.gpus}
    runs = tune.with_resources(trainable(run, each), resources)
    state = run.out / "ray"
    if any(state.glob("experiment_state-*.json")) and tune.Tuner.can_restore(str(state)):
        try:
            found = tune.Tuner.restore(str(state), trainable=runs)
            run.report.line("going on with the search")
            return found
        except Exception as error:
            # It was killed while it wrote. The trials are still there; those that are drawn again go on, or have ended.
            run.report.line(
                f"the search in {state} cannot be read ({error}); beginning it again with the trials it left"
            )
    shutil.rmtree(state, ignore_errors=True)
    return tune.Tuner(
        runs,
        tune_config=tune.TuneConfig(
            metric=run.config.metric,
            mode=mode(run.config),
            num_samples=tuned.trials,
            max_concurrent_trials=how.concurrent,
            search_alg=searcher(run.config, each, words(run.asked, each, how)),
            scheduler=scheduler(run),
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
    """Wait for those that were asked to leave and may be saving still; return what is to be said of one that stays."""
    stays = None
    for config in (run.out / "trials").glob("[0-9]*/config.yaml"):
        try:
            run_directory.lock(config.parent, WAIT_SECONDS).close()
        except UserError as error:
            stays = error
    return stays


@recipe(
    config=TuneConfig,
    looks_at="tune.recipe",
    single_training=False,
    ranks=1,
    check=check,
    needs="ray",
    stands_for=find,
)
def train(run: Run[TuneConfig]) -> None:
    each = find(run.config)
    how = plan(run.config, each, run.device.type)
    (run.out / "trials").mkdir(exist_ok=True)
    if stays := wait_for_trials(run):  # of an earlier start
        raise stays
    many = f"{count(how.concurrent, 'trial')} at once" if how.concurrent else "as many trials at once as have room"
    run.report.line(
        f"tune: {count(run.config.tune.trials, 'trial')} of recipes.{each.name}, {many}, each "
        f"{count(how.ranks, 'rank')} with {count(how.threads, 'thread')}"
    )
    at_once = how.concurrent or 1
    with ray_for(at_once * how.ranks * how.threads, at_once * how.gpus, run.config.tune.address):
        if run.listener:
            run.listener.training = True  # from now on there is something to save
        with Watch(run):
            tuner(run, each, how).fit()
    wait_for_trials(run)  # that Tune has let go of before they were gone
    received = run.listener.received if run.listener else 0
    rows = results(run)
    for row in rows:
        if row["state"] == "running" and not received:
            left = run_directory.read_result(run.out / "trials" / str(row["number"])).get("status") == "preempted"
            lost = "Ray has lost it, perhaps with its node; its log says how far it came"
            row |= {"state": "stopped"} if left else {"state": "failed", "problem": lost}
    result = write_results(run, rows, "preempted" if received else "finished")
    if received:
        ended = sum(row["state"] in ("finished", "failed") for row in rows)
        run.report.line(f"preempted: {ended} of {count(run.config.tune.trials, 'trial')} trained to the end")
        raise Preempted(signal.Signals(received).name)
    run.report.console.print(table(run, rows))
    if not result["best"]:
        raise CheckFailed(f"no trial came to an evaluation; trial 0: {rows[-1]['problem']}" if rows else "no trial ran")
    run.report.line(f"best: trial {result['best']['number']}\n  {result['command']}")


if __name__ == "__main__":
    train.main()
