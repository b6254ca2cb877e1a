"""One distributed-training technique a file. `python -m recipes` lists them."""

import signal
import sys
from pathlib import Path

TOOLS = {"compare", "doctor", "tune", "verify"}  # run recipes, and are none themselves
DEMONSTRATIONS = {"checkpoint_resume"}  # have a loop of their own: there is nothing to compare

if sys.argv[0] == "-m":  # `python -m recipes.NAME` is importing: until it runs, Ctrl-C ends it without a page of frames
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    from lockstep.launch import early

    early.answer(Path(__file__).parent)


def choose(names: list[str] | None) -> list[str]:
    """The recipes a tool is to run: those that are named, or all.

    Raises:
        UserError: a name is not one of them.
    """
    every = sorted({path.stem for path in Path(__file__).parent.glob("[!_]*.py")} - TOOLS - DEMONSTRATIONS)
    wrong = [name for name in names or [] if name not in every]
    if wrong:
        from lockstep import UserError  # loads torch, for which a mere listing of the recipes need not wait

        raise UserError(f"recipes=[{','.join(wrong)}]: no such recipe; allowed are {', '.join(every)}")
    return names or every
