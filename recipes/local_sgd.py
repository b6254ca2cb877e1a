"""Local SGD and DiLoCo: every rank trains a replica by itself, and they are brought together every `period` steps.

DDP's ranks talk in every step, for they average gradients. Here each rank takes `period` steps of its own, on its own
share of the batches, with its own gradients and its own optimizer's state. Then the replicas' weights θ_r are averaged:

    outer=average     all continue from the mean of the θ_r (local SGD)
    outer=nesterov    the mean of θ − θ_r, how far they have moved from where they were together, is taken for a gradient
                      at θ, and SGD with Nesterov's momentum makes one step with it: the new θ of all (DiLoCo)

One all-reduce of the W bytes of the weights in `period` steps: each of n ranks sends 2 (n − 1) / n · W / period bytes a
step, DDP's divided by the period. `fragments=F` deals the layers into F parts which take turns, each still once in a
period: as many bytes, but never more than W / F at once (streaming DiLoCo, without its overlap and its 4-bit numbers).

It is not DDP's training: the replicas drift apart in between. With period=1, outer=average and an inner SGD it is, for
the mean of the updates is then the update by the mean gradient; AdamW divides by each replica's own moments, and clipping
looks at each replica's own gradients, so they come close alone.

Choose it where the ranks are far apart (other data centres, plain Ethernet) and DDP would wait for its all-reduces; DDP
elsewhere. Periods of 50 to 500 are usual for large models; the smaller the data, the shorter it should be. What is
evaluated and exported is the mean of the replicas. A checkpoint holds each of them, and as many ranks resume it.

    python -m recipes.local_sgd                                            two replicas, a synchronisation in 8 steps
    python -m recipes.local_sgd period=64 outer=nesterov fragments=4 optim=adamw task=language

Expect: the accuracy of recipes.ddp, 0.97 or more on the digits, in about a minute on two CPU cores.
Source: https://arxiv.org/abs/1805.09767 (local SGD), https://arxiv.org/abs/2311.08105 (DiLoCo),
https://arxiv.org/abs/2501.18512 (fragments)
"""

from dataclasses import dataclass

from lockstep import Proof, Run, UserError, recipe
from lockstep.config.keys import key
from lockstep.config.schema import Config
from lockstep.parallel.outer_optimizer import OuterOptimizer
from lockstep.training.accumulate import micro_batches
from lockstep.training.clip import clip_gradients
from lockstep.training.optim import build_optimizer, build_scheduler


@dataclass
class LocalSgdConfig(Config):
    period: int = key(8, "steps that replicas train apart before they are brought together", minimum=1)
    outer: str = key(
        "average", "what brings them together: their mean, or a step of Nesterov's SGD", ("average", "nesterov")
    )
    outer_lr: float | None = key(None, "outer=nesterov: its learning rate; null: 0.7", minimum=0)
    outer_momentum: float | None = key(None, "outer=nesterov: its momentum; null: 0.9", minimum=0)
    fragments: int = key(1, "parts of the weights that are brought together in different steps", minimum=1)

    @property
    def steps_between_exchanges(self) -> int:
        return self.period


def check(config: LocalSgdConfig, share: int) -> None:
    """Refuse what would be ignored, and parts that would have to share a step."""
    for name in ("outer_lr", "outer_momentum"):
        if config.outer == "average" and getattr(config, name) is not None:
            raise UserError(
                f"{name}={getattr(config, name)}: outer=average has none; leave it out, or set outer=nesterov"
            )
    if config.outer_momentum is not None and config.outer_momentum >= 1:
        raise UserError(f"outer_momentum={config.outer_momentum}: never forgets; allowed are 0 up to, without, 1")
    if config.fragments > config.period:
        raise UserError(
            f"fragments={config.fragments}: allowed are 1…{config.period}, a step each; set a larger period"
        )


@recipe(
    config=LocalSgdConfig,
    check=check,
    local_updates=True,
    proof=Proof(
        {"model.norm": "group", "optim.name": "sgd", "optim.lr": 0.05},
        {"period": 1},
        {"model.norm": "batch"},
        "BatchNorm normalises by each rank's share",
    ),
    next_command="python -m recipes.ddp     replicas that agree in every step: compare the accuracy, and the traffic",
)
def train(run: Run[LocalSgdConfig]) -> None:
    model = run.place(run.task.build_model())  # the same on all ranks; not wrapped: no gradient leaves its rank
    optimizer = build_optimizer(run.config.optim, model)
    scheduler = build_scheduler(run.config.optim, optimizer, run.scheduled_steps)
    scaler = run.scaler()  # precision=fp16 needs it; else it passes everything on
    outer = OuterOptimizer(model, run.config.period, *settings(run.config), run.config.fragments)

    for batch in run.steps(
        model=model, optimizer=optimizer, scheduler=scheduler, keep={"outer": outer}, whole=outer.mean
    ):
        for micro in micro_batches(batch, run.config.accumulate, model):  # one, unless accumulate=N
            with run.autocast():
                loss = run.task.loss(model(micro.inputs), micro.targets)
            scaler.scale(loss * micro.weight).backward()
            run.record(loss=loss, weight=micro.weight)
        clip_gradients(model, optimizer, scaler, run.config.gradients)  # by the norm of this replica's own
        scaler.step(optimizer)  # unscales the gradients, unless that is done; if one is not finite, no rank updates
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
        outer.step()  # talks to the other ranks in every period-th step, and never else


def settings(config: LocalSgdConfig) -> tuple[float, float]:
    """Learning rate and momentum of the outer step. Of 1 and 0, it gives the mean."""
    if config.outer == "average":
        return 1.0, 0.0
    lr, momentum = config.outer_lr, config.outer_momentum
    return 0.7 if lr is None else lr, 0.9 if momentum is None else momentum


if __name__ == "__main__":
    train.main()
