"""What others have published that a model learns, it learns here: MNIST-1D, by a task of one's own.

The README that is part of the package says what is reached: 32 % by logistic regression, 94 % by a small CNN.
"""

from __future__ import annotations

import re
from importlib.metadata import metadata
from pathlib import Path

import pytest

from recipes import ddp
from tests.helpers import one_dimensional_digits
from tests.helpers.harness import execute, result

WITHIN = 0.02  # 20 of the 1,000 signals to evaluate on
WORDS = ("global_batch_size=100", "optim=adam", "optim.lr=0.02", "optim.weight_decay=0", "eval_every=0", "seed=0")


def published(model: str) -> float:
    """The accuracy on MNIST-1D, from the table of models in the README."""
    text = metadata("mnist1d").get_payload()
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("|")]
    names = next(row for row in rows if "MLP" in row)
    (reached,) = [row for row in rows if row[1] == "MNIST-1D"]
    return int(re.match(r"(\d+)%", reached[names.index(model)])[1]) / 100  # type: ignore[index]


@pytest.mark.soak
@pytest.mark.parametrize(("ours", "theirs", "epochs"), [("linear", "Logistic regression", 15), ("cnn", "CNN", 60)])
def test_a_model_learns_as_much_as_is_published(ours: str, theirs: str, epochs: int, tmp_path: Path) -> None:
    one_dimensional_digits.digits()
    task = f"task={one_dimensional_digits.__file__}:Mnist1d"
    execute(ddp.train, tmp_path, 2, task, f"task.model={ours}", f"epochs={epochs}", *WORDS, timeout=400)
    assert result(tmp_path)["eval_accuracy"] == pytest.approx(published(theirs), abs=WITHIN)
