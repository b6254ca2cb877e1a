"""SyncBatchNorm: DDP in which BatchNorm normalises by the whole global batch, as if there were one process.

Under plain DDP every rank normalises by its own share. With 2 to 4 images per rank those statistics are noise, and the
model trains, and is evaluated with running statistics, that no single process would have seen. SyncBatchNorm has the
ranks share them: in forward, one all-gather carries each rank's mean, sum of squared deviations and count per channel,
and every rank merges them into the global mean and variance; in backward, one all-reduce carries the two sums of the
gradient that the derivative through those statistics needs. Two small collectives a layer and step, and the result is
the single process's, exactly. With large shares it only costs time. `lockstep.distributed.sync_batchnorm` holds the
derivation.

    python -m recipes.sync_batchnorm                     the digits, synchronised
    python -m recipes.sync_batchnorm demonstrate=true    2 images per rank: with, without, and one process, side by side

Expect: an accuracy of 0.97 or more on the digits, in one to two minutes on two CPU cores.
Source: https://arxiv.org/abs/1502.03167 (BatchNorm), https://arxiv.org/abs/1803.08904 (synchronising it)
"""

from dataclasses import dataclass

from torch.nn.parallel import DistributedDataParallel

from lockstep import Proof, Run, recipe
from lockstep.config.copies import with_values
from lockstep.config.keys import key
from lockstep.config.schema import Config
from lockstep.distributed.sync_batchnorm import NO_BUFFER_SYNC, convert_sync_batchnorm
from lockstep.tasks.build import require_batchnorm
from lockstep.training.accumulate import micro_batches
from lockstep.training.clip import clip_gradients
from lockstep.training.optim import build_optimizer, build_scheduler
from lockstep.utils.tables import terminal_tables
from lockstep.verify.trace import difference, trace


@dataclass
class SyncBatchNormConfig(Config):
    demonstrate: bool = key(False, "2 images per rank, with and without, beside one process")


def check(config: SyncBatchNormConfig, share: int) -> None:
    """There must be something to synchronise."""
    require_batchnorm(config, "")


@recipe(
    config=SyncBatchNormConfig,
    proof=Proof({"model.norm": "batch"}),
    global_batchnorm=True,
    check=check,
    next_command="python -m recipes.sync_batchnorm demonstrate=true     what it is good for, in numbers",
)
def train(run: Run[SyncBatchNormConfig]) -> None:
    if run.config.demonstrate:
        demonstrate(run)
        return
    model = run.place(run.task.build_model())
    model = convert_sync_batchnorm(model)  # before the wrap: DDP hooks the parameters it finds
    # The running statistics are equal on all ranks already: rank 0 need not broadcast them before every forward.
    model = DistributedDataParallel(model, device_ids=run.device_ids, gradient_as_bucket_view=True, **NO_BUFFER_SYNC)
    optimizer = build_optimizer(run.config.optim, model)
    scheduler = build_scheduler(run.config.optim, optimizer, run.scheduled_steps)
    scaler = run.scaler()  # precision=fp16 needs it; else it passes everything on

    for batch in run.steps(model=model, optimizer=optimizer, scheduler=scheduler):
        for micro in micro_batches(batch, run.config.accumulate, model):  # one, unless accumulate=N
            with run.autocast():
                loss = run.task.loss(model(micro.inputs), micro.targets)
            scaler.scale(loss * micro.weight).backward()
            run.record(loss=loss, weight=micro.weight)
        clip_gradients(model, optimizer, scaler, run.config.gradients)
        scaler.step(optimizer)  # unscales the gradients, unless that is done; if one is not finite, no rank updates
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()


def demonstrate(run: Run[SyncBatchNormConfig]) -> None:
    """2 images per rank, for 60 steps: one process on the whole batch, and the ranks with and without synchronising."""
    from lockstep.recipes import ddp, single

    values = {"global_batch_size": 2 * run.world.world_size, "max_steps": 60, "log_every": 1, "eval_every": 0}
    calm = {
        "model.image_size": 16,
        "optim.lr": 0.01,
        "optim.momentum": 0.0,
        "optim.schedule": "constant",
        "optim.warmup_steps": 0,
    }
    config = with_values(run.config, values | calm | {"precision": "fp64", "demonstrate": False})
    variants = {"one process": single.train, "synchronised": train, "each rank alone": ddp.train}
    traces = {name: trace(run, each, config, name.replace(" ", "-")) for name, each in variants.items()}
    reference = traces["one process"]
    if reference is None:
        return  # not rank 0
    rows = {name: found for name, found in traces.items() if found is not None}
    columns = {"BatchNorm": list(rows)}
    for step in (1, 20, 60):
        columns[f"loss {step}"] = [f"{found.losses[step - 1]:.3f}" for found in rows.values()]
    columns["buffers off by"] = [f"{difference(found.buffers, reference.buffers):.1e}" for found in rows.values()]
    columns["accuracy"] = [f"{found.result['eval_accuracy']:.1%}" for found in rows.values()]
    columns["ms per step"] = [f"{1000 * found.result['step_seconds_p50']:.0f}" for found in rows.values()]
    title = f"{config.global_batch_size} images per step, 2 per rank; the loss after 1, 20 and {config.max_steps} steps"
    run.report.console.print(*terminal_tables(title, columns, text=("BatchNorm",)), sep="\n")


if __name__ == "__main__":
    train.main()
