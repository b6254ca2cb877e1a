"""What ties Lightning's Trainer to a Run: its hooks to what happens between two steps, its checkpoints to ours.

The Trainer drives: it fetches batches, takes steps, validates, and knows how to save and restore all of that. The run
keeps what it keeps for every recipe: when to save, evaluate and leave, what is logged, where things are written. Each
of Lightning's extension points that this takes has one class here. Imported only by what uses Lightning, which takes
seconds to load.
Source: https://lightning.ai/docs/pytorch/stable/extensions/plugins.html,
https://lightning.ai/docs/pytorch/stable/extensions/callbacks.html
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins import CheckpointIO, LayerSync
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lockstep.config.schema import GradientsConfig
from lockstep.data.batch import Batch
from lockstep.distributed.process_group import World
from lockstep.distributed.sync_batchnorm import NO_BUFFER_SYNC, convert_sync_batchnorm
from lockstep.integrations.fabric import joined
from lockstep.run import Run
from lockstep.training.accumulate import MicroBatch, micro_batches
from lockstep.training.clip import clips, register_clip_pre_hook
from lockstep.training.evaluate import sync_buffers
from lockstep.training.local_gradients import LocalGradients
from lockstep.training.optim import WarmupLR
from lockstep.training.random_state import generators, set_generators

TRAINER_FILE = "trainer.ckpt"

warnings.filterwarnings("ignore", module=r"lightning\.")  # advice on what the run has decided


class DDP(DDPStrategy):
    """Lightning's DDP on the ranks that are there, which restores a checkpoint when the model is wrapped already.

    Without DDP's broadcast of running statistics before each forward, validation's too: ranks need not have equally
    many validation batches. Training does not read those statistics, and where they are read they are rank 0's.
    """

    restore_checkpoint_after_setup = True

    def __init__(self, world: World) -> None:
        super().__init__(**joined(world), **NO_BUFFER_SYNC)


class SyncBatchNormPlugin(LayerSync):
    """BatchNorm over the batches of all ranks, on CPU too; in place of `Trainer(sync_batchnorm=True)`."""

    def apply(self, model: nn.Module) -> nn.Module:
        self._classes = [(layer, type(layer)) for layer in model.modules()]
        return convert_sync_batchnorm(model)

    def revert(self, model: nn.Module) -> nn.Module:
        for layer, kind in self._classes:
            layer.__class__ = kind
        return model


class TrainBatches:
    """This rank's micro-batches, an epoch an iteration; a run that goes on within an epoch begins with the rest of it.

    Attributes:
        pieces: micro-batches per step: `accumulate`, or a few less where chunk's rounding up makes fewer do.
        between_evaluations: micro-batches from one evaluation to the next.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._batches: Iterator[Batch] | None = None
        self.pieces = len(torch.empty(run.config.global_batch_size // run.shards).chunk(run.config.accumulate))
        epochs = run.config.eval_every or run.config.epochs + 1  # 0: not before the end, which RunHooks sees to
        self.between_evaluations = epochs * len(self)

    def __len__(self) -> int:
        return self._run.steps_per_epoch * self.pieces

    def __iter__(self) -> Iterator[MicroBatch]:
        run = self._run
        if self._batches is None:  # of all epochs: workers go on working across the end of one
            self._batches = run.batches(run.step, run.total_steps)
        for _ in range(run.step % run.steps_per_epoch, run.steps_per_epoch):
            yield from micro_batches(next(self._batches), run.config.accumulate, nn.Identity())

    def state_dict(self) -> dict[str, Any]:
        """Nothing, since the order of the samples follows from the step: by having it, this says it can go on."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class EvalBatches:
    """This rank's share of the evaluation set, unpadded. Without a length: a rank with no batch must take part."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def __iter__(self) -> Iterator[Batch]:
        return self._run.data.eval_batches(self._run.data.eval_sampler())


class CheckpointBytes(CheckpointIO):
    """Hands the Trainer's checkpoint over as bytes, on rank 0: the run makes a file of a checkpoint of them.

    A file is read as tensors and plain values, never as code.
    """

    def __init__(self) -> None:
        self.files: dict[str, memoryview] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        self.files = {str(path): buffer.getbuffer()}

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        return dict(torch.load(path, map_location="cpu", weights_only=True))

    def remove_checkpoint(self, path: Any) -> None:
        raise NotImplementedError("the run decides which checkpoints are kept")


def put_at_step(counts: dict[str, Any], step: int, steps_per_epoch: int, pieces: int) -> None:
    """Make a fit loop's saved counts those of the moment after a step's last micro-batch.

    Source: lightning/pytorch/loops/progress.py (what is counted), training_epoch_loop.py (how it goes on from there).
    """
    epoch, within = divmod(step - 1, steps_per_epoch)
    batches = counts["epoch_loop.batch_progress"]
    batches["is_last_batch"] = within + 1 == steps_per_epoch
    updates = counts["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    for span, steps in (("total", step), ("current", within + 1)):
        done = steps * pieces
        batches[span] = {"ready": done, "started": done, "processed": done, "completed": done - 1}
        updates[span] = {"ready": steps, "completed": steps}
        counts["epoch_progress"][span] = {
            "ready": epoch + 1,
            "started": epoch + 1,
            "processed": epoch,
            "completed": epoch,
        }


class TrainerGradients(LocalGradients):
    """Gradients under the Trainer, which runs backward inside optimizer.step: the optimizer's own hook comes before it.

    Args:
        calls: what `on_before_optimizer_step` is to call, after backward and, under fp16, unscaling.
    """

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, calls: list[Callable[[], None]], config: GradientsConfig
    ) -> None:
        super().__init__(module, optimizer)
        self._calls, self._config = calls, config

    def before_update(self, call: Callable[[], None]) -> None:
        if clips(self._config):
            register_clip_pre_hook(self._module, call)
        else:
            self._calls.append(call)


class RunHooks(Checkpoint):
    """Calls the run where the Trainer's loop is between two steps, and is the run's Engine.

    It stands in the place of a ModelCheckpoint, whose class it shares: that one saves before an evaluation, by each
    rank's own clock, and knows nothing of a signal.

    Args:
        module: what is trained; its `model` is evaluated and exported, its `evaluation` an evaluation's result.
        batches: what it is trained on.

    Attributes:
        ckpt_path: for `trainer.fit(ckpt_path=...)`: the checkpoint to go on from, if there is one.
        files_of_the_trainer: a plugin for the Trainer.

    Raises:
        NothingLeft: the run had taken its last step already.
    """

    name = "lightning"

    def __init__(self, run: Run, module: LightningModule, batches: TrainBatches) -> None:
        self._run, self._loop = run, run.loop
        self._model, self._pieces = module.get_submodule("model"), batches.pieces
        self.ckpt_path: Path | None = None
        self.files_of_the_trainer = CheckpointBytes()
        self._calls: list[Callable[[], None]] = []
        self._loop.restore(self._model, engine=self)
        if self.ckpt_path and run.step >= run.total_steps:  # the Trainer would not even restore
            saved, configured = self.files_of_the_trainer.load_checkpoint(self.ckpt_path), module.configure_optimizers()
            module.load_state_dict(saved["state_dict"])
            configured["optimizer"].load_state_dict(saved["optimizer_states"][0])
            self._loop.begin(configured["optimizer"], self._model)
        self._generators = generators(run.device)

    # Between two steps

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = trainer
        # Signals have one owner, the run's Listener. Lightning would put a handler before it that talks to the other
        # ranks from within, and ask them about signals before each batch; no argument keeps it from either.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Lightning would go on with the counts and the learning rates of the run that saved. Those of this run follow
        # from its step, with its own batch size, micro-batches, ranks and optim.*, which may be others.
        put_at_step(checkpoint["loops"]["fit_loop"], self._run.step, self._run.steps_per_epoch, self._pieces)
        scheduler = trainer.lr_scheduler_configs[0].scheduler
        if isinstance(scheduler, WarmupLR):  # another's state is what it was
            scheduler.set_step(self._run.step)
            checkpoint["optimizer_states"][0]["param_groups"] = trainer.optimizers[0].state_dict()["param_groups"]
            checkpoint["lr_schedulers"][0] = scheduler.state_dict()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.ckpt_path:  # what this computes is overwritten with what is in there
            assert trainer.strategy.model is not None
            self._loop.restore_bucket_order(trainer.strategy.model)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        set_generators(self._generators, self._run.device)  # whatever Lightning has drawn since
        assert trainer.strategy.model is not None
        self._loop.begin(trainer.optimizers[0], trainer.strategy.model)
        self._before_step(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        for call in self._calls:
            call()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if self._loop.after_step():
            # It follows at once: val_check_interval says so, or that it is all over, which Lightning validates too.
            trainer.should_stop = self._run.step == self._run.total_steps
        else:
            self._before_step(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._run.shards > 1:
            sync_buffers(self._model)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._loop.evaluated(pl_module.evaluation)  # type: ignore[arg-type]
        self._before_step(trainer)

    def _before_step(self, trainer: Trainer) -> None:
        trainer.should_stop = not self._loop.before_step()

    # An Engine

    def files(self) -> Mapping[str, memoryview]:
        self.files_of_the_trainer.files = {}
        self._trainer.save_checkpoint(TRAINER_FILE)
        return self.files_of_the_trainer.files

    def restore(self, folder: Path, same_ranks: bool) -> None:
        self.ckpt_path = folder / TRAINER_FILE  # the Trainer reads it when there is an optimizer to restore

    def load(self, weights: dict[str, Tensor]) -> None:
        self._model.load_state_dict(weights)

    def weights(self, folder: Path) -> dict[str, Tensor]:
        saved = self.files_of_the_trainer.load_checkpoint(folder / TRAINER_FILE)["state_dict"]
        return {name.removeprefix("model."): tensor for name, tensor in saved.items()}

    def parts(self, module: nn.Module, optimizer: Optimizer) -> LocalGradients:
        return TrainerGradients(module, optimizer, self._calls, self._run.config.gradients)
