"""How long a recipe takes to answer a question or a mistake in its command, beside what it takes after loading torch.

    python -m benchmarks.answers [--rounds N]

`python -m recipes.ddp` answers `--help`, a misspelt key and a wrong type before torch is loaded; `python
recipes/ddp.py` is the same file without the package in front of it, and answers after its imports.
"""

import argparse
import statistics
import tempfile
from functools import partial

from benchmarks import common

QUESTIONS = {"--help": 0, "globl_batch_size=3": 2, "optim.lr=fast": 2}  # and the exit code of the answer


def rows(arguments: argparse.Namespace) -> list[common.Row]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for question, code in QUESTIONS.items():
            early = partial(common.run, ["-m", "recipes.ddp", question], folder, expected=code)
            late = partial(common.run, [common.ROOT / "recipes" / "ddp.py", question], folder, expected=code)
            ran = common.in_turn(
                {"early": lambda _, run=early: run(), "late": lambda _, run=late: run()}, arguments.rounds
            )
            mine, theirs = ([each.seconds for each in ran[name]] for name in ("early", "late"))
            note = f"{statistics.median(mine):.2f} s, {statistics.median(theirs):.2f} s"
            name = f"answer to {question}: before / after loading torch"
            found.append(common.Row(name, common.ratios(mine, theirs), 0.5, True, note))
    return found


if __name__ == "__main__":
    common.main(__doc__, rows)
