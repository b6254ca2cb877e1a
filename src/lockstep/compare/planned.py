"""With `hardware=NAME`: what recipes.plan predicts of each run of a comparison, beside what the run measured.

`hardware=here` first measures this machine, once for each number of ranks, as `recipes.plan hardware=here` does. The recipe's
own function then takes its steps without numbers, in a process of its own, with the config that the run had.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from lockstep.compare.cases import Case
from lockstep.compare.config import CompareConfig
from lockstep.compare.figures import RunPlan
from lockstep.compare.measure import run_to_end
from lockstep.config.keys import typed
from lockstep.errors import UserError
from lockstep.launch.recipe_process import RecipeFailed
from lockstep.plan.hardware import MEASURED, PROFILE, Hardware, doubt_of_links, load_hardware
from lockstep.plan.rows import planned_config, why_not
from lockstep.registry import get_recipe, is_file
from lockstep.run import Run
from lockstep.utils.text import count

MACHINE_KEYS = ("threads", "device", "backend")  # of a run's command, that say what a rank of it has


def predict_run(name: str, words: list[str], ranks: int, hardware: Hardware) -> RunPlan | str:
    """What a run would take and hold, or why that is not known; in a process that is no rank."""
    from lockstep.plan.pipeline import dry_training  # loads much that only a plan needs

    try:
        recipe = get_recipe(name)
        config = planned_config(recipe, words, ranks, hardware)
        found = dry_training(recipe, config, ranks, hardware)
    except Exception as error:  # a recipe of one's own may raise anything; the others have their rows
        return why_not(error)
    sent = sum(found.step.traffic().values())
    return RunPlan(found.step.times.step, sent, found.peak_bytes, found.state, hardware.device)


def profile_of(run: Run[CompareConfig], case: Case) -> Hardware:
    """The hardware that a case is planned for; this machine is measured where it has not been.

    Raises:
        RecipeFailed: it could not be measured.
    """
    assert run.config.hardware
    if run.config.hardware != MEASURED:
        return load_hardware(run.config.hardware)
    words = [word for word in case.words if word.partition("=")[0] in MACHINE_KEYS]
    out = run.out / "runs" / f"hardware-{case.number}"
    run_to_end(run, "lockstep.recipes.plan", [f"hardware={MEASURED}", typed("nproc", case.number), *words], out)
    return load_hardware(str(out / PROFILE))


def predict_cases(run: Run[CompareConfig], cases: Iterable[Case]) -> tuple[dict[Case, RunPlan], list[str]]:
    """(what is predicted of each case, a line for each of which nothing is)."""
    found: dict[Case, RunPlan] = {}
    unknown: list[str] = []
    machines: dict[int, Hardware] = {}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # a rank has a process group already
        for case in cases:
            run.world.heartbeat.move()
            try:
                if case.unit != "rank":
                    raise UserError("has no ranks, and a plan is made of a rank")
                if case.number not in machines:
                    run.report.line(f"plan: hardware={run.config.hardware}, {count(case.number, 'rank')}")
                    machine = profile_of(run, case)
                    if doubt := doubt_of_links(machine, case.number, None, str(run.config.hardware)):
                        run.report.line(doubt)
                    machines[case.number] = machine
                name = case.target if is_file(case.target) else case.recipe
                given = name, list(case.words), case.number, machines[case.number]
                made: RunPlan | str = pool.submit(predict_run, *given).result()
            except (UserError, RecipeFailed) as error:
                made = str(error)
            except BrokenProcessPool:
                made = "its process was ended; is there enough memory on this machine?"
            if isinstance(made, str):
                unknown.append(f"{case.label}: {made}")
            else:
                found[case] = made
                run.report.line(f"planned: {case.label}")
    return found, unknown
