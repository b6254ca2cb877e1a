"""LoRA: a trained model, frozen, and beside each of its layers two small matrices, which alone are trained.

A layer's weight W [outputs, inputs] stays as it is, and the layer computes W x + (α / r) B A x, with A [r, inputs] drawn
at random and B [outputs, r] zero: training begins with what the trained model does. r is small, 4 to 64, so of a layer
of 768 × 768 and r = 8 two per cent are trained. What that saves where ranks meet and memory ends:

- gradients: DDP's all-reduce has those of A and B, so each of n ranks sends 2 (n − 1) / n of their bytes per step;
- AdamW's two moments, and the gradients themselves: of A and B alone;
- activations: nearly nothing, for A and B need the layer's input, and what lies below needs its gradient.

Afterwards W + (α / r) B A is a weight like any other: `model.pt` and `best.pt` hold the model as it was before, under
the names it had, which every recipe, `python -m lockstep export` and any code take; it is as fast as before. What is
evaluated is that model, too. A convolution is a matrix as well, and is adapted alike, with A the convolution.

Choose it to adapt a model whose optimizer state or gradients do not fit, or whose all-reduce takes too long. The new
data should not differ too much: with enough memory recipes.ddp resume=PATH reaches more. For other classes the last layer
must be a new one: `new_head=true` trains it whole. A BatchNorm keeps the running statistics that it has.

The trained model is `resume=PATH`: a run, one of its checkpoints, or any file of its weights. Started again in the same
`out=`, the run goes on where it was. `layers=[*.attention.*]` names by pattern which are adapted. Unless told it is
every Linear and Conv2d that has no side smaller than r; the summary counts them.

    python -m recipes.ddp data.classes=[0,1,2,3,4] out=five                            five digits, then the other five
    python -m recipes.lora resume=five data.classes=[5,6,7,8,9] new_head=true optim.lr=0.003
    python -m recipes.ddp task=language task.text=much.txt out=base                    a GPT, then texts of another kind
    python -m recipes.lora task=language task.text=mine.txt resume=base r=16

Expect: an accuracy of 0.96 or more on the other five digits with the second command, in a minute on two CPU cores.
Source: https://arxiv.org/abs/2106.09685
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lockstep import Proof, Run, UserError, recipe
from lockstep.checkpoint.backbone import backbone
from lockstep.config.keys import key
from lockstep.config.schema import Config
from lockstep.models.freeze import hold_statistics
from lockstep.models.lora import ADAPTER, adapt, adaptable, merged
from lockstep.models.parameters import NO_HEAD, count_parameters, head_of
from lockstep.tasks.build import sketch
from lockstep.training.accumulate import micro_batches
from lockstep.training.clip import clip_gradients
from lockstep.training.optim import build_optimizer, build_scheduler


@dataclass
class LoraConfig(Config):
    r: int = key(8, "rank of the product of the two matrices", minimum=1)
    alpha: float = key(16.0, "the product is multiplied by alpha / r", minimum=0)
    layers: list[str] | None = key(
        None, "patterns of the layers that are adapted, such as [*.attention.*] (null: every Linear and Conv2d)"
    )
    merge: bool = key(True, "model.pt and best.pt hold the products added into the weights; false: beside them")
    new_head: bool = key(False, "the last layer is a new one, trained whole, as other classes need it")
    weights: str | None = key(
        None,
        "torchvision's trained model, downloaded once (imagenet: its best); random: none (resume=PATH names one of yours)",
        ("imagenet", "IMAGENET1K_V1", "IMAGENET1K_V2", "random"),
    )


def head_name(config: LoraConfig, model: nn.Module) -> str:
    """What the names begin with of those parameters that are neither loaded nor frozen."""
    return head_of(model) if config.new_head else NO_HEAD


def chosen_layers(config: LoraConfig, model: nn.Module) -> list[str]:
    """The layers to be adapted.

    Raises:
        UserError: a pattern matches none, or r is too large for one, or none is left.
    """
    possible, head = adaptable(model), head_name(config, model)
    patterns = ["*"] if config.layers is None else config.layers
    text = f"layers=[{','.join(patterns)}]"
    if not patterns:
        raise UserError(f"{text}: names none, so nothing would be trained; leave it out, or name layers")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in possible):
            raise UserError(
                f"{text}: {pattern} matches no Linear and no ungrouped Conv2d; they are called "
                f"{', '.join([*possible][:4])}{', …' if len(possible) > 4 else ''}; allowed are such names, with * and ?"
            )
    chosen = [
        name
        for name in possible
        if any(fnmatchcase(name, pattern) for pattern in patterns) and not f"{name}.".startswith(head)
    ]
    if not chosen:
        raise UserError(f"{text}: only {head}* is left, which new_head=true trains whole; name other layers")
    least = min(chosen, key=lambda name: possible[name])
    if config.layers is not None and config.r > possible[least]:
        raise UserError(
            f"r={config.r}: {least} has a smaller side of {possible[least]}; allowed are 1…{possible[least]}, or other layers="
        )
    fitting = [name for name in chosen if config.r <= possible[name]]
    if not fitting:
        most = max(possible[name] for name in chosen)
        raise UserError(f"r={config.r}: every layer has a side that is smaller; allowed are 1…{most}")
    return fitting


def prepare(run: Run[LoraConfig], model: nn.Module) -> None:
    """Make a new model the one that is trained here: the trained weights, frozen, and their adapters."""
    head = head_name(run.config, model)
    model.load_state_dict(run.backbone(model, head, run.config.weights), strict=False)  # a new head stays as drawn
    model.requires_grad_(False)
    hold_statistics(model)
    adapt(model, chosen_layers(run.config, model), run.config.r, run.config.alpha)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(ADAPTER) or name.startswith(head))


def check(config: LoraConfig, share: int) -> None:
    """The patterns must match, r be small enough, and the trained model be there and fit."""
    model = sketch(config)
    chosen_layers(config, model)
    backbone(config, model, head_name(config, model), config.weights)


@recipe(
    config=LoraConfig,
    # SGD: AdamW would make a step of every last bit by which B's first gradients differ, and A's follow from B.
    proof=Proof(
        {"model.norm": "group", "optim.name": "sgd", "optim.lr": 0.05},
        {"weights": "random", "merge": False, "alpha": 2.0, "r": 2},
        prepare=prepare,
    ),
    backbone=True,
    check=check,
    next_command="python -m recipes.ddp resume=PATH     all weights are trained: compare memory and accuracy",
)
def train(run: Run[LoraConfig]) -> None:
    model = run.place(run.task.build_model())
    prepare(run, model)
    model = DistributedDataParallel(model, device_ids=run.device_ids, gradient_as_bucket_view=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(run.config.optim, [{"params": trained}])
    scheduler = build_scheduler(run.config.optim, optimizer, run.scheduled_steps)
    scaler = run.scaler()  # precision=fp16 needs it; else it passes everything on
    whole = partial(merged, model.module) if run.config.merge else None

    for batch in run.steps(model=model, optimizer=optimizer, scheduler=scheduler, whole=whole):
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

    parameters, adapters = count_parameters(model)
    layers, possible = chosen_layers(run.config, model.module), adaptable(model.module)
    run.note(
        f"trained: {adapters:,} of {parameters:,} parameters, {adapters / parameters:.2%}, beside {len(layers)} of "
        f"{len(possible)} layers",
        trainable_parameters=adapters,  # of the merged model there are none
    )


if __name__ == "__main__":
    train.main()
