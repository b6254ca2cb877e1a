"""ZeRO-1: DDP whose optimizer state is dealt out, so that each rank keeps and updates 1 / n of it.

DDP holds everything on every rank, and AdamW's two moments take twice the weights' memory. But all ranks make the same
update n times over. Here every parameter belongs to one rank, dealt out whole, the largest first, to whoever has least.
Weights and gradients stay whole everywhere:

- backward: DDP's all-reduce leaves the mean gradients G on every rank; each sends 2 (n − 1) / n · G bytes;
- update: rank r updates the parameters that are its own, with the only copy of their state;
- then it broadcasts them to the others, which is (n − 1) / n · W bytes for each rank, if they all have equally much.

So half as much again as DDP's traffic, as FSDP, and it waits for the broadcasts, which nothing hides. In return the
memory for the optimizer is divided by n: of W + W + kW bytes for weights, gradients and k states a weight, W + W + kW / n
are left. The summary states it for each rank.

Choose it when DDP fits but for AdamW's state, and the model should stay one that any code can call: its weights are
whole between two steps. recipes.fsdp shards weights and gradients too, for the same traffic; recipes.deepspeed_zero
stage=1 cuts one long vector, where Muon, which works here, would find no matrices.

Checkpoints hold each state once, under its name, written by the rank that keeps it; any number of ranks resumes them.

    python -m recipes.zero1 optim=adamw                        two ranks on this machine, or one per GPU
    python -m recipes.zero1 nproc=4 optim=muon                 a quarter of Muon's and AdamW's state each

Expect: the accuracy of recipes.ddp, 0.97 or more on the digits, in about a minute on two CPU cores.
Source: https://arxiv.org/abs/1910.02054 (ZeRO, stage 1),
https://docs.pytorch.org/tutorials/recipes/zero_redundancy_optimizer.html
"""

from torch.nn.parallel import DistributedDataParallel

from lockstep import Proof, Run, recipe
from lockstep.config.schema import Config
from lockstep.distributed.collectives import gather_numbers
from lockstep.memory.tracker import state_bytes
from lockstep.parallel.sharded_optimizer import ShardedOptimizer
from lockstep.training.accumulate import micro_batches
from lockstep.training.clip import clip_gradients
from lockstep.training.optim import build_optimizer, build_scheduler


@recipe(
    proof=(
        Proof(
            {"model.norm": "group"},
            differs={"model.norm": "batch"},
            because="BatchNorm normalises by each rank's share",
        ),
        Proof({"model.norm": "group", "optim.name": "adamw", "optim.lr": 0.001}, {"accumulate": 2}),
    ),
    next_command="python -m recipes.fsdp     weights and gradients are sharded too: compare the memory",
)
def train(run: Run[Config]) -> None:
    model = run.place(run.task.build_model())
    model = DistributedDataParallel(model, device_ids=run.device_ids, gradient_as_bucket_view=True)
    optimizer = build_optimizer(run.config.optim, model)
    optimizer = ShardedOptimizer(optimizer)  # torch's ZeroRedundancyOptimizer, of the same parameters and settings
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

    held, _ = state_bytes(optimizer)
    weights = 2 * sum(parameter.nbytes for parameter in model.parameters())  # and their gradients
    states = [int(size) for size in gather_numbers(held - weights, run.device)]
    run.note(
        f"held: {', '.join(f'{size / 2**20:,.1f}' for size in states)} MiB of optimizer state, by rank",
        optimizer_bytes_by_rank=states,
        state_bytes_unsharded=weights + sum(states),
    )


if __name__ == "__main__":
    train.main()
