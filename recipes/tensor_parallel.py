"""Tensor parallelism: ranks share every layer, each has some columns or rows of its matrix, and all see the same samples.

A transformer's block is two halves, attention and MLP, and each is matrix, something in between, matrix. Of the first
matrix a rank has some columns: some of the heads, some of the hidden features. With these it goes on by itself, because
what lies in between looks at no other head or feature. Of the second matrix it has the rows that take exactly these,
so its product is one addend of the whole, and one sum over the ranks ends the half:

- forward: one all-reduce behind the embedding (a rank has some tokens' rows of it) and behind each half;
- backward: one in front of each half and of the output, where each rank has the gradient that comes through its columns;
- loss: a rank has the logits of some tokens, 18 on 4 ranks if need be. Cross-entropy over all of them takes three
  numbers per token and no rank ever has all logits: the largest, the sum of exponentials, the target's logit.

With t ranks that share, L blocks, and A the bytes of one activation (samples · tokens · width · bytes per number), that is
(4L + 2) · A in all-reduces, of which a rank sends 2 (t − 1) / t times as much, in every step and not once per step as
the gradients of DDP: the price depends on the batch and not on the weights. And nothing hides it, for the next layer waits.

`sequence_parallel=true` cuts what lies between the halves too, norms, dropout and sums: each rank has a slice of the
sequence. Then a reduce-scatter ends a half and an all-gather begins the next one, (4L + 2) · A of each, which together
send what the all-reduce does, and norms and their inputs take 1 / t of the memory. The gradients of the norms' weights
are added up once more. Sequences that do not divide are filled up; later positions change nothing before them.

More than `tensor` ranks make copies: the mesh is ("data", "tensor"), neighbours share a model and have the same samples,
and copies average their gradients after backward, as DDP's ranks do. Dropout drops the same where ranks have the same
activation, and other numbers in each slice: what one process drops. (Copies draw their own, as DDP's ranks do.)

How layers are cut is the task's to say, `tensor_parallel_plan(model)`: lockstep.parallel.tensor_plan has the words, and
task=language an example. Heads, heads of keys and hidden features must divide by `tensor`.

Choose it when a layer does not fit, or when each rank's batch could not be smaller, among GPUs that NVLink joins: with
`tensor` up to the GPUs of one node. Else recipes.fsdp, whose traffic hides behind the computation.

    python -m recipes.tensor_parallel                                     GPT nano on the digits, shared by two ranks
    python -m recipes.tensor_parallel nproc=4 sequence_parallel=true      two copies, each shared by two ranks
    python -m recipes.tensor_parallel nproc=4 tensor=4 task.kv_heads=4    one, shared by four

Expect: what recipes.ddp task=language gives, 1.95 bits per token at most with 15 epochs, in two to three minutes on two
CPU cores; in the summary, half of the weights, gradients and optimizer on each of two ranks.
Source: https://arxiv.org/abs/1909.08053 (Megatron-LM), https://arxiv.org/abs/2205.05198 (sequence parallel),
https://docs.pytorch.org/docs/stable/distributed.tensor.parallel.html
"""

from dataclasses import dataclass
from typing import ClassVar

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import loss_parallel

from lockstep import Proof, Run, UserError, recipe
from lockstep.config.keys import key
from lockstep.config.schema import Config
from lockstep.config.tasks import short_name
from lockstep.distributed.dtensor import full_tensor
from lockstep.parallel.replicas import average_gradients
from lockstep.parallel.tensor import complete_gradients, layer_styles, share_layers
from lockstep.parallel.tensor_plan import tensor_parallel_plan
from lockstep.tasks.build import known_task, sketch
from lockstep.training.accumulate import micro_batches
from lockstep.training.clip import clip_gradients
from lockstep.training.optim import build_optimizer, build_scheduler
from lockstep.training.precision import DTYPES


@dataclass
class TensorParallelConfig(Config):
    model_parallel_key: ClassVar[str] = "tensor"
    shares_activations: ClassVar[bool] = True
    tensor: int = key(2, "ranks that share one copy of the model, layer by layer", minimum=1, free=True)
    sequence_parallel: bool = key(
        False, "between layers each rank has a slice of the sequence, not all of it", free=True
    )


def check(config: TensorParallelConfig, share: int) -> None:
    """What the plan and its sizes ask for, before anything starts."""
    if config.compile:
        raise UserError(
            "compile=true: is for layers that a rank computes by itself, and here ranks share them; leave it out"
        )
    name = short_name(config.task.name)
    tensor_parallel_plan(known_task(config), name, sketch(config), config.tensor, config.sequence_parallel)


@recipe(
    config=TensorParallelConfig,
    task="language",
    proof=(Proof(), Proof(own={"sequence_parallel": True}, precisions=("fp64",))),
    check=check,
    next_command="python -m recipes.fsdp task=language     cuts the weights too, and no activation: compare the memory",
)
def train(run: Run[TensorParallelConfig]) -> None:
    tensor, sequence = run.config.tensor, run.config.sequence_parallel
    mesh = init_device_mesh(run.device.type, (run.shards, tensor), mesh_dim_names=("data", "tensor"))
    model = run.task.build_model().to(DTYPES[run.config.precision])
    plan = tensor_parallel_plan(run.task, short_name(run.config.task.name), model, tensor, sequence)
    model = run.place(share_layers(model, plan, layer_styles(sequence), mesh["tensor"], sequence))
    optimizer = build_optimizer(run.config.optim, model)
    scheduler = build_scheduler(run.config.optim, optimizer, run.scheduled_steps)
    scaler = run.scaler()  # precision=fp16 needs it; else it passes everything on

    for batch in run.steps(model=model, optimizer=optimizer, scheduler=scheduler):
        with loss_parallel(), implicit_replication():  # the loss of logits of which each rank has some; backward too
            for micro in micro_batches(batch, run.config.accumulate, model):  # one, unless accumulate=N
                with run.autocast():
                    loss = run.task.loss(model(micro.inputs), micro.targets)
                loss = full_tensor(loss, run.device)
                scaler.scale(loss * micro.weight).backward()
                run.record(loss=loss, weight=micro.weight)
        complete_gradients(model)
        average_gradients(model, mesh.get_group("data"))
        clip_gradients(model, optimizer, scaler, run.config.gradients)
        scaler.step(optimizer)  # unscales the gradients, unless that is done; if one is not finite, no rank updates
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    train.main()
