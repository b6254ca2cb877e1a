"""Plan: what a training would need and take on hardware that is not here, and which strategy is the fastest that fits.

Each row of the table is a recipe with its mesh and settings. The recipe's own function takes three steps in this process, as
one of `gpus` ranks: the model lies on torch's fake tensors, which have shapes and no numbers, and the collectives go to
torch's fake process group, which sends nothing. So what is counted is what the recipe does, a recipe and a task of your
own too: memory by part at the peak of a step, floating-point operations, every collective with its bytes and its ranks.

Time follows from the hardware's profile (`conf/plan/*.yaml`: published peaks, and the shares of them that are achieved):
an operation takes as long as its arithmetic or its bytes, whichever is more; a collective a latency and a rate, by NCCL's own
formula, inside a node or between nodes. It hides behind whatever does not need it.

Of a pipeline every rank is planned and their steps are played together: so it has the bubble of its schedule, and the memory
of the stage that holds most. Experts get equally many tokens. DeepSpeed's own engine is run like any other recipe.

With offload=true the host keeps what it keeps in a real run, and updates it: copies travel on a link of their own, the
device waits for the update, and the table says what a rank needs of the host's memory.

Efficiency is that of so many devices against one that has a rank's share alone. What is not planned: what torch.compile
gains, the wait for data. docs/plan.md says how far to trust it.

How: lockstep/plan/dry_run.py takes the steps, watch.py counts, clock.py and links.py tell the time, pipeline.py plays
stages together, allocator.py says what a GPU's allocator takes, rows.py lists strategies.

    python -m recipes.plan gpus=8 hardware=a100 model=resnet50 data=synthetic data.image_size=224 global_batch_size=512
    python -m recipes.plan task=language model=1b gpus=64 hardware=h100 precision=bf16 price=2.5
    python -m recipes.plan task=my_task.py:MyTask recipes=[ddp,my_recipe.py] gpus=16     your model, your loop
    python -m recipes.plan hardware=my_cluster.yaml json=true                            your devices; for programs
    python -m recipes.plan curve=true gpus=16384 plot=curve.svg      from one node to 16,384 devices, and where each stops
    python -m recipes.plan recipes=[fsdp] offload=true task=language model=8b gpus=8 precision=bf16     on the host's memory
    python -m recipes.plan gpus=64 network=hdr interconnect=pcie4    other links than the profile's
    python -m recipes.plan check=true nproc=2        real steps on this machine, and by how much the plan is off

Expect: a row in a few seconds, one of a pipeline in some per stage; a table, a command to type, and nothing on the disk
but the `plot`.
Source: https://arxiv.org/abs/2204.02311 (MFU), https://doi.org/10.1145/1498765.1498785 (roofline),
https://github.com/NVIDIA/nccl/blob/master/src/graph/tuning.cc
"""

import json
import os
import sys
import time
from typing import Any

from rich.console import Console

from lockstep import Recipe, Run, UserError, recipe
from lockstep.config.check import check_values
from lockstep.config.copies import LAUNCHING
from lockstep.config.keys import typed
from lockstep.config.tasks import unit_of
from lockstep.plan.config import PlanConfig
from lockstep.plan.estimate import Estimate, against_one, estimate, seconds_alone
from lockstep.plan.hardware import MEASURED, PROFILE, Hardware, doubt_of_links, load_hardware, with_links
from lockstep.plan.report import (
    advice,
    formula_line,
    memory_parts_table,
    plan_facts,
    ranked,
    speed_table,
    traffic_table,
)
from lockstep.plan.rows import (
    AS_ISSUED,
    INSTEAD,
    NOT_PLANNED,
    OF_PLANS,
    PLANNED,
    USUAL,
    beyond_the_table,
    plan_rows,
    why_not,
)
from lockstep.plan.scaling import TAKEN_NODES, ScalingCurve, curve_ranks, scaled, scaling_curve, strategies
from lockstep.plan.scaling_report import check_picture, curve_table, draw_curves
from lockstep.plan.workers import planned_beside
from lockstep.registry import choose, get_recipe, is_file
from lockstep.utils.files import write_json
from lockstep.utils.text import count, short

