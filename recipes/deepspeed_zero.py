"""DeepSpeed ZeRO: data parallelism in which each rank keeps only its part of what the update needs."""

import os
from typing import Any

from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW, Optimizer

from lockstep import Proof, Run, UserError, recipe
from lockstep.accumulate import micro_batches
from lockstep.metrics import gather_numbers
from lockstep.models import build_model
from lockstep.schema import Config


def deepspeed_config(config: Config, share: int) -> dict[str, Any]:
    """DeepSpeed's configuration: what ours says, in its words, and nothing left to its defaults that decides numbers.

    Args:
        share: images of a global batch that one rank works on.
    """
    largest = -(-share // config.accumulate)  # images in a micro-batch; the last one may be smaller
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": largest,
        "gradient_accumulation_steps": -(-share // largest),
        "gradient_clipping": 0.0,  # its default is 1.0
        "torch_autocast": {"enabled": config.precision == "bf16", "dtype": "bfloat16"},
        "zero_optimization": {
            "stage": config.zero.stage,
            "reduce_bucket_size": 2**22,  # elements in one all-reduce; the default, 5e8, takes 2 GB
            "stage3_param_persistence_threshold": 1000,  # smaller parameters stay whole
        },
        "zero_allow_untested_optimizer": True,  # it has tested Adam; the proof below tests SGD
    }
    if config.zero.offload:
        found["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": config.device == "cuda"}
        found["zero_force_ds_cpu_optimizer"] = False  # torch's own will do: DeepSpeed's has to be compiled
    return found


def check(config: Config, share: int) -> None:
    """What DeepSpeed cannot do, before anything starts."""
    if config.precision == "fp64":
        raise UserError(
            "precision=fp64: DeepSpeed's optimizer computes in fp32 and would lose it; allowed are fp32 and bf16"
        )
    if config.zero.offload and not config.zero.stage:
        raise UserError("zero.offload=true: stage 0 leaves the optimizer whole; set zero.stage to 1, 2 or 3")


@recipe(
    needs="deepspeed",
    proof=Proof(
        {"model.norm": "group"},
        {"accumulate": 4},
        {"model.norm": "batch"},
        "BatchNorm sees micro-batches",
        precisions=("fp32", "bf16"),
    ),
    check=check,
    next_command="python -m recipes.ddp     the whole of everything on each rank, to compare with",
)
def train(run: Run) -> None:
    os.environ["DS_ACCELERATOR"] = run.device.type  # read when DeepSpeed is imported
    import deepspeed

    from lockstep import zero

    model = run.place(build_model(run.config.model))
    optim = run.config.optim
    if optim.name == "sgd":
        optimizer: Optimizer = SGD(
            model.parameters(), lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay
        )
    else:
        optimizer = AdamW(model.parameters(), lr=optim.lr, weight_decay=optim.weight_decay)
    with zero.prepared(run):
        settings = deepspeed_config(run.config, run.config.batch_size // run.shards)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    def whole() -> nn.Module:
        if run.config.zero.stage < 3:
            return model
        return zero.gather(model, run.place(build_model(run.config.model)))

    files = zero.Files(engine)
    for batch in run.steps(model=engine, optimizer=optimizer, whole=whole, engine=files):
        for micro in micro_batches(batch, run.config.accumulate, model):  # one, unless accumulate=N
            with run.autocast():
                loss = cross_entropy(engine(micro.images), micro.labels)
            engine.backward(loss * micro.weight, scale_wrt_gas=False)
            run.record(loss=loss, weight=micro.weight)
            engine.step()

    held = files.held_bytes()
    parts = {name: gather_numbers(size, run.device) for name, size in held.items()}
    run.note(
        f"held: {', '.join(f'{name} {max(sizes) / 2**20:,.0f}' for name, sizes in parts.items())} MiB by a rank",
        **{f"{name}_bytes": [int(size) for size in sizes] for name, sizes in parts.items()},
    )


if __name__ == "__main__":
    train.main()
