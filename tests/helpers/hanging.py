"""A recipe whose rank WHO goes wrong after two steps in the way that the variable HOW says. Its model is one layer."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from lockstep import Run, recipe


@recipe
def train(run: Run) -> None:
    how = os.environ["HOW"] if run.world.rank == int(os.environ["WHO"]) else ""
    layers = [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 11 if how == "shape" else 10)]
    model = DistributedDataParallel(run.place(nn.Sequential(*layers)))
    optimizer = SGD(model.parameters(), lr=0.01)
    if how == "one step less":
        run.total_steps -= 1
    if how == "one batch less":
        whole = run.batches
        run.batches = lambda start, stop: whole(start, stop - 1)  # type: ignore[method-assign]
    for batch in run.steps(model=model, optimizer=optimizer):
        if run.step == 2:
            go_wrong(how)
        if run.step == 2 and how == "skip":
            continue
        loss = cross_entropy(model(batch.inputs), batch.targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.record(loss=loss)


def go_wrong(how: str) -> None:
    if how == "sleep":
        time.sleep(600)
    if how == "slow everywhere" or os.environ["HOW"] == "slow everywhere":
        while "the run continues" not in Path(os.environ["SAID"]).read_text():
            time.sleep(0.1)
    if how == "exit":
        os._exit(0)
    if how == "raise":
        raise KeyError("the cause")
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "other":
        dist.broadcast(torch.zeros(500), src=1)
    if how == "group":
        time.sleep(600)
    if os.environ["HOW"] == "group":
        dist.new_group()
    if how == "worker dies":
        multiprocessing.active_children()[0].kill()
    if how == "worker hangs":
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGSTOP)
    if how == "disk":
        os.fsync = lambda file: time.sleep(600)  # type: ignore[assignment]


if __name__ == "__main__":
    train.main()
