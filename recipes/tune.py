"""Tune: a search for good settings of any recipe with Ray Tune, in which trials that are behind are stopped early.

A trial is the command that a person would type, `python -m recipes.ddp optim.lr=0.0123 global_batch_size=48 …`, with
launcher, ranks and run directory of its own. An actor of Ray's starts it where there is room, follows its metrics.jsonl, and
reports each evaluation to this process, which holds the search: a searcher that draws settings (at random, or Optuna's
TPE from what earlier ones came to) and a scheduler, ASHA: of the trials that get to a rung, grace × reductionᵏ
evaluations, those among the better 1/reduction so far continue, the others are asked to end; they save, and end.
No trial waits at a rung for the others, so no core is idle.

How: lockstep/tune/search_space.py reads what is to be drawn, trial.py is one trial, tuner.py puts Ray's searcher and
scheduler together, standings.py shows how the trials stand.

`tune.space` says for each config key which of Ray's domains its values come from (search_space.py lists them);
`conf/tune/` holds spaces, and every other key is the same for all trials. Trials at once share the cores: each gets
`threads` for each of its ranks, which Ray counts as its CPUs; of GPUs, Ray gives each trial `tune.nproc` of its own.
What Ray sets for its own workers (OMP_NUM_THREADS, RAY_…) does not reach the ranks. With `tune.address` the trials run
wherever an existing Ray cluster has room, on nodes that must share the run directory's file system.

    python -m recipes.tune tune.recipe=ddp epochs=4
    python -m recipes.tune tune=optuna tune.concurrent=4 'tune.space.model.norm=choice(batch, group)'

Interrupt it, kill it, and start it again with the `out=` it had: what has ended is not run again, what was cut off
resumes from its own checkpoint, and the settings still to come are those that would have come. (Ray keeps the search as
a pickle in `ray/`: resume only in a run directory that you trust.)

Expect: a table of eight trials after some minutes on two CPU cores, and the best settings as a command, which gives the
same model to the last bit.
Source: https://arxiv.org/abs/1810.05934 (ASHA)
"""

import signal

from lockstep import Recipe, Run, UserError, recipe
from lockstep.config import run_directory
from lockstep.config.keys import AUTO
from lockstep.config.packages import require
from lockstep.distributed.devices import check_nproc, resolve_device
from lockstep.distributed.signals import Preempted
from lockstep.errors import CheckFailed
from lockstep.integrations.ray import check_ray_address, ray_session
from lockstep.launch.validate import count_samples
from lockstep.registry import check_name, get_recipe
from lockstep.tune.config import TuneConfig
from lockstep.tune.search_space import SearchSpace
from lockstep.tune.standings import Standings, read_trials, standings_tables, tuned_name, write_search_results
from lockstep.tune.trial import SAME_FOR_ALL, TUNE_KEYS, check_draws, plan_trials, trial_words, unused_words
from lockstep.tune.tuner import make_tuner, wait_for_trials
from lockstep.utils.text import count


def tuned_recipe(config: TuneConfig) -> Recipe:
    """The recipe that is tuned; UserError where there is none of that name, or no one batch for all trials' ranks."""
    if config.global_batch_size == AUTO:
        raise UserError(
            "global_batch_size=auto: is found for one training; set a number, or draw it with tune.space.global_batch_size"
        )
    check_name(config.tune.recipe, f"tune.recipe={config.tune.recipe}")
    return get_recipe(config.tune.recipe)


def check(config: TuneConfig, share: int) -> None:
    """Whatever can be drawn must be what the recipe takes; and an earlier search can only be resumed as it was."""
    tune, each = config.tune, tuned_recipe(config)
    space = SearchSpace(tune.space, each, config.task.name)
    if not space.texts:
        raise UserError("tune.space: is empty; choose tune=asha, or set 'tune.space.optim.lr=loguniform(1e-4, 1e-1)'")
    for key in space.texts:
        if key in SAME_FOR_ALL or {key, key.partition(".")[0]} & TUNE_KEYS:
            raise UserError(f"tune.space.{key}: must be the same for all trials; set {key}=… without tune.space")
    if tune.search == "optuna":
        require("optuna", "tune.search=optuna", extra="ray")
    check_ray_address(tune.address)
    before = run_directory.found_in(config, "tune")
    if before and before[1].max_steps != config.max_steps:
        raise UserError(
            f"max_steps={config.max_steps}: the trials in out={config.out} have max_steps={before[1].max_steps}; "
            "set it as it was, or name a new out"
        )
    from lockstep.config.compose import compose_another  # Hydra: only who checks needs it

    device, backend = resolve_device(config.device, config.backend)
    plan = plan_trials(config, each, device)
    if tune.address is None:
        check_nproc(plan.ranks, device, backend)
    base = compose_another(each, trial_words(config, train, each, plan))
    counted = None if any(key.startswith(("data.", "task.")) for key in space.texts) else count_samples(base)
    check_draws(space, base, each, plan.ranks, counted)


@recipe(
    config=TuneConfig,
    looks_at="tune.recipe",
    single_training=False,
    ranks=1,
    check=check,
    needs="ray",
    stands_for=tuned_recipe,
)
def train(run: Run[TuneConfig]) -> None:
    each = tuned_recipe(run.config)
    plan = plan_trials(run.config, each, run.device.type)
    (run.out / "trials").mkdir(exist_ok=True)
    if problem := wait_for_trials(run):  # of an earlier start
        raise problem
    many = f"{count(plan.concurrent, 'trial')} at once" if plan.concurrent else "as many trials at once as have room"
    run.report.line(
        f"tune: {count(run.config.tune.trials, 'trial')} of {tuned_name(run.config)}, {many}, each "
        f"{count(plan.ranks, 'rank')} with {count(plan.threads, 'thread')}"
    )
    for line in unused_words(run.asked, train, each):
        run.report.line(line)
    at_once = plan.concurrent or 1
    with ray_session(at_once * plan.ranks * plan.threads, at_once * plan.gpus, run.config.tune.address):
        if run.listener:
            run.listener.training = True  # from now on there is something to save
        with Standings(run):
            make_tuner(run, each, plan, trial_words(run.asked, train, each, plan)).fit()
    wait_for_trials(run)  # Tune does not wait for their ends
    received = run.listener.received if run.listener else 0
    rows = read_trials(run)
    for row in rows:
        if row["state"] == "running" and not received:
            left = run_directory.read_result(run.out / "trials" / str(row["number"])).get("status") == "preempted"
            lost = "Ray has lost it, perhaps with its node; its log says how far it came"
            row |= {"state": "stopped"} if left else {"state": "failed", "problem": lost}
    result = write_search_results(run, rows, "preempted" if received else "finished")
    if received:
        ended = sum(row["state"] in ("finished", "failed") for row in rows)
        run.report.line(f"preempted: {ended} of {count(run.config.tune.trials, 'trial')} trained to the end")
        raise Preempted(signal.Signals(received).name)
    for table in standings_tables(run, rows):
        run.report.console.print(table)
    for row in rows:
        if row["problem"]:
            run.report.line(f"trial {row['number']} {row['state']}: {row['problem']}")
    if not result["best"]:
        raise CheckFailed(f"no trial came to an evaluation; trial 0: {rows[-1]['problem']}" if rows else "no trial ran")
    run.report.line(f"best: trial {result['best']['number']}\n  {result['command']}")


if __name__ == "__main__":
    train.main()
