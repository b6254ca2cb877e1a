"""Expert parallelism: a mixture's experts are cut over ranks, and each token travels to the ranks of its experts and back.

In a mixture of experts a block has E SwiGLUs, and a router sends each token through k of them: E times the weights for k
times the work. Those weights are most of the model, and each of c ranks holds E / c of the experts of every block,
their gradients and their optimizer state. All else (attention, router, norms, embedding) is whole on every rank, and
each rank has its own share of the batch, as under DDP. In every block, each rank

- routes its own tokens, sorts k copies of each by expert, and tells every other rank how many it will get;
- dispatch: one all-to-all takes the copies to their experts' ranks, which compute them, from whichever rank they are;
- combine: one all-to-all takes the outputs back to where their tokens are, to be weighed and added up.

Backward is the same two the other way round, so an expert's gradient comes together by itself, over the tokens of
all c ranks: it must not be all-reduced among them as the others are, or it would count c times.

With L blocks, S tokens per rank and step, B the bytes of one token's activation (width · bytes per number), the ranks
send, on average,

    tokens      L · 4 · k · S · B, of which a share of about 1 / c stays where it is, for experts of one's own
    counts      L · 8 · E, how many rows each expert gets (once more for tokens where blocks are computed again)
    gradients   those of all that is not an expert, once, as DDP's; and of experts, among copies of them alone

in every step, if no expert has a capacity, which lessens the first. It depends on tokens, not on experts: E may grow
with the ranks. Nothing hides it, for the block waits, and who has the most popular experts is waited for: so the loss has
an addend that keeps experts evenly used (lockstep.models.experts: over which tokens, and why over those). The host
learns the sizes from the device twice per block, which a GPU has to be waited for.

`balance=bias` keeps them evenly used by another means: each expert has a bias that only chooses, raised or lowered by
`bias_rate` after every step, as the whole batch used it less or more than others: 8 · L · E bytes more in an all-reduce. Set
task.balance=0 besides, or a small one, as DeepSeek-V3 has it. The paper's rate is for many thousand steps: on 3 epochs of the
digits bias_rate=0.01 halves how far the most popular of 8 experts is above the mean. Checkpoints hold the biases.

More than `expert` ranks make copies: the mesh is ("data", "expert"), neighbours share the experts, and copies average
their experts' gradients. Checkpoints hold whole tensors by name, for any mesh and any other recipe.

Which modules hold experts is the task's to say, `expert_parallel_modules(model)`: lockstep.parallel.expert_plan says what
they must be like, and task=language is an example; here it has 8 experts (task.experts) unless told otherwise.

Choose it when most weights are experts': with `expert` up to the GPUs that all-to-all is fast among. A dense model, or
few large experts, go with recipes.fsdp, whose traffic is that of the weights, whatever the batch.

    python -m recipes.expert_parallel                                       8 experts, 4 on each of two ranks
    python -m recipes.expert_parallel nproc=4 task.experts_per_token=1      two copies of them; Switch's routing
    python -m recipes.expert_parallel nproc=4 expert=4 task.capacity=1.25   one, 2 experts on each of four

Expect: what recipes.ddp task=language task.experts=8 gives; in the summary about half of its state on each of two ranks,
because nearly all weights are experts'.
Source: https://arxiv.org/abs/1701.06538 (Shazeer 2017), https://arxiv.org/abs/2006.16668 (GShard),
https://arxiv.org/abs/2101.03961 (Switch), https://arxiv.org/abs/2412.19437 (DeepSeek-V3),
https://arxiv.org/abs/2408.15664 (balance=bias)
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lockstep import Proof, Run, UserError, recipe
from lockstep.config.keys import key
from lockstep.config.schema import Config
from lockstep.config.tasks import short_name
from lockstep.models.experts import MixtureOfExperts
from lockstep.parallel.expert_plan import expert_modules
from lockstep.parallel.experts import average_over_ranks, biased_mixtures, share_experts, update_biases
from lockstep.tasks.build import known_task, sketch
from lockstep.training.accumulate import micro_batches
from lockstep.training.clip import clip_gradients
from lockstep.training.optim import build_optimizer, build_scheduler
from lockstep.training.precision import DTYPES
from lockstep.utils.text import divisors


@dataclass
class ExpertParallelConfig(Config):
    task_defaults: ClassVar[dict[str, Any]] = {"experts": 8}
    expert: int = key(2, "ranks that share the experts of each block", minimum=1, free=True)
    balance: str = key(
        "loss", "loss: task.balance, an addend; bias: of each expert, moved after a step", ("loss", "bias")
    )
    bias_rate: float = key(0.001, "balance=bias: by how much a bias is moved", minimum=0, maximum=1)


def check(config: ExpertParallelConfig, share: int) -> None:
    """Whether there are experts, and whether they and the ranks divide, before anything starts."""
    if config.compile:
        raise UserError("compile=true: is for what a rank computes by itself, and experts are shared; leave it out")
    ranks = config.global_batch_size // share
    if ranks % config.expert:
        raise UserError(f"expert={config.expert}: {ranks} ranks do not divide by it; allowed are {divisors(ranks)}")
    model = sketch(config)
    expert_modules(known_task(config), short_name(config.task.name), model, config.expert)
    if config.balance == "bias":
        biased_mixtures(model, short_name(config.task.name))


def balance_alone(run: Run, model: nn.Module) -> None:
    """Have `single` balance by biases, from the choices of its whole batch, as ranks do from the sum of theirs."""
    micro_batches_done: Counter[nn.Parameter] = Counter()

    def move(mixture: MixtureOfExperts, router: nn.Parameter) -> None:
        micro_batches_done[router] += 1
        if mixture.bias is not None and micro_batches_done[router] % run.config.accumulate == 0:
            mixture.bias += run.config.bias_rate * (mixture.chosen.double().mean() - mixture.chosen).sign()
            mixture.chosen.zero_()

    for mixture in biased_mixtures(model, short_name(run.config.task.name)) if run.recipe == "single" else ():
        mixture.router.weight.register_post_accumulate_grad_hook(partial(move, mixture))


@recipe(
    config=ExpertParallelConfig,
    task="language",
    proof=(
        Proof({"task.experts": 4, "task.balance": 0.1}, {"balance": "loss"}),
        Proof(
            {"task.experts": 4, "task.balance": 0.1},
            {"balance": "bias", "bias_rate": 0.03},
            precisions=("fp64",),  # in less, a token near two experts goes through the other one
            prepare=balance_alone,
        ),
    ),
    check=check,
    next_command="python -m recipes.ddp task=language task.experts=8     all experts on every rank: compare the memory",
)
def train(run: Run[ExpertParallelConfig]) -> None:
    shape = run.world.world_size // run.config.expert, run.config.expert
    mesh = init_device_mesh(run.device.type, shape, mesh_dim_names=("data", "expert"))
    model = run.task.build_model().to(DTYPES[run.config.precision])
    mixtures = biased_mixtures(model, short_name(run.config.task.name)) if run.config.balance == "bias" else []
    modules = expert_modules(run.task, short_name(run.config.task.name), model, run.config.expert)
    model = run.place(share_experts(model, modules, mesh))
    optimizer = build_optimizer(run.config.optim, model)
    scheduler = build_scheduler(run.config.optim, optimizer, run.scheduled_steps)
    scaler = run.scaler()  # precision=fp16 needs it; else it passes everything on

    for batch in run.steps(model=model, optimizer=optimizer, scheduler=scheduler):
        for micro in micro_batches(batch, run.config.accumulate, model):  # one, unless accumulate=N
            with run.autocast():
                loss = run.task.loss(model(micro.inputs), micro.targets)
            scaler.scale(loss * micro.weight).backward()
            run.record(loss=loss, weight=micro.weight)
        average_over_ranks(model, mesh)
        clip_gradients(model, optimizer, scaler, run.config.gradients)
        scaler.step(optimizer)  # unscales the gradients, unless that is done; if one is not finite, no rank updates
        update_biases(mixtures, run.config.bias_rate)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    train.main()
