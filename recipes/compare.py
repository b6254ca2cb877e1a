"""Compare: what each technique costs and gains on this machine, the recipes run in turn on the same work.

Each recipe is started as a person would start it, with the same config, on each number of ranks, in turn and as many
rounds as asked: a machine that gets slower meets them all alike. Where several numbers are asked for on CPUs, a rank
has the same cores in all of them, as a rank on a GPU has the same GPU. Of recipes that are one process, data_parallel
takes the number for its replicas, single and model_parallel run once. What a recipe cannot do is left out, with a line
that says why.

Reported are images/s with the spread of the rounds, speedup and efficiency against `single` (the global batch stays
the same: strong scaling), communication and the share of a step in which nothing hides it, idle parts, waiting for
data, memory by rank and its imbalance (the largest over the mean), busy cores, the accuracy reached, the way to
the first step. Of DataParallel's threads it tells how many computed at a time: where that is far below their number,
they waited for each other in one interpreter. lockstep/compare/figures.py defines every figure.

    python -m recipes.compare recipes=[single,data_parallel,ddp] max_steps=30
    python -m recipes.compare nproc=1,2,4 rounds=5 model=resnet50 data=synthetic data.image_size=64 max_steps=20
    python -m recipes.compare recipes=[single,ddp,fsdp] verify=true     with recipes.verify's table of the same recipes

Interrupt it or kill it, and type it again with the `out=` it had: runs that have ended are not run again.

Expect: after a minute for each recipe, number and round: two tables, compare.json, plots, and report.html, one file
that opens anywhere. Exit code 1 where a recipe failed; the report is then about the others.
Source: https://arxiv.org/abs/2006.15704 (DataParallel against DistributedDataParallel)
"""

import json
import math
import os
import shlex
import shutil
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lockstep import Recipe, Run, UserError, recipe
from lockstep.compare import html_report, plots
from lockstep.compare.config import CompareConfig
from lockstep.compare.figures import Case, Result, comparison_rows, tables, verdicts
from lockstep.config import run_directory
from lockstep.config.keys import typed
from lockstep.config.schema import Config, to_yaml, with_values
from lockstep.data.image_files import check_data
from lockstep.distributed.devices import check_nproc, default_nproc, resolve_device
from lockstep.distributed.signals import Preempted
from lockstep.errors import CheckFailed
from lockstep.launch import recipe_process
from lockstep.launch.validate import check_package, validate
from lockstep.registry import choose, get_recipe
from lockstep.training.timing import warm_up
from lockstep.utils import files
from lockstep.utils.places import as_installed
from lockstep.utils.system import system_info
from lockstep.utils.text import count, interpreter, short

OURS = {"recipes", "nprocs", "rounds", "verify", "profile", "out", "nproc", "threads", "resume", "launcher"}
REPLICATES = {"data_parallel"}  # one process, whose `replicas` the number of ranks is
VERIFIES = {"model", "data", "precision", "seed", "device", "backend", "start"}  # what recipes.verify is told, too
WAIT_SECONDS = 60  # for a run that a killed start has left behind, and that is saving


# What is run ---------------------------------------------------------------------------------------------------------


