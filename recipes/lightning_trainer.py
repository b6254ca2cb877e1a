"""Lightning's Trainer: the loop is Lightning's, and yours are the model, the loss, the optimizer and the data.

`Trainer.fit` runs the epochs. For every micro-batch it calls `training_step` through DistributedDataParallel, then
backward, and after the last one of a batch the optimizer and the schedule; `validation_step` it calls where an
epoch ends. So the ranks send what recipes.ddp sends, and end with the same bits. What a run adds comes in at
Lightning's own extension points, each a class in `lockstep.integrations.lightning_trainer`: which ranks there are
(ClusterEnvironment), what happens between two steps (Callback), checkpoints that are complete or not there
(CheckpointIO), BatchNorm over all ranks (LayerSync).

Three things that a Trainer gets wrong if left alone. `accumulate_grad_batches=N` divides each loss by N, so a smaller
last micro-batch counts too much: here each loss is weighted by its share. Validation with a DistributedSampler pads, so
some images count twice, and averages of averages are not the average: here ranks add up sums, over images that are
counted once. A checkpoint within an epoch remembers no place in the data and no random numbers: here the order of the
data follows from the step, and each rank's generators are saved, so a run that goes on ends with the same bits.

`Trainer(sync_batchnorm=True)` needs GPUs, for it takes torch's layer; with `sync_batchnorm=true` here it is lockstep's.

    python -m recipes.lightning_trainer                         two ranks on this machine, or one per GPU
    python -m recipes.lightning_trainer sync_batchnorm=true     BatchNorm over the global batch

Expect: an accuracy of 0.97 or more on the digits, in about a minute on two CPU cores.
Source: https://lightning.ai/docs/pytorch/stable/common/trainer.html
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lockstep import Proof, Run, recipe
from lockstep.config.keys import key
from lockstep.config.schema import Config
from lockstep.data.batch import Batch
from lockstep.tasks.build import require_batchnorm
from lockstep.training.accumulate import MicroBatch
from lockstep.training.clip import clip_gradients
from lockstep.training.optim import build_optimizer, build_scheduler


@dataclass
class TrainerConfig(Config):
    sync_batchnorm: bool = key(False, "BatchNorm over the global batch")


def check(config: TrainerConfig, share: int) -> None:
    """Layers can only be synchronised where there are some."""
    if config.sync_batchnorm:
        require_batchnorm(config, "sync_batchnorm=true: ")


@recipe(
    config=TrainerConfig,
    check=check,
    global_batchnorm=lambda config: config.sync_batchnorm,
    needs="lightning",
    proof=(Proof({"model.norm": "group"}, {"accumulate": 4}), Proof({"model.norm": "batch"}, {"sync_batchnorm": True})),
    next_command="python -m recipes.lightning_fabric     the same help from Lightning, with the loop in your hands",
)
def train(run: Run[TrainerConfig]) -> None:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.plugins import MixedPrecision

    from lockstep.integrations.fabric import PRECISION, loss_scaling
    from lockstep.integrations.lightning_trainer import DDP, EvalBatches, RunHooks, SyncBatchNormPlugin, TrainBatches

    model = run.place(run.task.build_model())

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, inputs: Any) -> Any:
            return self.model(inputs)

        def transfer_batch_to_device(self, batch: Any, *others: Any) -> Any:
            return batch  # it is there already

        def configure_optimizers(self) -> Any:
            optimizer = build_optimizer(run.config.optim, model)
            scheduler = build_scheduler(run.config.optim, optimizer, run.scheduled_steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

        def configure_gradient_clipping(self, optimizer: Optimizer, *limits: Any, **others: Any) -> None:
            clip_gradients(model, optimizer, None, run.config.gradients)  # Lightning has unscaled them

        def training_step(self, micro: MicroBatch) -> Tensor:
            loss = run.task.loss(self(micro.inputs), micro.targets)
            run.record(loss=loss, weight=micro.weight)
            # Lightning divides by this number, as if all micro-batches were equally large.
            return loss * micro.weight * self.trainer.accumulate_grad_batches

        def on_validation_epoch_start(self) -> None:
            self.tally = run.loop.evaluator.tally()

        def validation_step(self, batch: Batch) -> None:
            self.tally.add(self(batch.inputs), batch)

        def on_validation_epoch_end(self) -> None:
            self.evaluation = self.tally.result(run.device)

    module, batches = Module(), TrainBatches(run)
    scaling = loss_scaling(run, run.scaler(), MixedPrecision)
    hooks = RunHooks(run, module, batches)
    trainer = Trainer(
        strategy=DDP(run.world),
        precision=PRECISION[run.config.precision],
        plugins=[hooks.files_of_the_trainer, *scaling, *([SyncBatchNormPlugin()] if run.config.sync_batchnorm else [])],
        callbacks=[hooks],
        accumulate_grad_batches=batches.pieces,
        max_epochs=run.config.epochs,
        max_steps=run.total_steps,
        val_check_interval=batches.between_evaluations,
        check_val_every_n_epoch=None,  # or the line before would count within an epoch
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # the batches that it is given are this rank's already
        detect_anomaly=run.config.detect_anomaly,
        default_root_dir=run.out,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches, EvalBatches(run), ckpt_path=hooks.ckpt_path)


if __name__ == "__main__":
    train.main()
