"""Several kinds of parallelism at once, on one mesh of ranks: copies × shards (FSDP2) × stages × sequences × layers.

Each rank has a place in a mesh of five dims, replicate · shard · pipeline · context · tensor, the last one between
neighbours, because it sends most and nothing hides it. `tensor` neighbours share every layer, `context` of their groups
every sequence, and `pipeline` of those have the blocks one after the other: these ranks see the same samples. Each of
replicate · shard such groups sees its own.

- `pipeline` cuts the model into stages first, as recipes.pipeline_parallel does. What follows is done to each stage.
- `tensor` cuts matrices by columns and rows, as recipes.tensor_parallel does: a rank keeps 1 / tensor of them. With
  `sequence_parallel=true` a rank has a slice of the sequence between layers, and a stage sends its slice.
- fully_shard cuts that once more, as recipes.fsdp does, over shard · context ranks: those that share a sequence would
  all have the same weights otherwise. So it is FSDP that averages the gradients over all tokens, of whichever rank.
- `context` has attention see the whole sequence, as recipes.context_parallel does, for the heads that a rank has.
- `replicate` makes copies of all that: shards are gathered among some ranks, and only gradients go to all (HSDP).

With r, s, p, c, t for the five keys and f = s · c, l of the blocks in a stage, W the bytes of the weights that t leaves a
rank of its stage (of a norm's, all), V of these outside of the blocks, m the micro-batches of a pipeline (without one, 1),
A the bytes of a rank's activation (batch / (r · s) samples · tokens / c · width · bytes per number) and K those of its
keys (heads of keys / heads as many), a rank hands over in every step

    shard, context   (m + 1) W − m V in all-gathers (a block in each forward, and in backward once), W in reduce-scatters;
                     sent is (f − 1) / f of it
    replicate        W / f in all-reduces, if r > 1; sent is 2 (r − 1) / r times as much
    pipeline         A sent to the next stage in forward, and A to the one before in backward; interleaved: twice as often
    tensor           4l · A in all-reduces, A more behind the embedding and before the output, and a few numbers per token
                     for the loss; sent 2 (t − 1) / t times. sequence_parallel: as much in all-gathers and as much in
                     reduce-scatters, sent (t − 1) / t times each, the norms' gradients, and 1 / t of what stages send
    context          ring: l · (c − 1) · 6K / t, sent; ulysses: l · (4A + 4K) / t, of which (c − 1) / c is sent

each among its own ranks: tensor's within a node, replicate's between nodes, where it is the least.

Choose it when one of them is not enough: `tensor` up to the GPUs that NVLink joins if a layer does not fit, `context` for
long sequences, `pipeline` where even the shards of all blocks do not fit or FSDP's gathers wait for the network, `shard`
for all other ranks, and `replicate` when gathering among so many takes longer than computing.

It composes with accumulation (averaged after the last micro-batch; a pipeline has `micro_batches` instead), clipping by
the norm over shards of both kinds and all stages, bf16 and fp16, checkpointed activations. What it refuses, each in a line:

- pipeline + accumulate: a pipeline accumulates by itself. schedule=zero_bubble: torch's backward in two halves leaves out
  gradients of weights that fully_shard has cut; gpipe, 1f1b and interleaved are there.
- experts with tensor or context: their ranks share layers, or parts of sequences, that the router must see whole. With
  tensor=1 context=1 a mixture of experts is sharded like all weights, and goes with a pipeline.
- experts on ranks of their own: they are averaged by other ranks than FSDP's; recipes.expert_parallel has them.
- compile: for what a rank computes by itself. BatchNorm: it would normalise by each rank's share.

docs/compositions.md has the table of all.

    python -m recipes.parallel_mesh                                        layers shared by two ranks
    python -m recipes.parallel_mesh nproc=4                                and sharded: shard 2 × tensor 2
    python -m recipes.parallel_mesh nproc=4 pipeline=2                     two stages, layers of each shared by two
    python -m recipes.parallel_mesh nproc=8 replicate=2 context=2          2 copies × context 2 × tensor 2

Expect: what recipes.ddp task=language gives, 1.95 bits per token at most with 15 epochs, in two to three minutes on two
CPU cores; in the summary, a rank's 1 / (s · p · c · t) of weights, gradients and optimizer.
Source: https://arxiv.org/abs/2410.06511 (torchtitan: stages first, FSDP over shard × context),
https://arxiv.org/abs/2407.21783 (Llama 3: section 3.3.2, the order of the dims),
https://docs.pytorch.org/tutorials/intermediate/TP_tutorial.html
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import loss_parallel

from lockstep import Proof, Run, UserError, recipe
from lockstep.config.keys import AUTO, CUT_HELP, key
from lockstep.config.schema import Config
from lockstep.config.tasks import short_name
from lockstep.distributed.dtensor import full_tensor
from lockstep.parallel.context import ContextShare, share_sequence
from lockstep.parallel.context_plan import check_attention, context_modules
from lockstep.parallel.fully_sharded import (
    expect_two_gathers,
    precision_policies,
    refuse_tied,
    sum_embeddings_in_fp32,
)
from lockstep.parallel.partition import wanted_cut
from lockstep.parallel.stages import (
    STAGES_A_RANK,
    Pipeline,
    agreed_parts,
    check_stages,
    refuse_gloo_between_gpus,
)
from lockstep.parallel.tensor import layer_styles, share_layers
from lockstep.parallel.tensor_plan import tensor_parallel_plan
from lockstep.task import option
from lockstep.tasks.build import blocks_of_task, has_batchnorm, known_task, one_sample, sketch
from lockstep.training.accumulate import micro_batches
from lockstep.training.clip import clip_gradients
from lockstep.training.optim import build_optimizer, build_scheduler
from lockstep.training.precision import DTYPES


@dataclass
class ParallelMeshConfig(Config):
    model_parallel_key: ClassVar[str] = "pipeline × context × tensor"
    shares_activations: ClassVar[bool] = True
    refuses: ClassVar[dict[str, str]] = {
        "stages": "the stages of a mesh are an axis of it, set pipeline=N; recipes.pipeline_parallel has stages=N",
        "expert": "experts on ranks of their own are averaged by other ranks than FSDP's; use recipes.expert_parallel, "
        "which has copies of experts, or recipes.fsdp, which shards them like all weights",
    }
    replicate: int = key(1, "copies of the model, each sharded over its part of the ranks", minimum=1, free=True)
    shard: int | None = key(
        None, "ranks with samples of their own that a copy is cut over (null: all that are left)", minimum=1, free=True
    )
    pipeline: int = key(1, "ranks that have layers of their own, one after the other", minimum=1, free=True)
    context: int = key(1, "ranks that share each sequence", minimum=1, free=True)
    tensor: int = key(2, "ranks that share one copy of the model, layer by layer", minimum=1, free=True)
    by: str = key(
        "ring", "ring: keys and values go around; ulysses: ranks exchange heads", ("ring", "ulysses"), free=True
    )
    sequence_parallel: bool = key(
        False, "between layers each rank of `tensor` has a slice of the sequence, not all of it", free=True
    )
    cut: Any = key(AUTO, CUT_HELP, free=True)
    micro_batches: int = key(4, "with a pipeline: micro-batches that a batch is piped through in", minimum=1, free=True)
    schedule: str = key(
        "1f1b", "order of the micro-batches' forwards and backwards", ("gpipe", "1f1b", "interleaved"), free=True
    )

    @property
    def pipeline_stages(self) -> int:
        return self.pipeline

    @property
    def pipeline_micro_batches(self) -> int:
        return self.micro_batches if self.pipeline > 1 else 1

    @property
    def parts(self) -> int:
        """That the model is cut into."""
        return self.pipeline * STAGES_A_RANK[self.schedule]


def check(config: ParallelMeshConfig, share: int) -> None:
    """Whether the mesh has as many places as there are ranks, and the model as many parts, before anything starts."""
    groups = config.global_batch_size // share  # of ranks that see the same samples
    if groups % config.replicate or config.shard not in (None, groups // config.replicate):
        asked = (
            f"replicate={config.replicate} × shard={config.shard}" if config.shard else f"replicate={config.replicate}"
        )
        raise UserError(
            f"{asked}: pipeline={config.pipeline} × context={config.context} × tensor={config.tensor} leave {groups} groups "
            "of ranks for them; set nproc to the product of all five, or leave out shard, which then is what is left"
        )
    if config.compile:
        raise UserError("compile=true: is for what a rank computes by itself, and layers are shared here; leave it out")
    name, task, model = short_name(config.task.name), known_task(config), sketch(config)
    if has_batchnorm(config):
        raise UserError(f"task={name}: its BatchNorm would normalise by each rank's share; use recipes.fsdp")
    slices = config.tensor if config.sequence_parallel else 1
    if config.sequence_parallel and config.tensor == 1:
        raise UserError("sequence_parallel=true: is for ranks that share layers; set tensor=2 or more, or leave it out")
    if config.tensor > 1:
        tensor_parallel_plan(task, name, model, config.tensor, config.sequence_parallel)
    refuse_tied(model, "parallel_mesh", blocks_of_task(task, model))
    if config.context > 1:
        modules = context_modules(task, name, model, config.context)
        check_attention(name, model, modules, one_sample(config)[0], config.context, config.by, config.tensor, slices)
    if config.pipeline > 1:
        check_stages(config, config.pipeline, config.parts)
    for key_of_stages in ("cut", "micro_batches", "schedule") if config.pipeline == 1 else ():
        if (value := getattr(config, key_of_stages)) != getattr(ParallelMeshConfig, key_of_stages):
            raise UserError(f"{key_of_stages}={value}: is for a pipeline; set pipeline=2 or more, or leave it out")


def make_meshes(run: Run[ParallelMeshConfig]) -> tuple[DeviceMesh, DeviceMesh]:
    """The same ranks twice: by what they hold of the weights, and by what they see of the batch."""
    config, device = run.config, run.device.type
    seen = (run.shards, config.pipeline, config.context, config.tensor)
    samples = init_device_mesh(device, seen, mesh_dim_names=("batch", "pipeline", "context", "tensor"))
    held = samples.mesh.transpose(0, 1)  # those that share the weights of a stage lie together
    shape = (config.pipeline, config.replicate, run.shards // config.replicate * config.context, config.tensor)
    return DeviceMesh(device, held.reshape(shape), mesh_dim_names=("pipeline", "replicate", "shard", "tensor")), samples


def cut_into_stages(run: Run[ParallelMeshConfig], model: Any, mesh: DeviceMesh) -> Pipeline:
    """The model on the host, cut; this rank's stages of it are to be shared and sharded."""
    config = run.config
    refuse_gloo_between_gpus(run.device.type, run.world.backend)
    model = run.place(model)
    example = run.data.example(config.global_batch_size // run.shards // config.micro_batches).inputs
    parts = agreed_parts(model, wanted_cut(config.cut, config.parts), config.parts, example, run.blocks(model))
    return Pipeline(model, parts, mesh, run.device, example, config.schedule, config.micro_batches)


@recipe(
    config=ParallelMeshConfig,
    task="language",
    proof=(Proof(), Proof(own={"tensor": 1, "context": 2}, precisions=("fp64",))),
    check=check,
    next_command="python -m recipes.plan task=language     what each technique would hold and send",
)
def train(run: Run[ParallelMeshConfig]) -> None:
    config, name, sequence = run.config, short_name(run.config.task.name), run.config.sequence_parallel
    weights, samples = make_meshes(run)
    slices = config.tensor if sequence else 1
    share = ContextShare(samples.get_group("context"), config.by, option(run.task, "weigh"), slices)
    model: Any = run.task.build_model().to(DTYPES[config.precision])
    blocks = run.blocks(model)
    attention = context_modules(run.task, name, model, config.context) if config.context > 1 else []
    plan = tensor_parallel_plan(run.task, name, model, config.tensor, sequence) if config.tensor > 1 else {}
    stages = cut_into_stages(run, model, samples) if config.pipeline > 1 else None
    around: Any = stages.around if stages else None  # what is called in place of the stages that the rank holds
    model = stages.mine if stages else model
    if plan:  # first: fully_shard cuts what a rank then has
        whole = config.context == 1  # where a rank has a part of a sequence, nothing can be filled up behind it
        share_layers(model, plan, layer_styles(sequence), weights["tensor"], sequence, around, causal=whole)
        expect_two_gathers()
    share_sequence(model, attention, share, around)
    model = model.to(run.device) if stages else run.place(model)
    mesh = weights["replicate", "shard"] if config.replicate > 1 else weights["shard"]
    of_block, of_rest = precision_policies(config.precision)
    sum_embeddings_in_fp32(model, config.precision, run.device)
    held = dict(model.named_modules())
    for block in blocks:
        if block in held:  # else it is another stage's
            fully_shard(held[block], mesh=mesh, mp_policy=of_block)
    for number, part in stages.stages.items() if stages else [(config.parts - 1, model)]:
        fully_shard(part, mesh=mesh, mp_policy=of_rest if number == config.parts - 1 else of_block)
    model, of_stages = (stages.sharded(), stages.handed()) if stages else (model, {})
    optimizer = build_optimizer(run.config.optim, model)
    scheduler = build_scheduler(run.config.optim, optimizer, run.scheduled_steps)
    scaler = run.scaler()  # precision=fp16 needs it; else it passes everything on

    for batch in run.steps(model=model, optimizer=optimizer, scheduler=scheduler, **of_stages):
        with loss_parallel(), implicit_replication():  # the loss of logits of which each rank has some; backward too
            if stages:  # forward and backward of all micro-batches; the loss is known where the model ends
                stages.step(batch, share, run.task, scaler, run.record)
            for micro in [] if stages else micro_batches(batch, run.config.accumulate, model):
                model.set_requires_gradient_sync(micro.last)
                micro = share.part(micro)  # the targets at this rank's positions, and their weight among all
                loss = run.task.loss(model(micro.inputs), micro.targets)
                loss = share.counted(full_tensor(loss, run.device), micro)
                scaler.scale(loss * micro.weight).backward()
                run.record(loss=loss, weight=micro.weight)
        clip_gradients(model, optimizer, scaler, run.config.gradients, stages.group if stages else None)
        scaler.step(optimizer)  # unscales the gradients, unless that is done; if one is not finite, no rank updates
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    train.main()
