"""Several kinds of parallelism at once, on one mesh of ranks: copies × shards (FSDP2) × sequences × layers.

Each rank has a place in a mesh of four dims, replicate · shard · context · tensor, the last one between neighbours,
because it sends most and nothing hides it. `tensor` neighbours share every layer and `context` of their groups every
sequence: these tensor · context ranks see the same samples. Each of replicate · shard such groups sees its own.

- `tensor` cuts matrices by columns and rows first, as recipes.tensor_parallel does: a rank keeps 1 / tensor of them.
- fully_shard cuts that once more, as recipes.fsdp does, over shard · context ranks: those that share a sequence would
  all have the same weights otherwise. So it is FSDP that averages the gradients over all tokens, of whichever rank.
- `context` has attention see the whole sequence, as recipes.context_parallel does, for the heads that a rank has.
- `replicate` makes copies of all that: shards are gathered among some ranks, and only gradients go to all (HSDP).

With r, s, c, t for the four keys and f = s · c, L blocks, W the bytes of the weights that t leaves a rank (of a norm's,
all), V of these outside of the blocks, A the bytes of a rank's activation (batch / (r · s) samples · tokens / c · width ·
bytes per number) and K those of its keys (heads of keys / heads as many), a rank hands over in every step

    shard, context   2W − V in all-gathers (blocks again in backward), W in reduce-scatters; sent is (f − 1) / f of it
    replicate        W / f in all-reduces, if r > 1; sent is 2 (r − 1) / r times as much
    tensor           (4L + 2) · A in all-reduces, and a few numbers per token for the loss; sent 2 (t − 1) / t times
    context          ring: L · (c − 1) · 6K / t, sent; ulysses: L · (4A + 4K) / t, of which (c − 1) / c is sent

each among its own ranks: tensor's within a node, replicate's between nodes, where it is the least.

Choose it when one of them is not enough: `tensor` up to the GPUs that NVLink joins if a layer does not fit, `context` for
long sequences, `shard` for all other ranks, and `replicate` when gathering among so many takes longer than computing.

It composes with accumulation (averaged after the last micro-batch), clipping by the norm of all shards of both kinds,
bf16 and fp16, checkpointed activations. It refuses a pipeline and experts on ranks of their own: `refuses` below says why,
and docs/compositions.md has the table of all. A mixture of experts goes with tensor=1 context=1, as in recipes.fsdp.

    python -m recipes.parallel_mesh                                        layers shared by two ranks
    python -m recipes.parallel_mesh nproc=4                                and sharded: shard 2 × tensor 2
    python -m recipes.parallel_mesh nproc=8 replicate=2 context=2          2 copies × context 2 × tensor 2

Expect: what recipes.ddp task=language gives, 1.95 bits per token at most with 15 epochs, in two to three minutes on two
CPU cores; in the summary, a rank's 1 / (s · c · t) of weights, gradients and optimizer.
Source: https://arxiv.org/abs/2410.06511 (torchtitan: the order of the dims, FSDP over shard × context),
https://arxiv.org/abs/2407.21783 (Llama 3: section 3.3.2), https://docs.pytorch.org/tutorials/intermediate/TP_tutorial.html
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import loss_parallel

from lockstep import Proof, Run, UserError, recipe
from lockstep.config.keys import key
from lockstep.config.schema import Config
from lockstep.config.tasks import short_name
from lockstep.distributed.dtensor import full_tensor
from lockstep.parallel.context import ContextShare, share_sequence
from lockstep.parallel.context_plan import check_attention, context_modules
from lockstep.parallel.fully_sharded import expect_two_gathers, precision_policies
from lockstep.parallel.tensor import layer_styles, share_layers
from lockstep.parallel.tensor_plan import tensor_parallel_plan
from lockstep.task import option
from lockstep.tasks.build import has_batchnorm, known_task, one_sample, sketch
from lockstep.training.accumulate import micro_batches
from lockstep.training.clip import clip_gradients
from lockstep.training.optim import build_optimizer, build_scheduler
from lockstep.training.precision import DTYPES


@dataclass
class ParallelMeshConfig(Config):
    model_parallel_key: ClassVar[str] = "context × tensor"
    shares_activations: ClassVar[bool] = True
    refuses: ClassVar[dict[str, str]] = {
        "stages": "each stage would need a mesh of its own, which is not made here; use recipes.pipeline_parallel, "
        "which has copies of pipelines",
        "expert": "experts on ranks of their own are averaged by other ranks than FSDP's; use recipes.expert_parallel, "
        "which has copies of experts, or recipes.fsdp, which shards them like all weights",
    }
    replicate: int = key(1, "copies of the model, each sharded over its part of the ranks", minimum=1, free=True)
    shard: int | None = key(
        None, "ranks with samples of their own that a copy is cut over (null: all that are left)", minimum=1, free=True
    )
    context: int = key(1, "ranks that share each sequence", minimum=1, free=True)
    tensor: int = key(2, "ranks that share one copy of the model, layer by layer", minimum=1, free=True)
    by: str = key(
        "ring", "ring: keys and values go around; ulysses: ranks exchange heads", ("ring", "ulysses"), free=True
    )


def check(config: ParallelMeshConfig, share: int) -> None:
    """Whether the mesh has as many places as there are ranks, and the model as many parts, before anything starts."""
    groups = config.global_batch_size // share  # of ranks that see the same samples
    if groups % config.replicate or config.shard not in (None, groups // config.replicate):
        asked = (
            f"replicate={config.replicate} × shard={config.shard}" if config.shard else f"replicate={config.replicate}"
        )
        raise UserError(
            f"{asked}: context={config.context} × tensor={config.tensor} leave {groups} groups of ranks for them; set nproc "
            "to the product of all four, or leave out shard, which then is what is left"
        )
    if config.compile:
        raise UserError("compile=true: is for what a rank computes by itself, and layers are shared here; leave it out")
    name, task, model = short_name(config.task.name), known_task(config), sketch(config)
    if has_batchnorm(config):
        raise UserError(f"task={name}: its BatchNorm would normalise by each rank's share; use recipes.fsdp")
    if config.tensor > 1:
        tensor_parallel_plan(task, name, model, config.tensor, sequence=False)
    if config.context > 1:
        modules = context_modules(task, name, model, config.context)
        check_attention(name, model, modules, one_sample(config)[0], config.context, config.by, config.tensor)


def make_meshes(run: Run[ParallelMeshConfig]) -> tuple[DeviceMesh, DeviceMesh]:
    """The same ranks in the same order twice: by what they hold of the weights, and by what they see of the batch."""
    config, device = run.config, run.device.type
    held = (config.replicate, run.shards // config.replicate * config.context, config.tensor)
    seen = (run.shards, config.context, config.tensor)
    return (
        init_device_mesh(device, held, mesh_dim_names=("replicate", "shard", "tensor")),
        init_device_mesh(device, seen, mesh_dim_names=("batch", "context", "tensor")),
    )


@recipe(
    config=ParallelMeshConfig,
    task="language",
    proof=(Proof(rounding=4), Proof(own={"tensor": 1, "context": 2}, precisions=("fp64",), rounding=4)),
    check=check,
    next_command="python -m recipes.plan task=language     what each technique would hold and send",
)
def train(run: Run[ParallelMeshConfig]) -> None:
    config, name = run.config, short_name(run.config.task.name)
    weights, samples = make_meshes(run)
    share = ContextShare(samples.get_group("context"), config.by, option(run.task, "weigh"))
    model: Any = run.task.build_model().to(DTYPES[config.precision])
    attention = context_modules(run.task, name, model, config.context) if config.context > 1 else []
    if config.tensor > 1:  # first: fully_shard cuts what a rank then has
        plan = tensor_parallel_plan(run.task, name, model, config.tensor, sequence=False)
        model = share_layers(model, plan, layer_styles(sequence=False), weights["tensor"], sequence=False)
        expect_two_gathers()
    model = run.place(share_sequence(model, attention, share))
    mesh = weights["replicate", "shard"] if config.replicate > 1 else weights["shard"]
    of_block, of_rest = precision_policies(config.precision)
    for block in run.blocks(model):
        fully_shard(model.get_submodule(block), mesh=mesh, mp_policy=of_block)
    fully_shard(model, mesh=mesh, mp_policy=of_rest)
    optimizer = build_optimizer(run.config.optim, model)
    scheduler = build_scheduler(run.config.optim, optimizer, run.scheduled_steps)
    scaler = run.scaler()  # precision=fp16 needs it; else it passes everything on

    for batch in run.steps(model=model, optimizer=optimizer, scheduler=scheduler):
        with loss_parallel(), implicit_replication():  # the loss of logits of which each rank has some; backward too
            for micro in micro_batches(batch, run.config.accumulate, model):  # one, unless accumulate=N
                model.set_requires_gradient_sync(micro.last)
                micro = share.part(micro)  # the targets at this rank's positions, and their weight among all
                loss = run.task.loss(model(micro.inputs), micro.targets)
                # A slice that is all padding has no mean of its tokens' losses: it is nan, and counts for nothing.
                loss = torch.where(torch.as_tensor(micro.weight) > 0, full_tensor(loss, run.device), 0.0)
                scaler.scale(loss * micro.weight).backward()
                run.record(loss=loss, weight=micro.weight)
        clip_gradients(model, optimizer, scaler, run.config.gradients)
        scaler.step(optimizer)  # unscales the gradients, unless that is done; if one is not finite, no rank updates
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    train.main()
