"""DistributedDataParallel: a process per device, each with the whole model and its share of every batch.

Rank r computes the gradients of its global_batch_size / world_size images. While the backward pass is still running, DDP
all-reduces the gradients that are ready, bucket by bucket: every rank sends its bucket around, and all of them end
with the mean over ranks. The shares are equal, so that mean is the gradient of the mean loss over the global batch,
and since all ranks start with the same weights and apply the same update, they stay equal without ever sending a
weight. BatchNorm is the exception: each rank normalises by its own share (`model.norm=group` does not, and then this
recipe computes exactly what recipes.single does).

A gradient lies in its bucket (gradient_as_bucket_view), or there would be a second copy of all of them, and a copying
back after each all-reduce.

With comm=bf16 or fp16 gradients travel in 16 bits: half the bytes, where the link and not the adding up is what takes
the time, for a mean that is rounded.

    python -m recipes.ddp                              two ranks on this machine, or one per GPU
    torchrun --nproc-per-node=2 -m recipes.ddp         the same run, started by hand

Expect: ResNet-18 reaches an accuracy of 0.97 or more on scikit-learn's digits, in about a minute on two CPU cores.
Source: https://arxiv.org/abs/2006.15704 (the design and the bucketing)
"""

from dataclasses import dataclass

from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from lockstep import Proof, Run, recipe
from lockstep.config.keys import key
from lockstep.config.schema import Config
from lockstep.training.accumulate import micro_batches
from lockstep.training.clip import clip_gradients
from lockstep.training.optim import build_optimizer, build_scheduler


@dataclass
class DdpConfig(Config):
    comm: str = key(
        "fp32", "what gradients travel between ranks in; bf16, fp16: half the bytes", ("fp32", "bf16", "fp16")
    )


COMPRESS = {"bf16": bf16_compress_hook, "fp16": fp16_compress_hook}  # round a bucket, all-reduce it, widen it again


@recipe(
    config=DdpConfig,
    proof=Proof(
        {"model.norm": "group"}, differs={"model.norm": "batch"}, because="BatchNorm normalises by each rank's share"
    ),
    next_command="python -m recipes.single     the same training in one process, to compare with",
)
def train(run: Run[DdpConfig]) -> None:
    model = run.place(run.task.build_model())
    model = DistributedDataParallel(model, device_ids=run.device_ids, gradient_as_bucket_view=True)
    if run.config.comm in COMPRESS:
        model.register_comm_hook(None, COMPRESS[run.config.comm])
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


if __name__ == "__main__":
    train.main()
