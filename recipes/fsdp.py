"""Fully sharded data parallelism (FSDP2, ZeRO-3): of every weight, gradient and optimizer state each rank keeps a part.

DDP holds all of it on every rank. Here rank r of n holds the r-th part of each tensor, cut along its first dim, and
makes the optimizer's update for that part alone. The weights are whole only while they are needed. Before a block's
forward its parts go around, and every rank puts the block's weights together (all-gather); after the forward they are
freed. Before the block's backward they are gathered once more; after it each rank needs only its own part of the
gradients' mean, so every rank sends the others theirs and adds up what it gets (reduce-scatter). That is half as much
traffic again as DDP's all-reduce, while the neighbouring block computes, and in return the memory for the model's
state is divided by n.

`reshard_after_forward=false` keeps the weights from forward to backward (ZeRO-2): DDP's traffic, but all weights
whole at once. `replicate=2` makes two copies of the model, each sharded over half of the ranks (HSDP): gathers and
scatters stay among neighbours, on one node say, and only gradient parts cross to the other copy. `offload=true`
keeps parts and optimizer in host memory.

No rank but the first ever holds the whole model, and that one on the CPU, to draw the weights that recipes.single
draws: it is built on the meta device, which has shapes but no memory, sharded, and filled tensor by tensor. It is
evaluated in shards, saved in shards, and exported tensor by tensor. BatchNorm normalises by each rank's share, as
under DDP; `model.norm=group` computes exactly what recipes.single does.

    python -m recipes.fsdp                                     two ranks on this machine, or one per GPU
    python -m recipes.fsdp nproc=4 replicate=2 optim=adamw     2 copies in 2 parts each

Expect: an accuracy of 0.97 or more on the digits, in about two minutes on two CPU cores, and on two ranks half of DDP's
state in the summary. (The peak of a CPU's memory shows it with MALLOC_MMAP_THRESHOLD_=131072 in the environment: by
itself glibc keeps for later what FSDP frees.)
Source: https://arxiv.org/abs/1910.02054 (ZeRO), https://arxiv.org/abs/2304.11277 (FSDP),
https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lockstep import Proof, Run, UserError, recipe
from lockstep.config.keys import key
from lockstep.config.schema import Config
from lockstep.parallel.fully_sharded import precision_policies, refuse_tied, sum_embeddings_in_fp32
from lockstep.tasks.build import sketch
from lockstep.training.accumulate import micro_batches
from lockstep.training.activation_checkpointing import checkpoint_activations
from lockstep.training.clip import clip_gradients
from lockstep.training.compiling import COMPILE_OPTIONS
from lockstep.training.optim import build_optimizer, build_scheduler
from lockstep.training.precision import AUTOCAST, DTYPES
from lockstep.utils.text import divisors


@dataclass
class FsdpConfig(Config):
    replicate: int = key(1, "copies of the model, each sharded over its part of the ranks", minimum=1, free=True)
    reshard_after_forward: bool = key(
        True, "free each block's whole weights after its forward, gather them again for backward", free=True
    )
    offload: bool = key(False, "keep shards and optimizer in host memory, and update there", free=True)
    reduce: str = key("fp32", "precision=bf16: what gradients are averaged in", ("fp32", "bf16"))
    sync: str = key(
        "last",
        "accumulate=N: average gradients after the last micro-batch, or after every one, which needs less memory",
        ("last", "every"),
    )


def make_mesh(run: Run[FsdpConfig]) -> DeviceMesh:
    """The ranks, neighbours sharing a copy of the model; with several copies, the same parts of each in a column."""
    replicas = run.config.replicate
    if replicas == 1:
        return init_device_mesh(run.device.type, (run.shards,), mesh_dim_names=("shard",))
    shape = (replicas, run.shards // replicas)
    return init_device_mesh(run.device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(model: nn.Module, mesh: DeviceMesh, run: Run[FsdpConfig]) -> None:
    """Shard a model, in place, from the inside out: each block is gathered by itself, and what is left over, such as
    the first and the last layer, together. One fully_shard on the whole would gather the whole."""
    config = run.config
    pinned = run.device.type == "cuda"  # host memory that a GPU can read by itself
    options: dict[str, Any] = {
        "mesh": mesh,
        "offload_policy": CPUOffloadPolicy(pin_memory=pinned) if config.offload else OffloadPolicy(),
    }
    arithmetic, rest = precision_policies(config.precision, config.reduce)
    sum_embeddings_in_fp32(model, config.precision, run.device)
    if config.precision in AUTOCAST:
        norms: list[nn.Module] = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
        own = MixedPrecisionPolicy(cast_forward_inputs=False)  # 16-bit images with fp32 weights, as under autocast
        # Few numbers, gathered all at once; a block that computes again in backward needs its own norms alone.
        for together in [norms] if run.config.checkpoint_activations == "none" else [[norm] for norm in norms]:
            if together:
                fully_shard(together, mp_policy=own, reshard_after_forward=False, **options)
    for name in run.blocks(model):
        block = model.get_submodule(name)
        if not any(True for _ in block.parameters()):  # nothing to gather
            continue
        if run.config.compile:  # block by block, since what FSDP does in between is no graph
            block.compile(**COMPILE_OPTIONS)
        fully_shard(block, mp_policy=arithmetic, reshard_after_forward=config.reshard_after_forward, **options)
    fully_shard(model, mp_policy=rest, **options)


@torch.no_grad()
def deal(model: nn.Module, whole: nn.Module | None, run: Run[FsdpConfig]) -> None:
    """Give a sharded meta model memory, and every rank its parts of the weights that rank 0 has in `whole`.

    Tensor after tensor is cut up on rank 0 and dealt out, so the other ranks hold no more than one of them at a time.
    """
    model.to_empty(device="cpu" if run.config.offload else run.device)
    for layer in model.modules():
        for name, buffer in layer.named_buffers(recurse=False):
            setattr(layer, name, buffer.to(run.device))  # these are not offloaded
    weights = tensors_of(whole) if whole is not None else {}
    for name, mine in tensors_of(model).items():
        tensor = weights[name] if weights else torch.empty(mine.shape, dtype=mine.dtype)
        tensor = tensor.to(run.device)
        if isinstance(mine, DTensor):
            mine.copy_(distribute_tensor(tensor, mine.device_mesh, mine.placements))
        else:  # BatchNorm's statistics, which every rank has
            dist.broadcast(tensor, src=0)
            mine.copy_(tensor)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, those too that no state_dict has, such as tables of positions."""
    return {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def check(config: FsdpConfig, share: int) -> None:
    """What sharding asks for, before anything starts."""
    refuse_tied(sketch(config), "fsdp")
    ranks = config.global_batch_size // share
    if ranks % config.replicate:
        raise UserError(
            f"replicate={config.replicate}: {ranks} ranks do not divide by it; allowed are {divisors(ranks)}"
        )
    if config.reduce != "fp32" and config.precision != "bf16":
        raise UserError(
            f"reduce={config.reduce}: precision={config.precision} averages its gradients in full; "
            "set precision=bf16, or leave it out"
        )


@recipe(
    config=FsdpConfig,
    proof=Proof(
        {"model.norm": "group"}, differs={"model.norm": "batch"}, because="BatchNorm normalises by each rank's share"
    ),
    check=check,
    next_command="python -m recipes.ddp     the same training, all of the model on every rank: compare the memory",
)
def train(run: Run[FsdpConfig]) -> None:
    dtype = DTYPES[run.config.precision]
    whole = run.task.build_model().to(dtype) if run.world.rank == 0 else None
    with torch.device("meta"):
        model: Any = run.task.build_model().to(dtype)
    # Before: a block's second forward then lies inside of its backward, when its weights are gathered anyway.
    checkpoint_activations(model, run.blocks(model), run.config.checkpoint_activations)
    shard(model, make_mesh(run), run)
    deal(model, whole, run)
    del whole
    # Not before: fully_shard replaces the parameters, and an optimizer would hold on to the old ones.
    optimizer = build_optimizer(run.config.optim, model)
    scheduler = build_scheduler(run.config.optim, optimizer, run.scheduled_steps)
    scaler = run.scaler()  # precision=fp16 needs it; else it passes everything on

    for batch in run.steps(model=model, optimizer=optimizer, scheduler=scheduler):
        for micro in micro_batches(batch, run.config.accumulate, model):  # one, unless accumulate=N
            # Not averaged yet, gradients stay whole on each rank, as much memory as DDP's: the price of sending less.
            model.set_requires_gradient_sync(micro.last or run.config.sync == "every")
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