def plan(config: CompareConfig) -> tuple[list[Case], list[str]]:
    """What is to be run, and a line for each combination that cannot be."""
    from lockstep.config.compose import compose_another  # Hydra, which only a process that starts others needs

    device, backend = resolve_device(config.device, config.backend)
    numbers = sorted(set(config.nprocs or [default_nproc(device)]))
    cores = len(os.sched_getaffinity(0))
    threads = config.threads
    if threads is None and device == "cpu" and len(numbers) > 1:
        threads = max(1, cores // numbers[-1])
    counted = check_data(config.data)
    steps = min(config.epochs * (counted[1] // config.global_batch_size), config.max_steps or math.inf)
    profile = min(config.profile, max(0, int(steps) - warm_up(int(steps)) - 1))  # as many as a short run has
    cases, left_out = [], []
    for name in choose(config.recipes):
        each = get_recipe(name)
        common = words(config, each) + ([f"threads={threads}"] if threads else [])
        key = "replicas" if name in REPLICATES else "nproc" if each.ranks is None else ""
        base: Config | None = None
        for number in numbers if key else [1]:
            ranks, own = each.ranks or number, {key: number} if key else {}
            case = Case(
                name,
                number,
                devices(config, each, number, ranks, threads, device, cores),
                (*common, *(typed(*pair) for pair in own.items())),
                "replica" if name in REPLICATES else "rank",
                profile,
            )
            try:  # all that its own command would be held to
                check_package(each)
                if each.backbone:
                    raise UserError("trains a part of a trained model, which is not the same work")
                check_nproc(number, device, backend)
                base = base or compose_another(each, common)
                validate(with_values(base, own), each, ranks, counted)
                cases.append(case)
            except UserError as error:
                left_out.append(f"{case.label}: {error}")
    return cases, left_out


def devices(
    config: CompareConfig, each: Recipe, number: int, ranks: int, threads: int | None, device: str, cores: int
) -> int:
    """GPUs, or where there is none the cores, that a case may use."""
    if device == "cuda":
        return len(getattr(config, "devices", None) or "ab") if each.name == "model_parallel" else number
    return min(cores, max(number, ranks * (threads or max(1, cores // ranks))))


def words(config: CompareConfig, each: Recipe) -> list[str]:
    """The overrides that all runs of a recipe have in common."""
    from lockstep.config.compose import overrides

    return overrides(train, config, each, OURS)


def check(config: CompareConfig, share: int) -> None:
    """Before anything is created: numbers that can be, and something to run."""
    choose(config.recipes)
    wrong = [number for number in config.nprocs or [] if number < 1]
    if wrong or config.nprocs == []:
        raise UserError(f"nproc={','.join(map(str, config.nprocs or []))}: allowed are numbers from 1 up, as nproc=1,2")
    before = run_directory.found_in(config, "compare")
    if before and before[1].max_steps != config.max_steps:
        raise UserError(
            f"max_steps={config.max_steps}: the runs in out={config.out} have max_steps={before[1].max_steps}; "
            "set it as it was, or name a new out"
        )
    cases, left_out = plan(config)
    if not cases:
        raise UserError(f"nothing is left to compare: {left_out[0]}")


# Running it ----------------------------------------------------------------------------------------------------------


def carry_out(run: Run[CompareConfig], target: str, told: list[str], out: Path) -> float | None:
    """Run a command in a session of its own, to its end; its seconds, or None where this very one has ended before.

    Raises:
        trial.Failed: it has failed.
        Preempted: this process is to leave.
    """
    note = out.with_name(f"{out.name}.json")
    asked = {"command": target, "words": told}
    if note.is_file() and {**json.loads(note.read_text()), **asked} == json.loads(note.read_text()):
        return None
    if out.exists():  # of a start that was cut off, whose run may be saving still; half a run measures nothing
        run_directory.lock(out, WAIT_SECONDS).close()
        shutil.rmtree(out)
    began = time.perf_counter()
    command = recipe_process.Command(target, told, out, os.getcwd(), {})
    while not command.ended(0.5):
        if run.listener and run.listener.received:
            run.listener.announce(run.listener.received)
            command.leaves()
            raise Preempted(signal.Signals(run.listener.received).name)
    seconds = time.perf_counter() - began
    files.write_json(note, asked | {"seconds": seconds})
    return seconds


def measure(run: Run[CompareConfig], case: Case, number: int, out: Path) -> Result:
    """The result.json of a case's run in round `number` and, as `start_seconds`, its way to step 1."""
    profiled = case.profile and (number > 1 or run.config.rounds == 1)
    told = [*case.words, *([f"profile={case.profile}"] if profiled else [])]
    carry_out(run, f"lockstep.recipes.{case.recipe}", told, out)
    seconds = json.loads(out.with_name(f"{out.name}.json").read_text())["seconds"]
    result = json.loads((out / "result.json").read_text())
    return dict(result, start_seconds=seconds - result["wall_seconds"] + result["setup_seconds"])


def verify(run: Run[CompareConfig], cases: list[Case]) -> tuple[list[dict[str, Any]], str]:
    """recipes.verify's rows of the same recipes, on the largest number of ranks; and what it says is wrong."""
    names = [name for name in dict.fromkeys(case.recipe for case in cases) if name != "single"]
    proven = [name for name in names if get_recipe(name).proofs]
    if not proven:
        return [], "none of the recipes declares what recipes.verify could hold it to"
    run.report.line(f"recipes.verify: {', '.join(proven)}")
    told = [
        word for word in words(run.asked, get_recipe("verify")) if word.partition("=")[0].partition(".")[0] in VERIFIES
    ]
    told += [typed("recipes", proven), f"nproc={max(case.number for case in cases)}"]
    out, problem = run.out / "runs" / "verify", ""
    try:
        carry_out(run, "lockstep.recipes.verify", told, out)
    except recipe_process.Failed as error:
        problem = f"recipes.verify: {error}"
    file = out / "verify.json"
    return (json.loads(file.read_text()) if file.is_file() else []), problem


def again(config: CompareConfig) -> str:
    """The command that repeats the comparison in a new folder."""
    from lockstep.config.compose import overrides

    typed_here = [word.replace("nprocs=[", "nproc=").rstrip("]") if word.startswith("nprocs=") else word
                  for word in overrides(train, config, train, {"out", "nproc"})]  # fmt: skip
    return as_installed(f"{interpreter()} -m recipes.compare {shlex.join(typed_here)}".strip())


def about(config: CompareConfig, device: str) -> dict[str, str]:
    """The work, in a line."""
    size = f"{config.model.image_size} × {config.model.image_size} pixels"
    length = count(config.max_steps, "step") if config.max_steps else count(config.epochs, "epoch")
    return {"": f"{config.model.name} on {config.data.name}", "of": size} | {
        "global batch": str(config.global_batch_size),
        "optimizer": config.optim.name,
        "precision": config.precision,
        "at most": length,
        "in": count(config.rounds, "round"),
        "on": device,
    }


@recipe(config=CompareConfig, looks_at="recipes", single_training=False, ranks=1, check=check, several="nproc")
def train(run: Run[CompareConfig]) -> None:
    config = run.asked
    cases, left_out = plan(config)
    for line in left_out:
        run.report.line(f"left out: {line}")
    (run.out / "runs").mkdir(exist_ok=True)
    if run.listener:
        run.listener.training = True  # from now on a signal is this function's to heed
    found: dict[Case, list[Result]] = {case: [] for case in cases}
    folders: dict[Case, list[str]] = {case: [] for case in cases}
    failed: dict[Case, str] = {}
    for number in range(1, config.rounds + 1):
        for case in cases:
            if case in failed:
                continue
            run.report.line(f"round {number} of {config.rounds}: {case.label}")
            out = run.out / "runs" / f"{case.name}-{number}"
            try:
                found[case].append(measure(run, case, number, out))
                folders[case].append(str(out.relative_to(run.out)))
            except recipe_process.Failed as error:
                failed[case] = f"{case.label}: {error}"
                run.report.line(f"failed: {failed[case]}")
    verified, problem = verify(run, cases) if config.verify else ([], "")
    made = comparison_rows(found, folders)
    facts = html_report.Facts(
        title=f"{config.model.name} on {config.data.name}: {count(len({case.recipe for case in cases}), 'recipe')}",
        about=about(run.config, run.device.type),
        rows=made,
        environment=system_info(run.world.hosts, str(run.device), run.world.backend),
        config=to_yaml(replace(config, out=None)),
        command=again(config),
        out=str(run.out),
        written=time.strftime("%Y-%m-%d %H:%M %Z"),
        verified=verified,
        verify_problem=problem,
        left_out=left_out,
        failed=list(failed.values()),
    )
    write(run, facts)
    broken = [*failed.values(), *([problem] if problem else [])]
    if broken:
        raise CheckFailed("; ".join(broken))


def write(run: Run[CompareConfig], facts: html_report.Facts) -> None:
    """compare.json, the plots, report.html, and the tables on the console."""
    said = verdicts(facts.rows)
    files.write_json(run.out / "compare.json", asdict(facts) | {"verdicts": said})
    drawn = plots.plots(facts.rows) if facts.rows else []
    for plot in drawn:
        files.write_atomically(run.out / f"{plot.name}.png", plot.png(plots.LIGHT))
    if drawn:
        files.write_atomically(run.out / "compare.png", plots.overview(drawn))
    files.write_atomically(run.out / "report.html", html_report.html_report(facts, drawn))
    title = f"{run.config.model.name} on {run.config.data.name}, {run.device.type}"
    for table in tables(title, facts.rows) if facts.rows else []:
        run.report.console.print(table)
    for line in said:
        run.report.line(line)
    run.report.line(f"written: {short(run.out / 'report.html')}, compare.json, compare.png and the runs")


if __name__ == "__main__":
    train.main()
