"""Transfer learning: a trained backbone, frozen, under a new head for other classes or other data.

Load every tensor but the head's, freeze what the new task need not change, train the rest. Three things go wrong where
this meets other ranks. DistributedDataParallel decides when it wraps the model what it will average: whoever freezes
after it has ranks waiting for gradients that never come, and whoever unfreezes after it has ranks that part in silence.
So freezing comes before the wrap, and unfreezing wraps anew. A frozen BatchNorm is not frozen by `requires_grad`: in
train mode it goes on normalising by its batch and changes its running statistics with each forward, so it must stay in
eval mode, whatever `model.train()` says. And only rank 0 reads the weights: the wrap sends them to all others.

A frozen layer below all trained ones needs no backward: with the head alone to train, a step is one forward, and what
crosses the network is the head's gradient. `freeze=[conv1.*, bn1.*, layer1.*]` names by pattern what is frozen;
`unfreeze_epoch=3 unfreeze_lr=0.001` trains all from the fourth epoch on, what was frozen with its own learning rate.

The backbone is `resume=PATH`: a run, one of its checkpoints, or any file with a state_dict, whatever its head; or
`weights=imagenet`: torchvision's, downloaded once. Started again in the same `out=`, the run goes on where it was.
The head is the model's last Linear or, where it has none, its last Conv2d. So it is of a model of your own
(`task=FILE.py:Class`), whose backbone is a run of the same model on other data, or a file of its weights; `freeze` says
otherwise where the head is not all that is to be trained.

    python -m recipes.ddp data.classes=[0,1,2,3,4] out=base                             five digits, then the other five
    python -m recipes.transfer_learning resume=base data.classes=[5,6,7,8,9] optim=adamw unfreeze_epoch=2
    python -m recipes.transfer_learning weights=imagenet model.image_size=224 unfreeze_epoch=5
    python -m recipes.transfer_learning task=my_task.py:Gpt task.text=mine.txt resume=base freeze=[blocks.0.*]

Expect: an accuracy of 0.96 or more on the other five digits with the second command, in a minute on two CPU cores.
Source: https://arxiv.org/abs/1411.1792, https://docs.pytorch.org/tutorials/beginner/transfer_learning_tutorial.html
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lockstep import Proof, Run, UserError, recipe
from lockstep.checkpoint.backbone import backbone
from lockstep.config.keys import key
from lockstep.config.schema import Config
from lockstep.models.freeze import hold_statistics, release_statistics
from lockstep.models.parameters import count_parameters, head_of
from lockstep.tasks.build import sketch
from lockstep.training.accumulate import micro_batches
from lockstep.training.clip import clip_gradients
from lockstep.training.optim import build_optimizer, build_scheduler


@dataclass
class TransferConfig(Config):
    weights: str | None = key(
        None,
        "torchvision's backbone, downloaded once (imagenet: its best); random: none (resume=PATH names one of yours)",
        ("imagenet", "IMAGENET1K_V1", "IMAGENET1K_V2", "random"),
    )
    freeze: list[str] | None = key(
        None, "patterns of the parameters that are not trained, such as [layer1.*] (null: all but the head)"
    )
    unfreeze_epoch: int | None = key(None, "epochs after which all is trained (null: never)", minimum=1)
    unfreeze_lr: float | None = key(None, "peak learning rate of what was frozen (null: optim.lr / 10)", minimum=0)


def is_frozen(name: str, patterns: list[str] | None, head: str) -> bool:
    """Whether a parameter is to be frozen: it matches a pattern; without any, all but the head's do."""
    return not name.startswith(head) if patterns is None else any(fnmatchcase(name, pattern) for pattern in patterns)


def freeze_parameters(model: nn.Module, patterns: list[str] | None) -> None:
    """Exclude parameters from training, and a BatchNorm with all its parameters frozen from train mode."""
    head = head_of(model)
    for name, parameter in model.named_parameters():
        if is_frozen(name, patterns, head):
            parameter.requires_grad_(False)
    hold_statistics(model)


def unfreeze(model: nn.Module) -> None:
    """Undo `freeze_parameters`."""
    model.requires_grad_(True)
    release_statistics(model)


