"""FSDP, evaluated and exported as an average of its weights, which is sharded as they are."""

from __future__ import annotations

import torch
from torch.distributed.fsdp import fully_shard

from examples.two_optimizers import Digits, TwoOptimizersConfig
from lockstep import Run, recipe
from lockstep.training.optim import build_optimizer, build_scheduler


@recipe(config=TwoOptimizersConfig, task=Digits)
def train(run: Run[TwoOptimizersConfig]) -> None:
    model, average = run.place(run.task.build_model()), run.place(run.task.build_model())
    average.load_state_dict(model.state_dict())
    for each in (model, average):
        fully_shard(each)
    optimizer = build_optimizer(run.config.optim, model)
    scheduler = build_scheduler(run.config.optim, optimizer, run.scheduled_steps)

    for batch in run.steps(
        model=model, optimizer=optimizer, scheduler=scheduler, keep={"average": average}, whole=lambda: average
    ):
        loss = run.task.loss(model(batch.inputs), batch.targets)
        loss.backward()
        run.record(loss=loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(weight, 1 - run.config.decay)


if __name__ == "__main__":
    train.main()
