"""Verify: every recipe computes the same training as recipes.single, or this says which one does not.

Each recipe is trained for a few steps on the same data from the same seed as `single`, all in one go on the ranks that
are there. Compared are every step's loss, the first update's gradients, the weights and buffers at the end and the
evaluation, in fp64, where the order of summation is all that may differ (tolerance 1e-10), and in fp32, where 4 times as
much is allowed as rounding makes of `single`, which is measured against fp64 (docs/proof.md). A recipe declares under
which settings it must be equal (`@recipe(proof=...)`): DDP, for one, with group norm, since BatchNorm on each rank's
share is another computation. By how much it then differs is measured too, in rows of their own. Later recipes join by
that declaration.

How: lockstep/verify/proofs.py lists the rows and trains both sides, trace.py records what a training computed, rows.py
compares two records, report.py prints them. archive.py writes verify.json and verify.txt: what this machine is, and what
trains correctly on it.

    python -m recipes.verify                             all recipes, two ranks on this machine
    python -m recipes.verify recipes=[ddp] nproc=4 precision=fp64     or fp32, bf16, fp16
    python -m recipes.verify task=my_task.py:Gpt                      your model, data and loss behind every recipe
    python -m recipes.verify recipes=[my_recipe.py]                   your loop: against single, or itself on one rank
    python -m recipes.verify recipes=[fsdp] interrupt=2               cut off after 2 steps and resumed: still equal
    python -m recipes.verify recipes=[my_recipe.py] trace=true        of a row that is off: the first layer and operation
    python -m recipes.verify recipes=[tensor_parallel] simulate=64    64 ranks as threads of one process; or context_parallel,
                                                                      expert_parallel, parallel_mesh
    python -m recipes.verify against=old/verify.json                  what has changed since then: driver, versions, rows, times
    python -m recipes.verify museum=list                              bugs that really happened; museum=NAME shows one
    python -m recipes.verify program='torchrun --nproc-per-node=2 train.py' against='python train.py'
                                                                      a program of your own (docs/your_program.md)

Expect: a line per row, then a table with every row green and exit code 0, in about two minutes on two CPU cores;
exit code 1 if a row is off. Images are trained by a narrow ResNet-18; `model=resnet18` is the real one.
Source: https://docs.pytorch.org/docs/stable/notes/numerical_accuracy.html
"""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from lockstep import Recipe, Run, UserError, recipe
from lockstep.config.check import check_values
from lockstep.config.copies import refuse_others
from lockstep.config.keys import AUTO
from lockstep.config.schema import NARROW
from lockstep.config.tasks import IMAGES
from lockstep.errors import CheckFailed
from lockstep.loggers.console import described
from lockstep.registry import choose, get_recipe, is_file
from lockstep.utils.files import write_json
from lockstep.utils.temporary import own_folder
from lockstep.utils.text import count, short
from lockstep.verify.archive import (
    RECORD,
    gather_hosts,
    is_record,
    read_archived,
    statement_lines,
    verify_record,
    write_text_report,
)
from lockstep.verify.changes import change_parts, changes_between
from lockstep.verify.config import OF_PROGRAMS, VerifyConfig
from lockstep.verify.parting_report import parting_lines, parting_tables
from lockstep.verify.proofs import ProofCase, References, fewest_steps, proof_batch, proof_cases, verify_case
from lockstep.verify.reference import SINGLE, check_against
from lockstep.verify.report import progress_line, verdict_notes, verify_tables
from lockstep.verify.rows import VerifyRow

if TYPE_CHECKING:
    from lockstep.verify.museum.bug import Bug


def recipes_with_proofs(names: list[str] | None) -> list[Recipe]:
    """The recipes that declare a proof, or those of them that are named, and files of one's own.

    Raises:
        UserError: a name is not one of them.
    """
    found = [get_recipe(name) for name in choose(names)]
    return [each for each in found if each.proofs or is_file(each.target)]


