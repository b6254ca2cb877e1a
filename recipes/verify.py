"""Verify: every recipe computes the same training as recipes.single, or this says which one does not.

Each recipe is trained for a few steps on the same data from the same seed as `single`, all in one go on the ranks that
are there. Compared are every step's loss, the first update's gradients, the weights and buffers at the end and the
evaluation, in fp64, where the order of summation is all that may differ (tolerance 1e-10), and in fp32, where one ReLU
that flips is a legitimate difference: there tensors are compared by the angle between them. A recipe declares under
which settings it must be equal (`@recipe(proof=...)`): DDP, for one, with group norm, since BatchNorm on each rank's
share is another computation. By how much it then differs is measured too, in rows of their own. Later recipes join by
that declaration.

    python -m recipes.verify                             all recipes, two ranks on this machine
    python -m recipes.verify recipes=[ddp] nproc=4 precision=fp64     or fp32, bf16, fp16

Expect: every row green and exit code 0, in about three minutes on two CPU cores; exit code 1 if a row is off.
Source: https://docs.pytorch.org/docs/stable/notes/numerical_accuracy.html
"""

import importlib
import traceback
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist
from rich.table import Table

from lockstep import Proof, Recipe, Run, UserError, recipe
from lockstep.config.schema import Config, typed, with_values
from lockstep.errors import CheckFailed
from lockstep.launch.validate import check_batch, check_package
from lockstep.training.precision import AUTOCAST
from lockstep.utils.files import write_json
from lockstep.verify.trace import Trace, angle, difference, trace
from recipes import choose

TOLERANCE = {"fp64": 1e-10, "fp32": 1e-2, "bf16": 1e-1, "fp16": 1e-1}
STEPS = {"fp64": 5, "fp32": 3, "bf16": 3, "fp16": 3}
IMAGES_A_RANK = 14  # chunked in 4 it leaves a ragged piece, which still has 2 images for BatchNorm


@dataclass
class Row:
    """One comparison; the five numbers are relative differences from `single`.

    `variant` says which of a recipe's proofs it is, where there are several.
    """

    recipe: str
    precision: str
    ranks: int
    steps: int
    loss: float | None = None
    gradients: float | None = None
    weights: float | None = None
    buffers: float | None = None
    evaluation: float | None = None
    tolerance: float = 0.0
    verdict: str = "equal"
    variant: str = ""

    def judge(self, differs: str) -> None:
        if differs:
            self.verdict = f"differs: {differs}"
            return
        names = ("loss", "gradients", "weights", "buffers", "evaluation")
        off = [name for name in names if not getattr(self, name) <= self.tolerance]
        if off:
            self.verdict = f"OFF: {', '.join(off)}"

    @property
    def fails(self) -> bool:
        return self.verdict.startswith("OFF")


def find(names: list[str] | None) -> list[Recipe]:
    """The recipes that declare a proof, or those of them that are named.

    Raises:
        UserError: a name is not one of them.
    """
    found = [importlib.import_module(f"recipes.{name}").train for name in choose(names)]
    return [each for each in found if each.proofs]


def plan(run: Run) -> list[tuple[Recipe, Proof, str, dict[str, Any], str]]:
    """The rows to come: (recipe, proof, precision, settings for both sides, why they differ or nothing).

    A precision other than the default one asks for the proofs in that precision alone.
    """
    found: list[tuple[Recipe, Proof, str, dict[str, Any], str]] = []
    everything = run.config.precision == Config().precision
    precisions = ["fp64", "fp32", *AUTOCAST] if run.device.type == "cuda" else ["fp64", "fp32"]
    for each, proof in ((one, proof) for one in find(run.config.recipes) for proof in one.proofs):
        for precision in precisions if everything else [run.config.precision]:
            if precision in proof.precisions or not everything:  # asked for, and said to be impossible
                found.append((each, proof, precision, proof.settings, ""))
        if proof.differs and everything:
            found.append((each, proof, proof.precisions[0], proof.differs, proof.because))
    return found


