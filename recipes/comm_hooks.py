"""Communication hooks: DDP whose gradients are compressed before they are sent, and whose errors are fed back.

DDP calls a hook for each bucket of gradients, in place of its all-reduce. The hooks here send fewer bytes:

    compress=bf16       2 bytes per number, of fp32's range with 8 bits of precision
    compress=fp16       2 bytes per number, 11 bits of precision, nothing above 65504
    compress=powersgd   of a layer with m outputs and n inputs, r (m + n) numbers and not m n: two matrices P and Q,
                        whose product is near the gradient. What has no such shape, biases and norms, is sent whole.

With B such bytes each of N ranks sends 2 (N - 1) / N · B per step, as plain DDP does with the bytes of all gradients.
The summary counts both. Of ResNet-18 and r=4 it is 1.4 % of them.

Error feedback is what makes it train. Each rank remembers what its message lacked, and adds it to its next gradient:
nothing is lost, it only arrives later. Without it, what is below the last bit, or outside of r directions, would be
lost in every step anew. It costs one copy of the compressed gradients, which stay in the gradients' own precision.

How the message is made is in lockstep/parallel/compressed_gradients.py. In 16 bits nothing is added up in 16 bits:
that would lose more than the sending. PowerSGD is linear in the gradients, so N ranks make the update that one process
would make of the whole batch's compressed gradient; `recipes.verify` proves just that. Rounding is not linear: with
bf16 or fp16 other ranks train slightly differently, and no equality is claimed.

Choose it where ranks wait for the network: recipes.doctor and recipes.plan say whether they do. First bf16,
which costs nothing but the memory; PowerSGD where that is not enough, for its matrix products and its
orthogonalisation take time on each rank. On one machine with NVLink neither pays. recipes.ddp comm=bf16 rounds
without a memory; recipes.local_sgd sends nothing in most steps.

`start_step=N` sends gradients whole in the first N steps, where they change fastest. A checkpoint holds each rank's
memory, and Q, from which the next step starts: as many ranks resume with the same bits. On another number of ranks
each takes the mean over its part of the old ones. That keeps the mean of all memories, which is what is still owed to
the weights. precision=fp16 is refused: its gradients are scaled by a number that changes, and memories are not.

    python -m recipes.comm_hooks                                    PowerSGD on two ranks
    python -m recipes.comm_hooks r=1 start_step=10
    python -m recipes.comm_hooks compress=bf16 task=language

Expect: the accuracy of recipes.ddp, 0.97 or more on the digits, in about a minute on two CPU cores. Measured there, of
ResNet-18 after the same 210 steps:

    recipes.ddp          44.7 MB per step    loss 0.051    accuracy 98.3 %
    compress=bf16        22.3 MB                  0.055             98.3 %
    r=4                  0.62 MB                  0.042             98.9 %
    r=1 start_step=20    0.18 MB                  0.33              92.2 %
    r=1                  0.18 MB                  0.56              83.1 %, so far

Source: https://arxiv.org/abs/1905.13727 (PowerSGD), https://arxiv.org/abs/1901.09847 (error feedback),
https://docs.pytorch.org/docs/stable/ddp_comm_hooks.html
"""

from collections import Counter
from dataclasses import dataclass

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lockstep import Proof, Run, UserError, recipe
from lockstep.config.keys import key
from lockstep.config.schema import Config
from lockstep.parallel.compressed_gradients import GradientCompression, PowerSGD, RoundedGradients, largest_rank
from lockstep.tasks.build import sketch
from lockstep.training.accumulate import micro_batches
from lockstep.training.clip import clip_gradients
from lockstep.training.optim import build_optimizer, build_scheduler
from lockstep.training.precision import AUTOCAST


@dataclass
class CommHooksConfig(Config):
    compress: str = key("powersgd", "how gradients are made smaller to be sent", ("powersgd", "bf16", "fp16"))
    r: int | None = key(None, "compress=powersgd: rank of the two matrices; null: 4", minimum=1)
    start_step: int = key(0, "the first steps, in which gradients are sent whole", minimum=0)

    @property
    def matrix_rank(self) -> int:
        """`r`, chosen where nobody has."""
        return self.r or 4


def build_compression(run: Run[CommHooksConfig], model: nn.Module) -> GradientCompression:
    """What is done to the gradients of a model that is placed, and not wrapped."""
    config, place = run.config, (run.shard, run.shards, run.config.start_step)
    if config.compress == "powersgd":
        return PowerSGD(model, *place, r=config.matrix_rank)
    return RoundedGradients(model, *place, dtype=AUTOCAST[config.compress])


def check(config: CommHooksConfig, share: int) -> None:
    """Refuse what would be ignored, what would save nothing, and a loss scale that memories do not follow."""
    if config.precision == "fp16":
        raise UserError(
            "precision=fp16: its loss scale changes, and what was left out of gradients is remembered in the old one; "
            "allowed are fp32, bf16, fp64"
        )
    if config.compress != "powersgd":
        if config.r is not None:
            raise UserError(
                f"r={config.r}: compress={config.compress} has no rank; leave it out, or set compress=powersgd"
            )
        return
    most = max((largest_rank(parameter) for parameter in sketch(config).parameters()), default=0)
    if config.matrix_rank > most:
        allowed = f"allowed are 1…{most}, or" if most else "set"
        raise UserError(
            f"r={config.matrix_rank}: two such matrices save less than half of every gradient; {allowed} compress=bf16"
        )


def compress_alone(run: Run, model: nn.Module) -> None:
    """Have `single` compress its gradients, which are those of the whole batch, as ranks do with the mean of theirs."""
    if run.recipe == "single":
        alone = PowerSGD(model, 0, 1, r=run.config.matrix_rank)
        added: Counter[nn.Parameter] = Counter()  # micro-batches: a step's gradient is whole after the last one

        def compress(parameter: nn.Parameter) -> None:
            added[parameter] += 1
            if added[parameter] % run.config.accumulate == 0:
                alone.compress_alone(parameter)

        for parameter in [each for each in model.parameters() if each.requires_grad]:
            parameter.register_post_accumulate_grad_hook(compress)


@recipe(
    config=CommHooksConfig,
    check=check,
    proof=Proof(
        {"model.norm": "group", "optim.name": "sgd", "optim.lr": 0.05},
        {"r": 2},
        {"model.norm": "batch"},
        "BatchNorm normalises by each rank's share",
        precisions=("fp64", "fp32", "bf16"),
        prepare=compress_alone,
    ),
    next_command="python -m recipes.ddp     gradients sent whole: compare the loss, and the time of a step",
)
def train(run: Run[CommHooksConfig]) -> None:
    model = run.place(run.task.build_model())
    compression = build_compression(run, model)
    model = DistributedDataParallel(model, device_ids=run.device_ids, gradient_as_bucket_view=True)
    model.register_comm_hook(None, compression.hook)
    optimizer = build_optimizer(run.config.optim, model)
    scheduler = build_scheduler(run.config.optim, optimizer, run.scheduled_steps)
    scaler = run.scaler()  # precision=fp16 needs it; else it passes everything on

    for batch in run.steps(model=model, optimizer=optimizer, scheduler=scheduler, keep={"compression": compression}):
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

    sent, whole = compression.sent_bytes(), compression.whole_bytes()
    run.note(
        f"compressed: {sent:,} bytes of gradients per step in place of {whole:,}, {sent / whole:.1%}",
        gradient_bytes_sent=sent,
        gradient_bytes=whole,
    )


if __name__ == "__main__":
    train.main()