MOST_TAKEN = 1024  # devices of a table, whose steps are all taken


def planned_recipes(names: list[str] | None) -> list[Recipe]:
    """The recipes of the table.

    Raises:
        UserError: one of them cannot be planned.
    """
    found = choose(names) if names else list(USUAL)
    for name in found:
        if name not in PLANNED and not is_file(name):
            instead = f"; plan {INSTEAD[name]}" if name in INSTEAD else f"; {NOT_PLANNED.get(name, '')}".rstrip("; ")
            allowed = f"allowed are {', '.join(PLANNED)}, or a FILE.py of yours"
            raise UserError(f"recipes=[{name}]: is not planned yet{instead}; {allowed}")
    return [get_recipe(name) for name in found]


def say(text: str) -> None:
    """Progress, beside what a program reads."""
    print(text, file=sys.stderr, flush=True)


def plan_all(config: PlanConfig, ranks: int, hardware: Hardware) -> tuple[list[Estimate], list[str]]:
    """(an estimate of each row, a line for each that cannot be)."""
    say(f"plan: {count(ranks, 'device')}, {hardware.name}")
    rows, left_out = plan_rows(config, train, planned_recipes(config.recipes), ranks, hardware)
    alone, _ = plan_rows(config, train, [get_recipe("single")], 1, hardware)
    began = time.perf_counter()

    def plan(number: int) -> Estimate | float | str:
        try:
            if number < 0:
                return seconds_alone(alone[0], ranks, hardware)
            return estimate(rows[number], config, hardware)
        except Exception as error:  # of a recipe of one's own, or a model that asks tensors for their numbers
            return why_not(error)

    slowest_first = sorted(range(len(rows)), key=lambda number: -rows[number].config.model_parallel_size)
    found: dict[int, Any] = {}
    for number, made in planned_beside(plan, [*([-1] if alone else []), *slowest_first]):
        found[number] = made
        if number >= 0:
            done = sum(each >= 0 for each in found)
            say(f"{done} of {len(rows)}: {rows[number].label}, after {time.perf_counter() - began:.0f} s")
    seconds = found.get(-1)
    estimates = []
    for number, row in enumerate(rows):
        made = found[number]
        if isinstance(made, Estimate):
            estimates.append(against_one(made, seconds if isinstance(seconds, float) else None))
        else:
            left_out.append(f"{row.label}: {made or 'its process was ended; is there enough memory on this machine?'}")
    return estimates, left_out


def print_curves(config: PlanConfig, hardware: Hardware) -> int:
    """Plan each strategy on 8, 16, 32 … devices."""
    picture = check_picture(config.plot) if config.plot else None
    ranks = curve_ranks(config.gpus, hardware.per_node)
    if len(ranks) < 2:
        raise UserError(
            f"gpus={config.gpus}: a curve needs two nodes at least; set gpus={2 * hardware.per_node} or more"
        )
    say(f"plan: curves to {ranks[-1]:,} devices, {hardware.name}")
    taken = [each for each in ranks if each <= TAKEN_NODES * hardware.per_node]
    tables, left_out = [], []
    for number in taken:
        rows, refused = plan_rows(
            scaled(config, number, ranks[0]), train, planned_recipes(config.recipes), number, hardware
        )
        tables.append(rows)
        left_out += [line for line in refused if line not in left_out]
    chosen = list(strategies(tables))
    made: list[ScalingCurve] = []
    for number, rows in enumerate(chosen, start=1):
        start = ranks.index(rows[0].ranks)
        try:
            made.append(scaling_curve(rows, ranks[start:], config.scaling == "weak", hardware))
        except Exception as error:  # as in plan_all
            left_out.append(f"{rows[0].label}: {type(error).__name__}: {str(error).splitlines()[0]}")
        say(f"{number} of {len(chosen)}: {rows[0].label}")
    if not made:
        raise UserError("no curve could be planned: " + "; ".join(left_out))
    if picture:
        draw_curves(made, picture)
    if config.json:
        about = {"hardware": hardware.name, "scaling": config.scaling, "plot": config.plot}
        print(json.dumps(about | {"curves": [each.facts() for each in made], "left_out": left_out}, indent=1))
        return 0
    Console(width=80).print(*curve_table(made, config.scaling), sep="\n")
    for line in [*(each.verdict() for each in made), *(f"left out: {each}" for each in left_out)]:
        print(line)
    if config.plot:
        print(f"drawn: {config.plot}")
    return 0


