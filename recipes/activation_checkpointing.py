"""Activation checkpointing: blocks keep little of their forward, and compute it once more when backward needs it.

Backward needs what forward computed, so all of it is kept, and of a deep model or a long sequence that is more than
weights, gradients and optimizer together. A block that is checkpointed keeps its inputs alone. When backward comes to
it, it runs its forward again, uses what comes out, and lets go of it before the block in front is begun. So of B blocks
which each keep a bytes, and whose input has i bytes, not B · a are held but B · i + a, for at most one more forward:
a third of the step's arithmetic. `checkpoint_activations` says which:

    full         each block; the least memory, the most arithmetic
    selective    each block, but the results of matrix products, convolutions and attention are kept: what is computed
                 again is cheap (norms, activations, dropout), and holds about half of the memory
    K            every K-th block in full, the others keep everything: the dial in between
    none         all is kept

It sends nothing: the ranks' traffic is DDP's, 2 (n − 1) / n times the gradients' bytes per step for each of n ranks. (A
layer that talks in its forward, as synchronised BatchNorm does, talks again in the second one.)

The bits are those of keeping everything, because the second forward repeats the first: same random numbers, so dropout
drops the same; same autocast; and the buffers that the first one began with, or BatchNorm would count each batch twice.
All of it is applied from outside, by `run.place`, in `lockstep.training.activation_checkpointing`; this is the loop of
recipes.ddp, and the key works in every recipe but data_parallel.

Choose it when the batch, the sequence or the depth that you want does not fit; before fsdp if it is activations that
don't fit (`memory=report` says), beside it if nothing does. With small inputs per block and much arithmetic (a ResNet)
`selective` or a K; where attention keeps T² (or your blocks keep much else), `full`.

    python -m recipes.activation_checkpointing                                    full, two ranks
    python -m recipes.activation_checkpointing checkpoint_activations=selective task=language
    python -m recipes.ddp checkpoint_activations=2 memory=report                  by layer, in memory.json

Expect: the accuracy of recipes.ddp to the last bit, 0.97 or more on the digits, in about a minute and a half on two CPU
cores; the summary says what is kept, and what would be.
Source: https://arxiv.org/abs/1604.06174 (the idea), https://arxiv.org/abs/2205.05198 (selective),
https://docs.pytorch.org/docs/stable/checkpoint.html
"""

from torch.nn.parallel import DistributedDataParallel

from lockstep import Proof, Run, recipe
from lockstep.config.schema import Config
from lockstep.memory.tracker import saved_bytes
from lockstep.training.accumulate import micro_batches
from lockstep.training.activation_checkpointing import keeping_all
from lockstep.training.clip import clip_gradients
from lockstep.training.optim import build_optimizer, build_scheduler


@recipe(
    proof=(
        Proof(
            {"model.norm": "group"},
            {"checkpoint_activations": "full"},
            {"model.norm": "batch"},
            "BatchNorm normalises by each rank's share",
        ),
        Proof({"model.norm": "group"}, {"checkpoint_activations": "selective"}),
        Proof({"model.norm": "group"}, {"checkpoint_activations": 2}),
    ),
    next_command="python -m recipes.ddp     the same training to the last bit, and everything is kept: compare the memory",
)
def train(run: Run[Config]) -> None:
    model = run.place(run.task.build_model())  # and have its blocks compute again what they do not keep
    model = DistributedDataParallel(model, device_ids=run.device_ids, gradient_as_bucket_view=True)
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

    with run.autocast():
        kept, all_of_it = saved_bytes(model.module, micro.inputs), saved_bytes(keeping_all(model.module), micro.inputs)
    run.note(
        f"kept: {kept / 2**20:.1f} MiB for backward with checkpoint_activations={run.config.checkpoint_activations}, "
        f"{all_of_it / 2**20:.1f} MiB without",
        saved_bytes=kept,
        saved_bytes_without=all_of_it,
    )


if __name__ == "__main__":
    train.main()
