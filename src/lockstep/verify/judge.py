"""Two programs' records compared: a row per step, and where they first part."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.markup import escape
from rich.table import Table

from lockstep.errors import UserError
from lockstep.utils.tables import terminal_tables
from lockstep.utils.text import count
from lockstep.verify.programs import ProgramRecords
from lockstep.verify.rows import relative, worst
from lockstep.verify.trace import Tensors, angle, tensor_differences, vector_distance, way

# What each column may be, by the lowest precision that the programs compute in (docs/your_program.md says why).
PROGRAM_COLUMNS = ("loss", "ranks", "grads", "weights", "buffers")  # in the order in which they come about
PROGRAM_TOLERANCES = {
    "fp64": dict.fromkeys(PROGRAM_COLUMNS, 1e-10),
    "fp32": {"loss": 1e-4, "ranks": 1e-5, "grads": 1e-3, "weights": 1e-2, "buffers": 1e-2},
    "bf16": {"loss": 1e-2, "ranks": 1e-3, "grads": 1e-1, "weights": 1e-1, "buffers": 1e-1},
    "fp16": {"loss": 1e-2, "ranks": 1e-3, "grads": 1e-1, "weights": 1e-1, "buffers": 1e-1},
}
LOWEST_FIRST = {
    "torch.bfloat16": "bf16",
    "torch.float16": "fp16",
    "torch.float32": "fp32",
    "torch.float64": "fp64",
}
HINTS = {  # what a first difference often comes from
    "start": "they begin with other weights: seed both alike, before the model is made",
    "loss": "other samples in the batch, or a loss that is a mean over something else, such as each rank's own tokens",
    "later loss": "other samples in this batch: shuffled otherwise, or a sampler without set_epoch",
    "ranks": "replicas have parted: something is updated without being averaged over the ranks",
    "grads": "gradients are averaged, weighted, clipped or accumulated otherwise",
    "weights": "the optimizer does something else: learning rate, schedule, weight decay, or what it leaves out",
    "buffers": "a layer keeps statistics of its own share of the batch, as BatchNorm does",
}


@dataclass
class ProgramRow:
    """One step; numbers are relative differences, None where there is nothing to compare.

    Attributes:
        step: its number, or `start`.
        told: of each column that is off, where and by how much.
    """

    step: str
    loss: float | None = None
    ranks: float | None = None
    grads: float | None = None
    weights: float | None = None
    buffers: float | None = None
    told: dict[str, str] = field(default_factory=dict)

    def hold(self, column: str, figure: float, allowed: dict[str, float], words: str) -> None:
        """Enter a figure; where it is more than is allowed, or no number, it is off, and `words` say where."""
        before = getattr(self, column)
        setattr(self, column, figure if before is None else max(before, figure))
        if not figure <= allowed[column]:
            self.told.setdefault(column, f"{words} (allowed: {allowed[column]:.0e})")


@dataclass(frozen=True)
class ProgramVerdict:
    """Attributes:
    precision: the lowest that the programs compute in.
    first: the first row that is off and its first column, in words; empty where all are equal.
    hint: what that usually comes from.
    notes: what could not be compared.
    """

    rows: list[ProgramRow]
    precision: str
    allowed: dict[str, float]
    first: str
    hint: str
    notes: list[str]


def judge_programs(
    mine: ProgramRecords, theirs: ProgramRecords, precision: str | None, tolerance: float | None
) -> ProgramVerdict:
    """Hold one program's records to another's.

    Args:
        precision: whose tolerances hold; None: of the lowest precision that is found.
        tolerance: of every column, instead.

    Raises:
        UserError: they train different parameters.
    """
    precision = precision or precision_of(mine, theirs)
    allowed = dict.fromkeys(PROGRAM_COLUMNS, tolerance) if tolerance is not None else PROGRAM_TOLERANCES[precision]
    starts = of_all_ranks(mine, 0, "start"), of_all_ranks(theirs, 0, "start")
    check_parameters(mine, theirs, *starts)
    start = ProgramRow("start")
    exact = dict(allowed, weights=allowed["loss"])
    start.hold("weights", vector_distance(*starts), exact, worst("", *starts))
    hold_replicas(start, mine, 0, "start", allowed)
    rows, notes = [start], list[str]()
    for step in range(len(mine.steps)):
        row = ProgramRow(str(step + 1))
        losses = mean_loss(mine.steps[step]), mean_loss(theirs.steps[step])
        if losses[0] is not None and losses[1] is not None:
            figure = relative(losses[0], losses[1])
            row.hold("loss", figure, allowed, f"{losses[0]:.7g} and not {losses[1]:.7g}, off by {figure:.0e}")
        rows.append(row)
    if all(row.loss is None for row in rows):
        notes.append("no losses: neither calls backward on one; lockstep.verify.record(loss, weight) says them")
    gradients = of_all_ranks(mine, 0, "gradients"), of_all_ranks(theirs, 0, "gradients")
    if any(gradients):
        rows[1].hold("grads", vector_distance(*gradients), allowed, worst("", *gradients))
    else:
        notes.append("no gradients: neither has any when its optimizer steps")
    hold_replicas(rows[1], mine, 0, "gradients", allowed)
    last, apart = len(mine.steps) - 1, vector_distance if precision == "fp64" else angle
    for step in sorted({0, last}):
        ends = of_all_ranks(mine, step, "weights"), of_all_ranks(theirs, step, "weights")
        ways = [way(begin, end) for begin, end in zip(starts, ends, strict=True)]
        rows[1 + step].hold("weights", apart(*ways), allowed, f"the way since the start of {worst('', *ways)}")
        hold_replicas(rows[1 + step], mine, step, "weights", allowed)
    buffers = shared_floats(of_all_ranks(mine, last, "buffers"), of_all_ranks(theirs, last, "buffers"))
    if buffers[0]:
        rows[-1].hold("buffers", vector_distance(*buffers), allowed, worst("", *buffers))
    first, hint = parted(rows)
    return ProgramVerdict(rows, precision, allowed, first, hint, notes)


def parted(rows: list[ProgramRow]) -> tuple[str, str]:
    """The first column that is off of the first row that is, in words, and the hint."""
    for number, row in enumerate(rows):
        for column in [name for name in PROGRAM_COLUMNS if name in row.told]:
            if column == "weights" and not number:
                return f"before step 1: weights: {row.told[column]}", HINTS["start"]
            where = f"step {row.step}" if number else "before step 1"
            return f"{where}: {column}: {row.told[column]}", HINTS[
                "later loss" if column == "loss" and number > 1 else column
            ]
    return "", ""


def precision_of(*programs: ProgramRecords) -> str:
    """The lowest precision of weights, gradients and autocast."""
    found = set()
    for program in programs:
        for content in program.steps[0]:
            found |= set(content["autocast"])
            found |= {str(tensor.dtype) for tensors in content["tensors"].values() for tensor in tensors.values()}
    return next((name for dtype, name in LOWEST_FIRST.items() if dtype in found), "fp32")


def of_all_ranks(program: ProgramRecords, step: int, kind: str) -> Tensors:
    """The tensors of a kind, each from the first rank that has it."""
    parts = [content["tensors"].get(kind, {}) for content in program.steps[step]]
    return {name: tensor for part in reversed(parts) for name, tensor in part.items()}


def check_parameters(mine: ProgramRecords, theirs: ProgramRecords, ours: Tensors, others: Tensors) -> None:
    """Refuse programs that do not train the same parameters; raises UserError, which names the first."""
    lonely = [name for name in [*ours, *others] if (name in ours) != (name in others)]
    if lonely:
        which = mine if lonely[0] in ours else theirs
        raise UserError(
            f"{mine.program}: other parameters than {theirs.program}; {count(len(lonely), 'name')} only one has, the first: "
            f"{lonely[0]}, only {which.program.key} has it; let both watch the same model"
        )
    for name, tensor in ours.items():
        if tensor.shape != others[name].shape:
            raise UserError(
                f"{mine.program}: {name} is {list(tensor.shape)}, and {list(others[name].shape)} in {theirs.program}; "
                "let both make the same model, and watch it when it is whole or in shards of DTensor"
            )


def hold_replicas(row: ProgramRow, program: ProgramRecords, step: int, kind: str, allowed: dict[str, float]) -> None:
    """Hold what several ranks have under one name to the first of them: they should be replicas."""
    whole = of_all_ranks(program, step, kind)
    for content in program.steps[step]:
        found = tensor_differences(content["tensors"].get(kind, {}), whole)
        name = max(found, key=lambda each: found[each], default=None)
        if name is not None and program.ranks > 1:
            what = "gradient of " if kind == "gradients" else ""
            row.hold(
                "ranks",
                found[name],
                allowed,
                f"rank {content['rank']} has another {what}{name}, off by {found[name]:.0e}",
            )


def mean_loss(contents: list[dict[str, Any]]) -> float | None:
    """A step's loss: what the ranks call backward on, summed over micro-batches and averaged over ranks; or what they have
    said, averaged by its weights over both."""
    if any(content["recorded"] for content in contents):
        pairs = [pair for content in contents if content["recorded"] for pair in content["losses"]]
        return sum(loss * weight for loss, weight in pairs) / (sum(weight for _, weight in pairs) or float("nan"))
    sums = [sum(loss for loss, _ in content["losses"]) for content in contents if content["losses"]]
    return sum(sums) / len(sums) if sums else None


def shared_floats(mine: Tensors, theirs: Tensors) -> tuple[Tensors, Tensors]:
    """Those numbers, not counters, that both have."""
    names = [name for name in mine if name in theirs and mine[name].is_floating_point()]
    return {name: mine[name] for name in names}, {name: theirs[name] for name in names}


def program_tables(verdict: ProgramVerdict, mine: ProgramRecords, theirs: ProgramRecords) -> list[Table]:
    """A line per step, and one of what is allowed."""
    title = f"program on {count(mine.ranks, 'rank')} against {count(theirs.ranks, 'rank')}, in {verdict.precision}"
    shown = [name for name in PROGRAM_COLUMNS if any(getattr(row, name) is not None for row in verdict.rows)]
    columns = {"step": [*(row.step for row in verdict.rows), "allowed"]}
    for name in shown:
        columns[name] = [*(program_cell(row, name) for row in verdict.rows), f"{verdict.allowed[name]:.0e}"]
    words = [
        f"OFF: {', '.join(name for name in PROGRAM_COLUMNS if name in row.told)}" if row.told else "equal"
        for row in verdict.rows
    ]
    columns["verdict"] = [*(f"[{'red' if ':' in word else 'green'}]{escape(word)}[/]" for word in words), ""]
    return terminal_tables(title, columns, text=("step", "verdict"))


def program_cell(row: ProgramRow, name: str) -> str:
    figure = getattr(row, name)
    if figure is None:
        return ""
    return f"[red]{figure:.0e}[/]" if name in row.told else f"{figure:.0e}"
