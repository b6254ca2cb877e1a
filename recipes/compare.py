"""Compare: what each technique costs and gains on this machine, the recipes run in turn on the same work.

Each recipe is started as a person would start it, with the same config, on each number of ranks, in turn and as many
rounds as asked: a machine that gets slower meets them all alike. Where several numbers are asked for on CPUs, a rank
has the same cores in all of them, as a rank on a GPU has the same GPU. Of recipes that are one process, data_parallel
takes the number for its replicas, single and model_parallel run once. What a recipe cannot do is left out, with a line
that says why.

Reported are samples/s with the spread of the rounds, speedup and efficiency against `single` (the global batch stays
the same: strong scaling), communication and the share of a step in which nothing hides it, idle parts, waiting for
data, memory by rank and its imbalance (the largest over the mean), busy cores, what the task measures (the accuracy of
images), the way to the first step. Of DataParallel's threads it tells how many computed at a time: where that is far
below their number, they waited for each other in one interpreter.

How: lockstep/compare/cases.py says what is run, measure.py runs it, figures.py defines every figure; tables.py,
verdicts.py, plots.py and html_report.py show them.

    python -m recipes.compare recipes=[single,data_parallel,ddp] max_steps=30
    python -m recipes.compare nproc=1,2,4 rounds=5 model=resnet50 data=synthetic data.image_size=64 max_steps=20
    python -m recipes.compare recipes=[single,ddp,fsdp] hardware=here   with what recipes.plan predicts of each, beside it
    python -m recipes.compare recipes=[single,ddp,fsdp] verify=true     with recipes.verify's table of the same recipes

    python -m recipes.compare outputs/ddp/A outputs/fsdp/B               finished runs side by side: nothing is run

Interrupt it or kill it, and start it again with the `out=` it had: runs that have ended are not run again.

Expect: after a minute for each recipe, number and round: tables, compare.json, plots, and report.html, one file
that opens anywhere. Exit code 1 where a recipe failed; the report is then about the others.
Source: https://arxiv.org/abs/2006.15704 (DataParallel against DistributedDataParallel)
"""

import time
from dataclasses import asdict, replace
from typing import Any

from lockstep import Recipe, Run, UserError, recipe
from lockstep.compare import plots
from lockstep.compare.cases import case_name, plan_cases
from lockstep.compare.config import CompareConfig
from lockstep.compare.figures import comparison_rows
from lockstep.compare.finished_runs import compare_runs
from lockstep.compare.html_report import html_report
from lockstep.compare.measure import measure_all, run_verify
from lockstep.compare.planned import predict_cases
from lockstep.compare.report import ComparisonReport, describe_work, repeat_command
from lockstep.compare.tables import comparison_tables
from lockstep.compare.verdicts import verdicts
from lockstep.config import run_directory
from lockstep.config.copies import refuse_others
from lockstep.config.schema import MOST_RANKS, to_yaml
from lockstep.config.tasks import IMAGES, metric_of, unit_of
from lockstep.errors import CheckFailed
from lockstep.loggers.console import described
from lockstep.plan.hardware import MEASURED, load_hardware
from lockstep.registry import choose, get_recipe, is_file
from lockstep.utils import files
from lockstep.utils.system import system_info
from lockstep.utils.text import count, short


def chosen_recipes(names: list[str] | None) -> list[Recipe]:
    return [get_recipe(name) for name in choose(names)]


