"""A recipe as a user writes one: parameter groups and a schedule of its own, on one rank, under DDP or in shards.

Biases and norms have a learning rate of their own and no weight decay, and StepLR halves both rates every three steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, StepLR

from lockstep import Run, recipe
from lockstep.config.keys import key
from lockstep.config.schema import Config
from lockstep.training.accumulate import micro_batches


@dataclass
class OwnConfig(Config):
    wrap: str = key("ddp", "what shares the work among the ranks", ("none", "ddp", "fsdp"))


def own_optimizer(model: nn.Module, lr: float) -> Optimizer:
    """AdamW with two groups of parameters."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices}, {"params": others, "lr": 3 * lr, "weight_decay": 0.0, "betas": (0.8, 0.99)}]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=0.1)


def own_schedule(optimizer: Optimizer) -> LRScheduler:
    return StepLR(optimizer, step_size=3, gamma=0.5)


@recipe(config=OwnConfig)
def train(run: Run[OwnConfig]) -> None:
    model: Any = run.place(run.task.build_model())
    if run.config.wrap == "ddp":
        model = DistributedDataParallel(model, device_ids=run.device_ids, gradient_as_bucket_view=True)
    elif run.config.wrap == "fsdp":
        for name in run.blocks(model):
            fully_shard(model.get_submodule(name))
        fully_shard(model)
    optimizer = own_optimizer(model, run.config.optim.lr)
    scheduler = own_schedule(optimizer)
    scaler = run.scaler()
    for batch in run.steps(model=model, optimizer=optimizer, scheduler=scheduler):
        for micro in micro_batches(batch, run.config.accumulate, model):
            with run.autocast():
                loss = run.task.loss(model(micro.inputs), micro.targets)
            scaler.scale(loss * micro.weight).backward()
            run.record(loss=loss, weight=micro.weight)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
