"""Lightning Fabric: the loop stays yours, and Fabric wraps model, optimizer and backward for the ranks that run it.

`fabric.setup` puts DistributedDataParallel around the model, `fabric.autocast` and `fabric.backward` apply the
precision, `fabric.no_backward_sync` keeps gradients on their rank while micro-batches add up. So the ranks send what
recipes.ddp sends, and end with the same bits. Fabric could also start the ranks; these are there already, and
`lockstep.integrations.fabric` tells it who they are (to have Lightning start them: `+cluster=lightning`, for any
recipe).

Fabric has no SyncBatchNorm, though the Trainer has (https://github.com/Lightning-AI/pytorch-lightning/issues/13749).
With `sync_batchnorm=true` the layers are converted here, before `fabric.setup`. After it, they would synchronise as
well, for the converter changes their class and nothing else; but DDP would keep sending rank 0's running statistics
before every forward, and a wrapper that copies or shards what it wraps would keep the old layers.

    python -m recipes.lightning_fabric                         two ranks on this machine, or one per GPU
    python -m recipes.lightning_fabric sync_batchnorm=true     BatchNorm over the global batch

Expect: an accuracy of 0.97 or more on the digits, in about a minute on two CPU cores.
Source: https://lightning.ai/docs/fabric/stable/
"""

from dataclasses import dataclass

from lockstep import Proof, Run, recipe
from lockstep.config.keys import key
from lockstep.config.schema import Config
from lockstep.distributed.sync_batchnorm import NO_BUFFER_SYNC, convert_sync_batchnorm
from lockstep.tasks.build import require_batchnorm
from lockstep.training.accumulate import micro_batches
from lockstep.training.clip import clip_gradients
from lockstep.training.optim import build_optimizer, build_scheduler


@dataclass
class FabricConfig(Config):
    sync_batchnorm: bool = key(False, "BatchNorm over the global batch")


def check(config: FabricConfig, share: int) -> None:
    """Layers can only be synchronised where there are some."""
    if config.sync_batchnorm:
        require_batchnorm(config, "sync_batchnorm=true: ")


@recipe(
    config=FabricConfig,
    check=check,
    global_batchnorm=lambda config: config.sync_batchnorm,
    needs="lightning",
    proof=(Proof({"model.norm": "group"}), Proof({"model.norm": "batch"}, {"sync_batchnorm": True})),
    next_command="python -m recipes.ddp     the same training without Fabric, to compare with",
)
def train(run: Run[FabricConfig]) -> None:
    from lightning.fabric import Fabric
    from lightning.fabric.plugins import MixedPrecision
    from lightning.fabric.strategies import DDPStrategy

    from lockstep.integrations.fabric import PRECISION, joined, loss_scaling

    synchronised = run.config.sync_batchnorm
    model = run.place(run.task.build_model())
    if synchronised:
        model = convert_sync_batchnorm(model)
    optimizer = build_optimizer(run.config.optim, model)
    scheduler = build_scheduler(run.config.optim, optimizer, run.scheduled_steps)
    scaler = run.scaler()  # precision=fp16 needs it; else it passes everything on

    strategy = DDPStrategy(**joined(run.world), **(NO_BUFFER_SYNC if synchronised else {}))
    plugins = loss_scaling(run, scaler, MixedPrecision)  # Fabric's backward and step then scale and unscale
    fabric = Fabric(strategy=strategy, precision=PRECISION[run.config.precision], plugins=plugins)
    fabric.launch()  # the ranks are there: it starts none
    model, optimizer = fabric.setup(model, optimizer)

    for batch in run.steps(model=model, optimizer=optimizer, scheduler=scheduler):
        pieces = list(micro_batches(batch, run.config.accumulate, model))
        for number, micro in enumerate(pieces):
            # The forward belongs inside as well: it arms the hooks with which backward synchronises.
            with fabric.no_backward_sync(model, enabled=number < len(pieces) - 1):
                # The loss belongs inside: what leaves here is cast to fp32, whatever the precision.
                with fabric.autocast():
                    loss = run.task.loss(model(micro.inputs), micro.targets)
                fabric.backward(loss * micro.weight)
            run.record(loss=loss, weight=micro.weight)
        clip_gradients(model, optimizer.optimizer, scaler, run.config.gradients)  # the one that Fabric has wrapped
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    train.main()