def check(config: CompareConfig, share: int) -> None:
    """Before anything is created: numbers of ranks that can be, and something to run."""
    recipes = chosen_recipes(config.recipes)
    wrong = [number for number in config.nprocs or [] if not 1 <= number <= MOST_RANKS]
    if wrong or config.nprocs == []:
        asked = ",".join(map(str, config.nprocs or []))
        raise UserError(f"nproc={asked}: allowed are numbers from 1 up to {MOST_RANKS}, as nproc=1,2")
    if config.hardware not in (None, MEASURED):
        load_hardware(config.hardware)
    before = run_directory.found_in(config, "compare")
    if before and before[1].max_steps != config.max_steps:
        raise UserError(
            f"max_steps={config.max_steps}: the runs in out={config.out} have max_steps={before[1].max_steps}; "
            "set it as it was, or name a new out"
        )
    cases, left_out = plan_cases(config, train, recipes)
    if not cases:
        raise UserError(f"nothing is left to compare: {left_out[0]}")


def compare_finished(config: CompareConfig) -> int | None:
    """With folders of runs, their tables; nothing is run then."""
    if config.runs is not None:
        refuse_others(config, train, {"runs"}, f"runs=[{','.join(config.runs)}]")
    return compare_runs(config)


@recipe(
    config=CompareConfig,
    looks_at="recipes",
    word="runs",
    single_training=False,
    ranks=1,
    check=check,
    several="nproc",
    alone=compare_finished,
)
def train(run: Run[CompareConfig]) -> None:
    config = run.asked
    recipes = chosen_recipes(config.recipes)
    run.report.line(f"compare: {count(len(recipes), 'recipe')} in {count(config.rounds, 'round')}")
    cases, left_out = plan_cases(config, train, recipes)
    for line in left_out:
        run.report.line(f"left out: {line}")
    (run.out / "runs").mkdir(exist_ok=True)
    if run.listener:
        run.listener.training = True  # from now on a signal is handled by the runs' parent
    results, failed = measure_all(run, cases)
    compared = {case.recipe for case in cases}
    verified: list[dict[str, Any]] = []
    problem = ""
    if config.verify:
        proven = [
            case_name(each) for each in recipes if (each.proofs or is_file(each.target)) and each.name in compared
        ]
        verified, problem = run_verify(run, train, proven, max(case.number for case in cases))
    rows = comparison_rows(results, metric_of(config), unit_of(config))
    if config.hardware:
        planned, unknown = predict_cases(run, [case for case, found in results.items() if found])
        left_out += [f"plan of {line}" for line in unknown]
        for case, row in zip(filter(results.get, results), rows, strict=True):
            row.planned = planned.get(case)
    trained = described(run.task, run.config)
    work = f"{config.model.name} on {config.data.name}" if config.task.name == IMAGES else " on ".join(trained)
    report = ComparisonReport(
        title=f"{work}: {count(len(compared), 'recipe')}",
        about=describe_work(run.config, run.device.type, trained),
        rows=rows,
        environment=system_info(run.world.hosts, str(run.device), run.world.backend),
        config=to_yaml(replace(config, out=None)),
        command=repeat_command(config, train),
        out=str(run.out),
        written=time.strftime("%Y-%m-%d %H:%M %Z"),
        verified=verified,
        verify_problem=problem,
        left_out=left_out,
        failed=list(failed.values()),
    )
    write_report(run, report)
    for table in comparison_tables(f"{work}, {run.device.type}", report.rows):
        run.report.console.print(table)
    for sentence in verdicts(report.rows):
        run.report.line(sentence)
    run.report.line(f"written: {short(run.out / 'report.html')}, compare.json, compare.png and the runs")
    if report.problems:
        raise CheckFailed("; ".join(report.problems))


def write_report(run: Run[CompareConfig], report: ComparisonReport) -> None:
    """compare.json, the plots and report.html."""
    files.write_json(run.out / "compare.json", asdict(report) | {"verdicts": verdicts(report.rows)})
    drawn = plots.make_plots(report.rows)
    for plot in drawn:
        files.write_atomically(run.out / f"{plot.name}.png", plot.png(plots.LIGHT))
    if drawn:
        files.write_atomically(run.out / "compare.png", plots.draw_png(drawn))
    files.write_atomically(run.out / "report.html", html_report(report, drawn))


if __name__ == "__main__":
    train.main()
