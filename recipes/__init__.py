"""One distributed-training technique a file. `python -m recipes` lists them."""

import signal
import sys

if sys.argv[0] == "-m":  # `python -m recipes.NAME` is importing: until it runs, Ctrl-C ends it without a page of frames
    signal.signal(signal.SIGINT, signal.SIG_DFL)