def check(config: PlanConfig, share: int) -> None:
    """With check=true this machine is planned for, with the ranks that are there: keys of another plan mean nothing."""
    for name in OF_PLANS if config.check else ():
        value = getattr(config, name)
        if value != getattr(PlanConfig(), name) and (name, value) != ("hardware", MEASURED):
            shown = typed(name, value)
            raise UserError(f"{shown}: means nothing to check=true, which plans for the ranks here; leave it out")


def make_plan(config: PlanConfig) -> int | None:
    """Plan all rows and print them; no rank is started, but to measure this machine."""
    check_values(config)
    if config.check or config.hardware == MEASURED:
        return None
    hardware = with_links(load_hardware(config.hardware), config.network, config.interconnect)
    doubt = doubt_of_links(hardware, config.gpus, config.network, config.hardware)
    if doubt:
        say(doubt)
    if config.curve:
        return print_curves(config, hardware)
    if config.gpus > MOST_TAKEN:
        raise UserError(f"gpus={config.gpus}: a table is of at most {MOST_TAKEN:,} devices; add curve=true for more")
    if config.plot:
        raise UserError(f"plot={config.plot}: draws curves; add curve=true")
    made, left_out = plan_all(config, config.gpus, hardware)
    if not made:
        raise UserError("no row could be planned: " + "; ".join(left_out))
    found = ranked(made)
    beyond = [] if config.recipes else beyond_the_table()
    if config.json:
        about = {"hardware": hardware.name, "gpus": config.gpus, "precision": config.precision, "not_planned": beyond}
        about |= {"note": AS_ISSUED} if config.compile else {}
        print(json.dumps(plan_facts(found, left_out, about), indent=1))
        return 0
    unit = unit_of(config)
    title = f"{count(config.gpus, 'device')}, {hardware.name}; global batch {found[0].global_batch_size:,} {unit}"
    console = Console(width=80)
    for tables in (speed_table(found, title, unit), memory_parts_table(found), traffic_table(found)):
        console.print(*tables, sep="\n")
    compiled = AS_ISSUED if config.compile else ""
    for line in [formula_line(found), *advice(found), compiled, *(f"left out: {each}" for each in left_out), *beyond]:
        if line:
            print(line)
    return 0


@recipe(config=PlanConfig, looks_at="recipes", single_training=False, check=check, alone=make_plan)
def train(run: Run[PlanConfig]) -> None:
    from lockstep.config.compose import overrides
    from lockstep.plan.check import check_plan, check_table, unrest  # which load all that ranks do
    from lockstep.plan.hardware_report import make_profile

    if not run.config.check and run.config.hardware != MEASURED:
        raise UserError("recipes.plan: is one process; start it with python, or add check=true or hardware=here")
    words = overrides(train, run.asked, train, {*LAUNCHING, "check", "gpus", "hardware"})
    load = os.getloadavg()[0]
    run.report.line(f"measuring this machine: {count(run.world.world_size, 'rank')}")
    if run.config.check:
        rows = check_plan(run, words)
        if run.world.rank == 0:
            write_json(run.out / "check.json", [row.facts() for row in rows])
            run.report.console.print(*check_table(rows), sep="\n")
            if warning := unrest(load):
                run.report.line(warning)
        run.report.line(f"hardware={short(run.out / PROFILE)} is this machine's profile")
    else:
        make_profile(run, [*words, f"gpus={run.asked.gpus}"])  # 8, too, which is no word of its own


if __name__ == "__main__":
    train.main()
