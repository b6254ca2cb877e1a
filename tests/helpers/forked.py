"""`python -m tests.helpers.forked RANKS SCRIPT WORDS`: a script on several ranks as torchrun starts it, but as copies of
this process, which has loaded torch once."""

from __future__ import annotations

import os
import runpy
import sys

import torch.distributed  # noqa: F401

from tests.helpers.processes import free_port

if __name__ == "__main__":
    ranks, script, *words = sys.argv[1:]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": ranks}
    children = []
    for rank in range(int(ranks)):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ["RANK"] = str(rank)
            sys.argv = [script, *words]
            runpy.run_path(script, run_name="__main__")
            sys.exit()
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
