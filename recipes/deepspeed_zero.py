"""DeepSpeed's ZeRO: data parallelism in which a rank keeps only its part of what all ranks would keep alike.

Under DDP every rank holds all weights, all gradients and the optimizer's state of all weights. ZeRO cuts them among the
N ranks, one more of them with each stage, and every cut is paid by a message that brings the rest when it is needed:

    stage=1   the optimizer's state. Gradients are averaged once a step; each rank updates its part of the weights
                   and sends it to all others.
    stage=2   gradients too: while backward runs, a bucket that is complete goes to the rank whose part it is, with
                   every micro-batch, and is freed elsewhere.
    stage=3   weights too: each layer is gathered from all ranks before its forward, again before its backward, and
                   freed after both. Half as much again to send as DDP has.
    stage=0   nothing: DDP.

The optimizer's state includes a copy of the weights in fp32, so with SGD and two ranks stage 1 saves nothing; the
summary says what a rank holds. `offload=true` moves the rank's part of it to the host's memory. Every stage trains
what recipes.ddp does, on CPU and gloo to the last bit, as long as there is one micro-batch: stages 2 and 3 add them up
in another order. `precision=bf16` and `fp16` are autocast, here as in every recipe, and from stage 1 on gradients also
travel in them. There is no fp64, because DeepSpeed updates in fp32 whatever the model computes in.

`accumulate=N` is DeepSpeed's own: engine.step() updates after the last micro-batch, and only counts before. It would
divide each loss by N; here a micro-batch counts for what it is, also a ragged last one. Started by the same launchers
as every recipe, DeepSpeed joins their process group, and nothing is compiled. BatchNorm stays local, as under DDP.

A checkpoint holds DeepSpeed's own files in the folder deepspeed/, for its own tools too (`zero_to_fp32.py … -t
deepspeed`, and with AdamW `ds_to_universal --inject_missing_state`), and goes on with any number of ranks in any stage.
They are pickles; here they are read only where their hashes are intact, and without running code. In stage 3 every rank
holds the whole model while it evaluates or exports.

    python -m recipes.deepspeed_zero                                         stage 2, two ranks
    python -m recipes.deepspeed_zero stage=3 optim=adamw accumulate=4

Expect: an accuracy of 0.97 or more on the digits, in about a minute on two CPU cores.
Source: https://arxiv.org/abs/1910.02054 (ZeRO), https://www.deepspeed.ai/docs/config-json/
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lockstep import Proof, Run, UserError, recipe
from lockstep.config.keys import AUTO, key
from lockstep.config.schema import Config
from lockstep.distributed.collectives import gather_numbers
from lockstep.training.accumulate import micro_batches
from lockstep.training.optim import build_optimizer, build_scheduler
from lockstep.training.precision import AUTOCAST


@dataclass
class ZeroConfig(Config):
    flat_weights = True
    stage: int = key(
        2,
        "what each rank keeps only its part of: 0 nothing, 1 the optimizer, 2 gradients too, 3 weights too",
        (0, 1, 2, 3),
    )
    offload: bool = key(False, "keep the optimizer's part in host memory, and update there")


def deepspeed_config(run: Run[ZeroConfig]) -> dict[str, Any]:
    """DeepSpeed's configuration: what ours says, in its words, and no number left to its defaults.

    Learning rate, momentum and weight decay are the optimizer's, which is handed in beside it.
    """
    config, share = run.config, run.config.global_batch_size // run.shards  # images of a global batch for this rank
    largest = -(-share // config.accumulate)  # images in a micro-batch; the last one may be smaller
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": largest,
        "gradient_accumulation_steps": -(-share // largest),
        # Its default is 1.0. In stage 0, clip_gradients below sees to it, as in every recipe.
        "gradient_clipping": (config.gradients.clip_norm or 0.0) if config.stage else 0.0,
        "torch_autocast": {
            "enabled": config.precision in AUTOCAST,
            "dtype": str(AUTOCAST.get(config.precision, torch.bfloat16)).removeprefix("torch."),
        },
        "zero_optimization": {
            "stage": config.stage,
            "reduce_bucket_size": 2**22,  # elements in one all-reduce; the default, 5e8, takes 2 GB
            "stage3_param_persistence_threshold": 1000,  # smaller parameters stay whole
        },
        "zero_allow_untested_optimizer": True,  # it has tested Adam; the proof below tests SGD
    }
    if config.offload:
        found["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": run.device.type == "cuda"}
        found["zero_force_ds_cpu_optimizer"] = False  # torch's own will do: DeepSpeed's has to be compiled
    return found


def check(config: ZeroConfig, share: int) -> None:
    """What DeepSpeed cannot do, before anything starts."""
    if config.precision == "fp64":
        raise UserError(
            "precision=fp64: DeepSpeed's optimizer computes in fp32 and would lose it; allowed are fp32, bf16 and fp16"
        )
    if config.compile:
        raise UserError(
            "compile=true: DeepSpeed compiles in a way of its own, which this recipe leaves out; leave compile out"
        )
    if config.channels_last not in (AUTO, False):
        raise UserError("channels_last=true: DeepSpeed keeps the weights as one long vector; leave channels_last out")
    if config.optim.name in ("muon", "torch.optim.Muon") and config.stage:
        raise UserError("optim.name=muon: needs matrices, and DeepSpeed's optimizer gets one long vector; set stage=0")
    if config.offload and not config.stage:
        raise UserError("offload=true: stage 0 leaves the optimizer whole; set stage to 1, 2 or 3")


@recipe(
    config=ZeroConfig,
    needs="deepspeed",
    proof=Proof(
        {"model.norm": "group"},
        {"accumulate": 4},
        {"model.norm": "batch"},
        "BatchNorm sees micro-batches",
        precisions=("fp32", "bf16", "fp16"),
    ),
    check=check,
    next_command="python -m recipes.ddp     the whole of everything on each rank, to compare with",
)
def train(run: Run[ZeroConfig]) -> None:
    os.environ["DS_ACCELERATOR"] = run.device.type  # read when DeepSpeed is imported
    import deepspeed

    from lockstep.integrations import deepspeed as zero

    model = run.place(run.task.build_model())
    optimizer = build_optimizer(run.config.optim, model)
    scheduler = build_scheduler(run.config.optim, optimizer, run.scheduled_steps)
    with zero.prepared(run):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(run))
    scaler = run.scaler()  # precision=fp16: in DeepSpeed's backward and step, in place of its own

    def whole() -> nn.Module:
        if run.config.stage < 3:
            return model
        with torch.device("meta"):  # memory only when the weights come, and no random number drawn
            plain = run.task.build_model()
        return zero.gather_module(model, plain)

    zero_engine = zero.ZeroEngine(run, engine, scaler)
    for batch in run.steps(model=engine, optimizer=optimizer, scheduler=scheduler, whole=whole, engine=zero_engine):
        for micro in micro_batches(batch, run.config.accumulate, model):  # one, unless accumulate=N
            with run.autocast():
                loss = run.task.loss(engine(micro.inputs), micro.targets)
            engine.backward(loss * micro.weight, scale_wrt_gas=False)  # else it divides by the number of micro-batches
            run.record(loss=loss, weight=micro.weight)
            if micro.last:
                zero_engine.clip_gradients(run.config.gradients)  # from stage 1 on by value: step() clips by the norm
            engine.step()  # the update, after the last of them
        scheduler.step()

    held = {name: gather_numbers(size, run.device) for name, size in zero_engine.held_bytes().items()}
    run.note(
        f"held: {', '.join(f'{max(sizes) / 2**20:,.1f} MiB {name}' for name, sizes in held.items())}, by a rank",
        state_bytes_by_rank=[int(sum(sizes)) for sizes in zip(*held.values(), strict=True)],
        state_bytes_unsharded=zero_engine.unsharded_bytes(),
        **{f"held_{name}_bytes": [int(size) for size in sizes] for name, sizes in held.items()},
    )


if __name__ == "__main__":
    train.main()
