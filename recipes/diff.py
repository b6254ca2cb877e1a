"""Diff: where two runs part: the first step, layer, operation and tensor that differ.

Two folders of runs that were trained with `record_tensors=N`: on two machines, with two versions of torch, before and
after a change, by two recipes. Or two recipes by their names: both are trained for a few steps, on the ranks that are
there and from the same settings, as recipes.verify does.

Compared are whole tensors, however the ranks have divided them: what each layer takes and gives, the loss, the gradients
of what it takes and gives, parameters' gradients, weights and buffers after the update. The first one that is off
beyond `tolerance` is named, with the operation that made it; then the ten that are furthest off in that step. A tensor's
difference is |A − B| / |B|, each the root of its sum of squares.

How: lockstep/callbacks/tensor_recorder.py records, verify/recording.py puts whole tensors together,
first_difference.py compares them, parting_report.py says it.

    python -m recipes.diff ddp fsdp                                     two recipes: the same task, a few steps
    python -m recipes.diff single my_recipe.py task=my_task.py:MyTask   yours
    python -m recipes.ddp record_tensors=2 out=here                     or two runs, each recorded where it is
    python -m recipes.diff here there

Expect: a few lines, within half a minute for two recipes on two CPU cores. Exit code 0 where they are equal, 1 where they
part.
Source: https://docs.pytorch.org/docs/stable/notes/numerical_accuracy.html
"""

from dataclasses import asdict
from itertools import tee

import torch.distributed as dist
from rich.console import Console

from lockstep import Recipe, Run, UserError, recipe
from lockstep.callbacks.base import Callback
from lockstep.config.check import check_values
from lockstep.config.copies import convert, refuse_others, with_values
from lockstep.config.schema import Config
from lockstep.errors import CheckFailed
from lockstep.launch.validate import check_batch, check_package
from lockstep.registry import get_recipe, is_file, list_recipes
from lockstep.utils.files import write_json
from lockstep.utils.tables import terminal_width
from lockstep.utils.text import count
from lockstep.verify.config import DiffConfig
from lockstep.verify.first_difference import Parting, find_parting, parting_of
from lockstep.verify.operations import with_operation
from lockstep.verify.parting_report import parting_lines, parting_tables
from lockstep.verify.proofs import proof_batch, proof_config
from lockstep.verify.recorded_runs import described_run, recorded_pairs
from lockstep.verify.trace import trace


def two_of(config: DiffConfig) -> tuple[str, str]:
    """What is compared; raises UserError where it is not two."""
    if config.runs is None or len(config.runs) != 2:
        shown = "null" if config.runs is None else f"[{','.join(config.runs)}]"
        raise UserError(f"runs={shown}: name two: python -m recipes.diff A B, folders of runs or recipes")
    return config.runs[0], config.runs[1]


def is_recipe(name: str) -> bool:
    return name in list_recipes() or is_file(name)


def diff_folders(config: DiffConfig) -> int | None:
    """Compare two folders, in this process; None where recipes are compared.

    Raises:
        UserError: one of them is no recorded run, or they cannot be compared.
    """
    runs = two_of(config)
    recipes = [name for name in runs if is_recipe(name)]
    if len(recipes) == 2:
        return None
    check_values(config)
    if recipes:
        raise UserError(
            f"runs=[{','.join(runs)}]: {recipes[0]} is a recipe, and the other is not; name two of one kind, "
            f"a folder of that name as ./{recipes[0]}"
        )
    refuse_others(config, train, {"runs", "tolerance"}, f"runs=[{','.join(runs)}]")
    pairs, shown = tee(recorded_pairs(runs))
    parting = find_parting(pairs, config.tolerance)
    _, mine, theirs = next(shown)
    for name, each in zip("AB", ((runs[0], mine), (runs[1], theirs)), strict=True):
        print(f"{name} = {described_run(*each)}")
    print(*parting_lines(parting, "A", "B"), sep="\n")
    Console(width=terminal_width()).print(*parting_tables(parting), sep="\n", end="")
    return int(parting.first is not None)


def trained_config(run: Run[DiffConfig], each: Recipe) -> Config:
    """What a recipe is trained with: few steps, whose tensors are recorded."""
    config, steps = run.config, run.config.record_tensors
    return with_values(
        proof_config(run.asked, each.config, config.precision, {}), {"max_steps": steps, "record_tensors": steps}
    )


def check(config: DiffConfig, share: int) -> None:
    """Both recipes must be able to train on these ranks."""
    for name in two_of(config):
        if not is_recipe(name):
            raise UserError(
                f"runs={name}: folders are read by one process; start it with python, without torchrun or srun"
            )
        each = get_recipe(name)
        mine, ranks = convert(config, each.config), each.ranks or config.global_batch_size // share
        check_package(each)
        check_batch(mine, ranks)
        if each.check:
            each.check(mine, mine.global_batch_size // (ranks // mine.model_parallel_size))


@recipe(
    config=DiffConfig,
    looks_at="runs",
    word="runs",
    single_training=False,
    check=check,
    batch=proof_batch,
    alone=diff_folders,
)
def train(run: Run[DiffConfig]) -> None:
    recipes = [get_recipe(name) for name in two_of(run.config)]
    names = ["A", "B"] if recipes[0].name == recipes[1].name else [each.name for each in recipes]
    steps = count(run.config.record_tensors, "step")
    run.report.line(
        f"diff: {' and '.join(names)}, {steps} in {run.config.precision}, {count(run.world.world_size, 'rank')}"
    )
    folders = [run.out / name for name in names]
    for each, name in zip(recipes, names, strict=True):
        trace(run, each, trained_config(run, each), name)
        run.report.line(f"{name}: trained")
    parting: Parting | None = None
    if run.world.rank == 0:
        local = recipes[0].local_updates, recipes[1].local_updates
        parting = parting_of(folders[0], folders[1], local, run.config.tolerance)

    def again(number: int, looks_on: Callback) -> None:
        each = recipes[number]
        trace(
            run, each, with_values(trained_config(run, each), {"record_tensors": 0}), names[number], looks_on=[looks_on]
        )

    parting = with_operation(run, parting, (folders[0], folders[1]), [each.ranks for each in recipes], again)
    said = [report(run, parting, names) if parting else ""]
    dist.broadcast_object_list(said, src=0)
    if said[0]:
        raise CheckFailed(said[0])


def report(run: Run[DiffConfig], parting: Parting, names: list[str]) -> str:
    """Show where they part, and return it in one line; nothing where they are equal."""
    write_json(run.out / "diff.json", asdict(parting))
    lines = parting_lines(parting, *names)
    for line in lines:
        run.report.line(line)
    run.report.console.print(*parting_tables(parting), sep="\n")
    first = parting.first
    return f"{lines[0]}: {first.layer or 'the model'}, {first.tensor}; see diff.json" if first else ""


if __name__ == "__main__":
    train.main()
