"""One distributed-training technique a file. `python -m recipes` lists them."""

import signal
import sys
from pathlib import Path

if sys.argv[0] == "-m":  # `python -m recipes.NAME` is importing: until it runs, Ctrl-C ends it without a page of frames
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    from lockstep.launch import early
    from lockstep.utils.standard_streams import protect

    protect()
    early.answer(Path(__file__).parent)

if __name__ == "recipes":  # the repository is on the path
    from lockstep.utils.places import alias

    alias("recipes")
