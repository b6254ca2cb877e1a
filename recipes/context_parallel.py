"""Context parallelism: ranks share every sequence; each has some of its positions, and all weights.

Embedding, norms, MLP, output and loss see each position by itself, so a rank computes its own T / c of them and keeps the
activations of these alone. Only attention looks at other positions, and there are two ways for it to see them:

- `by=ring`: keys and values go around. A rank attends to those it holds while the next ones are on their way, and
  merges what it finds by the log-sum-exp. In backward they go around once more, and their gradients behind them. Rank
  r has chunks r and 2c − 1 − r of 2c, an early and a late one, so that causal attention is equally much work for all of them:
  lockstep.parallel.ring_attention has the derivation.
- `by=ulysses`: one all-to-all gives each rank all positions of 1 / c of the heads, another one behind attention gives it
  its positions of all heads again. In between is torch's own attention, the fastest there is.

With c ranks that share, L blocks, A the bytes of a rank's queries in one block (samples · tokens / c · width · bytes per
number), and K those of its keys (heads of keys / heads as many, and its values the same), a rank sends in every step

    ring        L · (c − 1) · 6K, from one rank to the next: keys and values twice, their gradients once (fp32 at least)
    ulysses     L · (4A + 4K) · (c − 1) / c, in 4 all-to-alls: of 4A + 4K handed to them, its own share stays

and besides, as in DDP, the gradients of all weights, once: each rank's are those of its tokens, with their number as
weight, and all ranks take the mean. The ring's traffic hides behind attention, which grows with T² where K grows with
T; few heads of keys make it small. Ulysses sends in whole and at once, but less the more ranks there are.

More than `context` ranks make copies: the mesh is ("data", "context"), neighbours share a sequence, copies have other
samples. Dropout drops what one process would drop. In evaluation outputs are put together on each rank; sequences that do
not divide are filled up then, which causal attention does not see.

What a task must say is which modules look beyond a position, `context_parallel_modules(model)`: in them
F.scaled_dot_product_attention becomes one over all ranks, and `positions` says where a rank's tokens are in the sequence,
for rotary and other embeddings. lockstep.parallel.context_plan says more, and task=language is an example. The targets
must be shifted before, in the data set: the next token of a slice's last one is another rank's.

Choose it when a sequence's activations do not fit, which weights that are cut, as by recipes.fsdp, do not change; from
some ten thousand tokens on. `by=ulysses` up to as many ranks as there are heads of keys, which must divide by `context`,
where all-to-all is fast, within a node; `by=ring` for any number of heads, and between nodes.

    python -m recipes.context_parallel                            GPT nano on the digits, each shared by two ranks
    python -m recipes.context_parallel nproc=4 by=ulysses         two copies, each digit shared by two ranks
    python -m recipes.context_parallel nproc=4 context=4          each digit's 64 positions shared by four

Expect: what recipes.ddp task=language gives, 1.95 bits per token at most with 15 epochs, in two to three minutes on two
CPU cores.
Source: https://arxiv.org/abs/2310.01889 (ring attention), https://arxiv.org/abs/2309.14509 (DeepSpeed Ulysses),
https://arxiv.org/abs/2407.21783 (Llama 3: section 3.3.2, the balanced chunks)
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.distributed.device_mesh import init_device_mesh

from lockstep import Proof, Run, UserError, recipe
from lockstep.config.keys import key
from lockstep.config.schema import Config
from lockstep.config.tasks import short_name
from lockstep.parallel.context import ContextShare, share_sequence
from lockstep.parallel.context_plan import check_attention, context_modules
from lockstep.parallel.replicas import average_gradients
from lockstep.task import option
from lockstep.tasks.build import known_task, one_sample, sketch
from lockstep.training.accumulate import micro_batches
from lockstep.training.clip import clip_gradients
from lockstep.training.optim import build_optimizer, build_scheduler


@dataclass
class ContextParallelConfig(Config):
    model_parallel_key: ClassVar[str] = "context"
    shares_activations: ClassVar[bool] = True
    shares_sequences: ClassVar[bool] = True
    context: int = key(2, "ranks that share each sequence", minimum=1, free=True)
    by: str = key(
        "ring", "ring: keys and values go around; ulysses: ranks exchange heads", ("ring", "ulysses"), free=True
    )


def check(config: ContextParallelConfig, share: int) -> None:
    """Whether the model's attention can be shared, and its sequences be cut, before anything starts."""
    if config.compile:
        raise UserError(
            "compile=true: is for what a rank computes by itself, and attention is shared here; leave it out"
        )
    name, model = short_name(config.task.name), sketch(config)
    modules = context_modules(known_task(config), name, model, config.context)
    check_attention(name, model, modules, one_sample(config)[0], config.context, config.by)


@recipe(
    config=ContextParallelConfig,
    task="language",
    proof=(Proof(), Proof(own={"by": "ulysses"}, precisions=("fp64",))),
    check=check,
    next_command="python -m recipes.tensor_parallel     shares the layers instead: compare the memory",
)
def train(run: Run[ContextParallelConfig]) -> None:
    mesh = init_device_mesh(run.device.type, (run.shards, run.config.context), mesh_dim_names=("data", "context"))
    share = ContextShare(mesh.get_group("context"), run.config.by, option(run.task, "weigh"))
    model = run.place(run.task.build_model())
    modules = context_modules(run.task, short_name(run.config.task.name), model, run.config.context)
    model = share_sequence(model, modules, share)
    optimizer = build_optimizer(run.config.optim, model)
    scheduler = build_scheduler(run.config.optim, optimizer, run.scheduled_steps)
    scaler = run.scaler()  # precision=fp16 needs it; else it passes everything on

    for batch in run.steps(model=model, optimizer=optimizer, scheduler=scheduler):
        for micro in micro_batches(batch, run.config.accumulate, model):  # one, unless accumulate=N
            micro = share.part(micro)  # the targets at this rank's positions, and their weight among all
            with run.autocast():
                loss = run.task.loss(model(micro.inputs), micro.targets)
            # A slice that is all padding has no tokens, and so no mean of their losses: it is nan, and counts for nothing.
            loss = torch.where(torch.as_tensor(micro.weight) > 0, loss, 0.0)
            scaler.scale(loss * micro.weight).backward()
            run.record(loss=loss, weight=micro.weight)
        average_gradients(model)
        clip_gradients(model, optimizer, scaler, run.config.gradients)
        scaler.step(optimizer)  # unscales the gradients, unless that is done; if one is not finite, no rank updates
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    train.main()