def shown_bug(config: VerifyConfig) -> Bug | None:
    """What `museum=NAME` names. Without it nothing of the museum is loaded.

    Raises:
        UserError: there is no such bug, or a key besides contradicts it.
    """
    if config.museum is None:
        return None
    from lockstep.verify.museum.table import find_bug

    bug = find_bug(config.museum)
    for name, value in {"recipes": config.recipes, "against": config.against, "interrupt": config.interrupt}.items():
        if value is not None:
            raise UserError(f"museum={bug.name}: breaks recipes.{bug.recipe} in its own way; leave {name} out")
    if config.max_steps is not None and config.max_steps <= (bug.interrupt or 1):
        raise UserError(
            f"max_steps={config.max_steps}: museum={bug.name} is seen later; allowed is {(bug.interrupt or 1) + 1} or more"
        )
    if config.task.name != IMAGES:
        raise UserError(f"museum={bug.name}: is shown on a task of its own; leave task out")
    return bug


def check(config: VerifyConfig, share: int) -> None:
    """Only recipes that exist can be verified, against what exists."""
    check_against(config.against)
    recipes_with_proofs(config.recipes)
    if config.trace and config.compile:
        raise UserError("trace=true: looks layer by layer, and compile=true melts them; leave one out")
    bug, steps = shown_bug(config), fewest_steps(config)
    if bug and config.global_batch_size == share:
        raise UserError(f"museum={bug.name}: is shown among several ranks, and here is 1; set nproc=2")
    if config.interrupt is not None and config.interrupt >= steps:
        raise UserError(
            f"interrupt={config.interrupt}: the shortest proof has {steps} steps; allowed are 1…{steps - 1}, or a "
            "larger max_steps"
        )


def answer_alone(config: VerifyConfig) -> int | None:
    """Answer `museum=list` and `program=…`, for which no rank is started here."""
    if config.museum == "list":
        from lockstep.verify.museum.page import museum_list

        print(museum_list())
        return 0
    if config.simulate is not None:
        return verify_many(config)
    if config.program is None:
        for name, value in [(name, getattr(config, name)) for name in OF_PROGRAMS]:
            if value != getattr(VerifyConfig(), name):
                raise UserError(f"{name}={value}: goes with program=…; leave it out, or set max_steps for recipes")
        return None
    return verify_programs(config)


def verify_many(config: VerifyConfig) -> int:
    """Verify recipes on ranks that are threads of this process.

    Raises:
        UserError: a key contradicts simulate=N, or a recipe or a size cannot be simulated.
        CheckFailed: a row is off.
    """
    from lockstep.verify.simulated import OWN_KEYS, verify_simulated

    check_values(config)
    for name in ("program", "against", "interrupt", "museum", "trace", "nproc", "cluster"):
        if (value := getattr(config, name)) not in (None, False):
            raise UserError(f"{name}={value}: goes with real ranks; leave it out, or simulate={config.simulate}")
    if config.precision not in (VerifyConfig().precision, "fp64"):
        raise UserError(
            f"precision={config.precision}: simulate={config.simulate} is held to fp64's bounds; leave it out"
        )
    recipes = recipes_with_proofs(config.recipes or list(OWN_KEYS))
    return verify_simulated(config, recipes, get_recipe("single"), sys.argv[1:])


def verify_programs(config: VerifyConfig) -> int:
    """Run two programs of the user's for a few steps, and say whether they compute the same.

    Raises:
        UserError: one of them cannot be run, or says nothing.
        CheckFailed: they do not.
    """
    from lockstep.verify.judge import judge_programs, program_tables
    from lockstep.verify.programs import find_program, run_program

    check_values(config)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    refuse_others(config, train, {"program", "against", "precision", *OF_PROGRAMS}, f"program={config.program}")
    if config.against is None:
        raise UserError(f"program={config.program}: lacks what it must equal; set against='python train.py'")
    programs = [find_program("program", str(config.program)), find_program("against", config.against)]
    print(f"verify: {count(config.steps, 'step')} of each of 2 programs, one after the other", flush=True)
    records = []
    with own_folder() as folder:
        for each in programs:
            found = run_program(each, Path(folder) / each.key, config.steps, config.limit_seconds, console)
            print(f"{each}: {count(found.ranks, 'rank')} ({found.seconds:.0f} s)", flush=True)
            records.append(found)
        asked = None if config.precision in (VerifyConfig().precision, AUTO) else config.precision
        mine, theirs = records
        verdict = judge_programs(mine, theirs, asked, config.tolerance)
    console.print(*program_tables(verdict, mine, theirs), sep="\n")
    for note in verdict.notes:
        print(note)
    if verdict.first:
        print(f"often: {verdict.hint}", flush=True)
        raise CheckFailed(f"program: not the training that against computes: {verdict.first}")
    return 0