def settings(run: Run, precision: str, values: dict[str, Any]) -> Config:
    """What both sides train: few steps, small batches, every step logged, one evaluation at the end."""
    common: dict[str, Any] = {
        "precision": precision,
        "global_batch_size": IMAGES_A_RANK * run.world.world_size,
        "max_steps": run.config.max_steps or STEPS[precision],
        "log_every": 1,
        "eval_every": 0,
        "optim.warmup_steps": 0,
        "recipes": None,
    }
    if precision == "fp16":  # so small that no step is left out: which ones are depends on how images are dealt out
        common["loss_scale"] = 256.0
    return with_values(run.asked, common | values)


def words(values: dict[str, Any]) -> list[str]:
    return [typed(*pair) for pair in values.items()]


def compare(row: Row, mine: Trace, theirs: Trace, differs: str) -> None:
    """Fill in a row; `differs` says why these settings make another computation, where they do."""
    pairs = zip(mine.losses, theirs.losses, strict=True)
    row.loss = max(abs(a - b) / abs(b) for a, b in pairs)
    distance = difference if row.precision == "fp64" else angle
    row.gradients = distance(mine.gradients, theirs.gradients)
    row.weights = distance(mine.weights, theirs.weights)
    row.buffers = distance(mine.buffers, theirs.buffers)
    row.evaluation = abs(mine.result["eval_loss"] - theirs.result["eval_loss"]) / theirs.result["eval_loss"]
    row.judge(differs)


def show(run: Run, rows: list[Row]) -> None:
    """The table, for people."""
    table = Table(title=f"each recipe against recipes.single, {run.world.world_size} ranks", title_justify="left")
    numbers = ("loss", "gradients", "weights", "buffers", "evaluation")
    for column in ("recipe", "precision", "steps", *numbers, "allowed", "verdict"):
        table.add_column(column)
    for row in rows:
        allowed = None if row.verdict.startswith("differs") else row.tolerance
        figures = [*(getattr(row, name) for name in numbers), allowed]
        cells = ["" if figure is None else f"{figure:.0e}" for figure in figures]
        style = "red" if row.fails else "green" if row.verdict == "equal" else "yellow"
        name = f"{row.recipe} {row.variant}".strip()
        table.add_row(name, row.precision, str(row.steps), *cells, f"[{style}]{row.verdict}[/]")
    run.report.console.print(table)


def check(config: Config, share: int) -> None:
    """Only recipes that exist can be verified."""
    find(config.recipes)


@recipe(check=check)
def train(run: Run) -> None:
    single = importlib.import_module("recipes.single").train
    references: dict[str, Trace | None] = {}
    rows = []
    for each, proof, precision, values, differs in plan(run):
        row = Row(each.name, precision, run.world.world_size, run.config.max_steps or STEPS[precision])
        row.tolerance = TOLERANCE[precision]
        own = words(proof.own)
        others = [words(other.own) for other in each.proofs]
        row.variant = " ".join(word for word in own if not all(word in other for other in others))
        rows.append(row)
        base = settings(run, precision, values)
        mine = with_values(base, proof.own)
        ranks = each.ranks or run.world.world_size
        try:
            check_package(each)
            check_batch(mine, ranks)
            if each.check:
                each.check(mine, mine.global_batch_size // (ranks // mine.stages))
        except UserError as error:
            row.verdict = f"not run: {error}"
            continue
        # Where a part of the model is frozen, say, the same part is frozen in `single`.
        alike = proof.prepare is not None
        key = "-".join([precision, *words(values), *(own if alike else [])])
        try:
            if key not in references:
                reference_config = mine if alike else base
                references[key] = trace(run, single, reference_config, f"single-{key}", proof.prepare)
            name = "-".join([each.name, precision, *words(values), *own])
            found, reference = trace(run, each, mine, name), references[key]
            if found and reference:
                compare(row, found, reference, differs)
        except Exception as error:
            # The ranks may now be at different places, so no further row could be trusted.
            run.report.log.write(traceback.format_exc())
            raise CheckFailed(f"{each.name} in {precision}: {type(error).__name__}: {error}") from None
    if run.world.rank == 0:
        write_json(run.out / "verify.json", [asdict(row) for row in rows])
        show(run, rows)
    off = [f"{row.recipe} in {row.precision}" + f" with {row.variant}" * bool(row.variant) for row in rows if row.fails]
    verdict: list[Any] = [off]
    dist.broadcast_object_list(verdict, src=0)
    if verdict[0]:
        raise CheckFailed(f"not the training that recipes.single computes: {', '.join(verdict[0])}; see verify.json")


if __name__ == "__main__":
    train.main()
