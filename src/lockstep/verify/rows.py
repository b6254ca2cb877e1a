"""One row of recipes.verify's table: how far a recipe's training is from recipes.single's, and the verdict."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep.verify.trace import Trace, angle, difference

TOLERANCES = {"fp64": 1e-10, "fp32": 1e-2, "bf16": 1e-1, "fp16": 1e-1}  # by precision
COMPARED = ("loss", "gradients", "weights", "buffers", "evaluation")


@dataclass
class VerifyRow:
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

    def __post_init__(self) -> None:
        self.tolerance = self.tolerance or TOLERANCES[self.precision]

    @property
    def label(self) -> str:
        """The recipe, and the proof where it has several."""
        return f"{self.recipe} {self.variant}".strip()

    @property
    def fails(self) -> bool:
        return self.verdict.startswith("OFF")

    def compare(self, mine: Trace, theirs: Trace, differs: str = "") -> None:
        """Fill in the numbers and the verdict.

        Args:
            differs: why these settings make another computation, where they do.
        """
        self.loss = max(abs(a - b) / abs(b) for a, b in zip(mine.losses, theirs.losses, strict=True))
        distance = difference if self.precision == "fp64" else angle
        self.gradients = distance(mine.gradients, theirs.gradients)
        self.weights = distance(mine.weights, theirs.weights)
        self.buffers = distance(mine.buffers, theirs.buffers)
        expected = theirs.result["eval_loss"]
        self.evaluation = abs(mine.result["eval_loss"] - expected) / expected
        # Written so that a number which is not one is off, too.
        off = [name for name in COMPARED if not getattr(self, name) <= self.tolerance]
        if differs or off:
            self.verdict = f"differs: {differs}" if differs else f"OFF: {', '.join(off)}"
