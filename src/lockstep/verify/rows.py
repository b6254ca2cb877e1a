"""One row of recipes.verify's table: how far a recipe's training is from its reference's, and the verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lockstep.verify.first_difference import Parting
from lockstep.verify.trace import Tensors, Trace, angle, difference, tensor_differences, vector_distance, way

# By precision; below fp64 only where it is not known what rounding makes of the same training.
TOLERANCES = {"fp64": 1e-10, "fp32": 1e-2, "bf16": 1e-1, "fp16": 1e-1}
LAST_BIT = {"fp32": 2.0**-23, "bf16": 2.0**-7, "fp16": 2.0**-10}
LOSS_BITS = 4  # so many of a loss's last bits may be off though they were right by chance
ROUNDINGS = 4  # so many times what rounding makes of the reference may be between it and a recipe
COMPARED = ("loss", "gradients", "weights", "buffers", "evaluation")


@dataclass
class VerifyRow:
    """One comparison; the five numbers are relative differences from the reference, None where it has nothing of them.

    `allowed` says how large each may be, `tolerance` how large those may that are not in it. `variant` says which of a
    recipe's proofs it is, where there are several; `first` where the two first differ, `off_after` how many steps of
    training show it, and `parting` in which layer and operation, where that was asked for. `settings` are those of both
    sides, as typed, and `seconds` what the row took.
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
    allowed: dict[str, float] = field(default_factory=dict)
    verdict: str = "equal"
    variant: str = ""
    against: str = "recipes.single"
    first: str = ""
    off_after: int = 0
    parting: Parting | None = None
    settings: str = ""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.tolerance = self.tolerance or TOLERANCES[self.precision]

    @property
    def label(self) -> str:
        """The recipe, and the proof where it has several."""
        return f"{self.recipe} {self.variant}".strip()

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What it is called by in another run of verify."""
        return self.recipe, self.precision, self.variant, self.settings

    @property
    def fails(self) -> bool:
        return self.verdict.startswith("OFF")

    def allows(self, name: str) -> float:
        """How large a number may be, of COMPARED."""
        return self.allowed.get(name, self.tolerance)

    def rounding(self, name: str) -> float:
        """What rounding makes of a number, of COMPARED: measured, or where it was not, a hundredth of what is allowed."""
        return self.allowed[name] / ROUNDINGS if name in self.allowed else self.tolerance / 100

    def allow_rounding(self, rounding: dict[str, float]) -> None:
        """Allow what rounding explains.

        Args:
            rounding: what it makes of the reference, by COMPARED: see `rounding_of`.
        """
        least = LAST_BIT[self.precision]
        self.allowed = {name: ROUNDINGS * max(figure, least) for name, figure in rounding.items()}

    def compare(self, mine: Trace, theirs: Trace, differs: str = "") -> None:
        """Fill in the numbers and the verdict.

        Args:
            differs: why these settings make another computation, where they do.
        """
        losses = [relative(a, b) for a, b in zip(mine.losses, theirs.losses, strict=True)]
        distance = vector_distance if self.allowed else difference if self.precision == "fp64" else angle
        figures = figures_between(mine, theirs, distance)
        for name, figure in figures.items():
            setattr(self, name, figure)
        # Written so that a number which is not one is off, too.
        off = [name for name, figure in figures.items() if not figure <= self.allows(name)]
        late = next((step for step, value in enumerate(losses, start=1) if not value <= self.allows("loss")), None)
        if set(off) - {"evaluation"}:
            self.off_after = 1 if "gradients" in off else late or self.steps
        if off:
            self.first = parting_point(mine, theirs, losses, off, self)
        if differs or off:
            self.verdict = f"differs: {differs}" if differs else f"OFF: {', '.join(off)}"


def figures_between(mine: Trace, theirs: Trace, distance: Callable[[Tensors, Tensors], float]) -> dict[str, float]:
    """How far one training is from another, by COMPARED, without what the other has nothing of.

    Weights are compared by the way that they have come since the start, where that is known: a few steps hardly move
    them, and after so few even twice the learning rate leaves them nearly equal.
    """
    start = theirs.start or mine.start
    found = {
        "loss": max(relative(a, b) for a, b in zip(mine.losses, theirs.losses, strict=True)),
        "weights": distance(way(start, mine.weights), way(start, theirs.weights)),
        "buffers": distance(mine.buffers, theirs.buffers),
    }
    if theirs.gradients:
        found["gradients"] = distance(mine.gradients, theirs.gradients)
    expected = theirs.result.get("eval_loss")
    if expected is not None:  # else there is nothing to evaluate on
        found["evaluation"] = relative(mine.result["eval_loss"], expected)
    return {name: found[name] for name in COMPARED if name in found}


def rounding_of(rounded: Trace, exact: Trace, precision: str) -> dict[str, float]:
    """What rounding makes of a training: how far it is in a lower precision from the same in fp64, by COMPARED.

    A loss is one number, and may be exact by chance. Weights that are off by a share of their way move it by about that
    share of its own way. So no less is ascribed to rounding, but for more than LOSS_BITS it has to be measured.
    """
    found = figures_between(rounded, exact, vector_distance)
    losses = [*exact.losses, exact.result.get("eval_loss") or exact.losses[-1]]
    way_of_loss = relative(max(losses), min(losses))
    least = min(found["weights"] * way_of_loss, LOSS_BITS * LAST_BIT[precision])
    return found | {name: max(found[name], least) for name in ("loss", "evaluation") if name in found}


def relative(mine: float, theirs: float) -> float:
    """|a − b| / |b|."""
    return 0.0 if mine == theirs else abs(mine - theirs) / max(abs(theirs), 1e-30)


def parting_point(mine: Trace, theirs: Trace, losses: list[float], off: list[str], row: VerifyRow) -> str:
    """Where two trainings part, in words: the step, and the tensor that is furthest off.

    Args:
        losses: relative differences by step.
        off: what is off at all, of COMPARED.
    """
    late = [step for step, value in enumerate(losses, start=1) if not value <= row.allows("loss")]
    if late[:1] == [1]:
        return f"step 1: the loss, {mine.losses[0]:.10g} and not {theirs.losses[0]:.10g}"
    if "gradients" in off:
        return f"step 1: {worst('the gradient of ', mine.gradients, theirs.gradients)}"
    found = ""
    if late:
        step = late[0]
        found = f"step {step}: the loss, {mine.losses[step - 1]:.10g} and not {theirs.losses[step - 1]:.10g}; then "
    start = theirs.start or mine.start
    if "weights" in off:
        ways = way(start, mine.weights), way(start, theirs.weights)
        return f"{found}after step {row.steps}: {worst('', *ways)}"
    if "buffers" in off:
        return f"{found}after step {row.steps}: {worst('', mine.buffers, theirs.buffers)}"
    return found.removesuffix("; then ") or f"the evaluation after step {row.steps}"


def worst(what: str, mine: Tensors, theirs: Tensors) -> str:
    """The tensor that is furthest off, and by how much; or one that only one side has."""
    lonely = sorted(mine.keys() ^ theirs.keys())
    if lonely:
        return f"{what}{lonely[0]}, which only {'it' if lonely[0] in mine else 'its reference'} has"
    found = tensor_differences(mine, theirs)
    name = max(found, key=lambda each: found[each])
    return f"{what}{name}, off by {found[name]:.0e}"