def cases_of(run: Run[VerifyConfig], bug: Bug | None) -> list[ProofCase]:
    """The rows to come: of all recipes or those that are named, or of one that has a bug."""
    if bug is None:
        return proof_cases(recipes_with_proofs(run.config.recipes), run.config, run.device.type)
    from lockstep.verify.museum.bug import broken

    cases = proof_cases([broken(bug, get_recipe(bug.recipe))], run.config, run.device.type)
    steps = {} if run.config.max_steps else {"max_steps": bug.steps}
    return [replace(case, settings=case.settings | steps, interrupt=bug.interrupt) for case in cases]


@recipe(
    config=VerifyConfig, looks_at="recipes", single_training=False, check=check, batch=proof_batch, alone=answer_alone
)
def train(run: Run[VerifyConfig]) -> None:
    if run.config.program is not None:
        raise UserError(f"program={run.config.program}: starts its ranks itself; start recipes.verify with python")
    single, bug, asked = get_recipe("single"), shown_bug(run.config), run.config.against
    earlier = read_archived(str(asked)) if is_record(asked) else None
    cases = cases_of(run, bug)
    model, data = described(run.task, run.config)
    what = "" if run.config.task.name == IMAGES else f" of {model} on {data}"
    run.report.line(f"verify: {count(len(cases), 'row')}{what}, on {count(run.world.world_size, 'rank')}")
    if run.config.task.name == IMAGES and run.config.model.name == NARROW:
        run.report.line(f"images: {NARROW}, a quarter of the channels; the real one: model=resnet18")
    references = References()
    rows: list[VerifyRow] = []
    gc.freeze()  # what is loaded stays: what follows looks for a row's own leftovers alone
    for number, case in enumerate(cases, start=1):
        began = time.perf_counter()
        try:
            rows.append(verify_case(run, case, single, references))
        except CheckFailed as error:
            if bug is None:
                raise
            raise CheckFailed(f"museum={bug.name}: is stopped by an error: {error}; {bug.told}") from None
        gc.collect()  # models and their wrappers are in cycles; those of many rows would be gigabytes
        rows[-1].seconds = round(time.perf_counter() - began, 3)
        if run.world.rank == 0:  # the other ranks have no numbers
            run.report.line(progress_line(rows[-1], number, len(cases), rows[-1].seconds))
    hosts = gather_hosts(run.world)
    if run.world.rank == 0:
        record = verify_record(rows, hosts, run.world, run.config, (model, data))
        parts: list[str | Table] = [*verify_tables(rows), *verdict_notes(rows)]
        if earlier:
            changes = changes_between(earlier, record)
            record["against"] = {"file": asked, "date": earlier["date"], **asdict(changes)}
            parts += change_parts(changes, str(asked), earlier["date"])
        write_json(run.out / RECORD, record)
        write_text_report((run.out / RECORD).with_suffix(".txt"), [*statement_lines(record), *parts])
        for part in parts:
            if isinstance(part, str):
                run.report.line(part)
            else:
                run.report.console.print(part)
        run.report.line(
            f"to archive: {short(run.out / RECORD)}, and what it says of this machine in verify.txt beside it"
        )
        for row in rows:
            if row.parting:
                for line in parting_lines(row.parting, f"{row.label} in {row.precision}", row.against):
                    run.report.line(line)
                run.report.console.print(*parting_tables(row.parting), sep="\n")
        if bug:
            for line in [*bug.changes, f"{bug.name}: {bug.told}"]:
                run.report.line(line)
    off = [
        f"{row.recipe} in {row.precision}" + f" with {row.variant}" * bool(row.variant) + f" ({row.first})"
        for row in rows
        if row.fails
    ]
    verdict = [", ".join(off)]
    dist.broadcast_object_list(verdict, src=0)
    if bug:
        found = f"is found in {verdict[0]}" if verdict[0] else f"is not seen here: {', '.join(r.verdict for r in rows)}"
        raise CheckFailed(f"museum={bug.name}: {found}")
    if verdict[0]:
        against = " or ".join(dict.fromkeys(case.against for case in cases))
        what = "recipes.single" if against == SINGLE else "its reference"
        raise CheckFailed(f"not the training that {what} computes: {verdict[0]}; see {RECORD}")


if __name__ == "__main__":
    train.main()
