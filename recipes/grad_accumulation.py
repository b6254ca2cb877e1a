"""Gradient accumulation: a batch too large for the memory, in micro-batches whose gradients add up before the update.

backward() adds to .grad, so running it once a micro-batch and updating once at the end gives the batch's gradient, if
each piece counts for what it is: a mean loss over n of N samples is weighted by n / N. (Without a weight the gradient is
as many times too large as there are pieces; 1 / pieces is wrong as soon as the last piece is ragged.) Only one piece's
activations are alive at a time. Under DDP every backward would all-reduce; `no_sync` keeps the gradients on the rank
until the last piece, so that they cross the network once a step. BatchNorm sees micro-batches, not the batch.

Two ways to cut, `accumulate_by=chunk` and `accumulate_by=unbind`. Both are views that copy nothing. (`unbind` takes a
tensor, so `unbind(batch.chunk(n))`, found in many notes, raises a TypeError: chunk returns a tuple.)

    python -m recipes.grad_accumulation accumulate=4

Expect: an accuracy of 0.97 or more on the digits, in about two minutes on two CPU cores.
Source: https://docs.pytorch.org/docs/stable/notes/ddp.html, https://arxiv.org/abs/1711.00141
"""

import contextlib
from dataclasses import dataclass

import torch
from torch.nn.parallel import DistributedDataParallel

from lockstep import Proof, Run, UserError, recipe
from lockstep.config.keys import key
from lockstep.config.schema import Config
from lockstep.config.tasks import unit_of
from lockstep.data.batch import Batch
from lockstep.memory.tracker import saved_bytes
from lockstep.training.accumulate import MicroBatch, micro_batch
from lockstep.training.clip import clip_gradients
from lockstep.training.optim import build_optimizer, build_scheduler


@dataclass
class AccumulationConfig(Config):
    accumulate_by: str = key("chunk", "how the micro-batches are cut", ("chunk", "unbind"))


def cut(batch: Batch, count: int, by: str) -> list[MicroBatch]:
    """The batch in `count` micro-batches, or a few less where chunk's rounding up makes fewer do."""
    samples = torch.arange(batch.count)
    # chunk: pieces of ceil(N / count) samples, the last one smaller. unbind: [N] to [count, N / count], row by row.
    groups = samples.chunk(count) if by == "chunk" else samples.unflatten(0, (count, -1)).unbind()
    return [micro_batch(batch, int(group[0]), int(group[-1]) + 1) for group in groups]


def check(config: AccumulationConfig, share: int) -> None:
    """unbind makes equal pieces or none."""
    if config.accumulate_by == "unbind" and share % config.accumulate:
        raise UserError(
            f"accumulate={config.accumulate}: must divide a rank's {share} {unit_of(config)} with accumulate_by=unbind; "
            "set another number, or accumulate_by=chunk"
        )


@recipe(
    config=AccumulationConfig,
    proof=Proof(
        {"model.norm": "group"},
        {"accumulate": 4},
        {"model.norm": "batch"},
        "BatchNorm sees micro-batches",
    ),
    check=check,
    next_command="python -m recipes.ddp     the same batch in one piece: compare the memory",
)
def train(run: Run[AccumulationConfig]) -> None:
    model = run.place(run.task.build_model())
    model = DistributedDataParallel(model, device_ids=run.device_ids, gradient_as_bucket_view=True)
    optimizer = build_optimizer(run.config.optim, model)
    scheduler = build_scheduler(run.config.optim, optimizer, run.scheduled_steps)
    scaler = run.scaler()  # precision=fp16 needs it; else it passes everything on

    for batch in run.steps(model=model, optimizer=optimizer, scheduler=scheduler):
        pieces = cut(batch, run.config.accumulate, run.config.accumulate_by)
        for number, micro in enumerate(pieces):
            last = number == len(pieces) - 1
            # The forward belongs inside as well: it arms the hooks with which backward synchronises.
            with contextlib.nullcontext() if last else model.no_sync():
                with run.autocast():
                    loss = run.task.loss(model(micro.inputs), micro.targets)
                scaler.scale(loss * micro.weight).backward()
            run.record(loss=loss, weight=micro.weight)
        clip_gradients(model, optimizer, scaler, run.config.gradients)
        scaler.step(optimizer)  # unscales the gradients, unless that is done; if one is not finite, no rank updates
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()

    piece, whole = saved_bytes(model.module, pieces[0].inputs), saved_bytes(model.module, batch.inputs)
    run.note(
        f"kept: {piece / 2**20:.1f} MiB for backward by a micro-batch, {whole / 2**20:.1f} MiB by the whole share",
        saved_bytes_micro_batch=piece,
        saved_bytes_batch=whole,
    )


if __name__ == "__main__":
    train.main()
