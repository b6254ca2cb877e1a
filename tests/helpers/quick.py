"""`python -m tests.helpers.quick recipes.NAME WORDS` (or FILE.py WORDS): the command of a recipe, in seconds instead of tens of them.

The model is a narrow one, and on emulated GPUs, which a copied process can use, the ranks are copies of this process.
With HASTY=1 the host never waits for a GPU, though it says that it does: a fault to be found. With LINGER=1 a rank that
leaves keeps its connections, so that no other rank notices, as none does over NCCL.
"""

from __future__ import annotations

import os
import runpy
import sys
import time

import torch
from torchvision.models import resnet

from tests.helpers.narrow_resnet import narrow_resnet18

if __name__ == "__main__":
    from lockstep.launch import cli

    resnet.resnet18 = narrow_resnet18
    if "EMULATED_GPUS" in os.environ:
        cli.how_to_start = lambda config, device, launcher: {"start": "fork"} if hasattr(launcher, "STARTS") else {}
    if "HASTY" in os.environ:
        torch.cuda.synchronize = lambda device=None: None
        torch.cuda.Stream.synchronize = torch.cuda.Event.synchronize = lambda self: None
    if "LINGER" in os.environ:
        os._exit = lambda code: time.sleep(3600)  # type: ignore[assignment]
    sys.argv = sys.argv[1:]
    if sys.argv[0].endswith(".py"):
        sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
