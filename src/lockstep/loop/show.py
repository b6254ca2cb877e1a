"""What a task has to show of the model that it has trained, such as text that a language model writes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lockstep.callbacks.base import CallbackContext
from lockstep.task import option
from lockstep.training.precision import autocast
from lockstep.utils.files import write_atomically


@torch.no_grad()
def show(task: Any, model: nn.Module, context: CallbackContext) -> None:
    """Put the task's `show(model)` on the console and into shown.txt; all ranks call it together.

    Args:
        model: the complete one, or this rank's shard of it, whose forward all ranks make together.
    """
    shown = option(task, "show")
    if shown is None or context.quiet:
        return
    model.eval()
    with autocast(context.config.precision, context.device):
        text = shown(model)
    if text and context.rank == 0:
        write_atomically(context.out / "shown.txt", f"{text}\n")
        for line in text.splitlines():
            context.say(f"  {line}")