def prepare(run: Run[TransferConfig], model: nn.Module) -> None:
    """Make a new model the one that is trained here: the backbone's weights, a new head, the rest frozen."""
    model.load_state_dict(
        run.backbone(model, head_of(model), run.config.weights), strict=False
    )  # not strict: the head keeps its random weights
    freeze_parameters(model, run.config.freeze)


def ends_of(names: list[str]) -> list[str]:
    """What a model's parameters are called, at its two ends."""
    return names if len(names) < 6 else [names[0], names[1], names[3], "…", names[-2]]


def check(config: TransferConfig, share: int) -> None:
    """The patterns must match, something must be left to train, and the backbone must be there and fit."""
    model = sketch(config)
    names = [name for name, _ in model.named_parameters()]
    text = f"freeze=[{','.join(config.freeze or [])}]"
    for pattern in config.freeze or []:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"{text}: {pattern} matches no parameter; they are called {', '.join(ends_of(names))}; "
                "allowed are such names, also with * and ?"
            )
    head = head_of(model)
    frozen = [name for name in names if is_frozen(name, config.freeze, head)]
    if len(frozen) == len(names):
        raise UserError(f"{text}: leaves nothing to train; leave the head out, {head}*")
    if config.unfreeze_epoch is not None and not frozen:
        raise UserError(f"unfreeze_epoch={config.unfreeze_epoch}: with freeze=[] nothing is frozen; leave it out")
    if config.unfreeze_epoch is not None and config.unfreeze_epoch >= config.epochs:
        raise UserError(
            f"unfreeze_epoch={config.unfreeze_epoch}: training ends after epochs={config.epochs}; "
            f"allowed are numbers below that"
        )
    if config.unfreeze_lr is not None and config.unfreeze_epoch is None:
        raise UserError(f"unfreeze_lr={config.unfreeze_lr}: nothing is ever unfrozen; set unfreeze_epoch")
    backbone(config, model, head, config.weights)


@recipe(
    config=TransferConfig,
    proof=(
        Proof({"model.norm": "batch"}, {"weights": "random"}, prepare=prepare),
        Proof({"model.norm": "group"}, {"weights": "random", "freeze": ["layer1.*"]}, images=True, prepare=prepare),
    ),
    backbone=True,
    check=check,
    next_command="python -m recipes.ddp     the same classes from scratch, to compare with",
)
def train(run: Run[TransferConfig]) -> None:
    model = run.place(run.task.build_model())
    prepare(run, model)
    model = DistributedDataParallel(model, device_ids=run.device_ids, gradient_as_bucket_view=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": trained}]
    unfreeze_at = (run.config.unfreeze_epoch or run.config.epochs) * run.steps_per_epoch
    if run.config.unfreeze_epoch is not None:
        # In the optimizer from the start, and in its schedule: it passes over what has no gradient.
        groups.append({"params": frozen, "lr": run.config.unfreeze_lr or run.config.optim.lr / 10})
    optimizer = build_optimizer(run.config.optim, groups)
    scheduler = build_scheduler(run.config.optim, optimizer, run.scheduled_steps)
    scaler = run.scaler()  # precision=fp16 needs it; else it passes everything on

    for batch in run.steps(model=model, optimizer=optimizer, scheduler=scheduler):
        if frozen and run.step >= unfreeze_at:  # at that step, or in a run that goes on from a later one
            unfreeze(model.module)
            # A new wrapper averages all of them from now on.
            model = DistributedDataParallel(model.module, device_ids=run.device_ids, gradient_as_bucket_view=True)
            run.restore_bucket_order(model, since=unfreeze_at)
            frozen = []
            run.note("", trainable_parameters=count_parameters(model)[1])
            run.report.line(f"unfrozen after step {unfreeze_at}: all parameters are trained from here on")
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

    kept = sum(parameter.numel() for parameter in frozen)
    run.note(f"frozen: {kept:,} of {count_parameters(model)[0]:,} parameters; head: {head_of(model.module)}*")


if __name__ == "__main__":
    train.main()
