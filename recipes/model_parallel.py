"""Model parallelism: one process, one model cut in two, each part on a device of its own.

Of a ResNet, conv1 … layer2 live on the first device, layer3 … fc on the second; of another model, half of its blocks on
each. The activations are copied across in between, as their gradients are on the way back. It makes a model fit that one
device cannot hold, and no more than that: while one device computes, the other waits. `micro_batches=N` sends the batch
through in pieces: on GPUs, whose kernels are queued without waiting, the first device works on the next piece while the
second works on this one (on CPU there is only one process to do both). The summary says how long each device waited;
recipes.pipeline_parallel does better.

BatchNorm sees micro-batches where there are any.

    python -m recipes.model_parallel                       the cut of the notes, before layer3
    python -m recipes.model_parallel cut=layer2.1          any other
    python -m recipes.model_parallel devices=[cuda:0,cpu]  any devices

Expect: an accuracy of 0.97 or more on the digits, in about a minute on two CPU cores; the two
parts' idle shares add up to 100 %.
Source: https://docs.pytorch.org/tutorials/intermediate/model_parallel_tutorial.html
"""

import re
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lockstep import Proof, Run, UserError, recipe
from lockstep.config.keys import AUTO, CUT_HELP, key
from lockstep.config.schema import Config
from lockstep.data.batch import cut_tree, first_tensor, join_trees, map_tensors, on_device_of, pieces
from lockstep.parallel.partition import check_cut, choose_cuts, split
from lockstep.tasks.build import blocks_of_task, known_task, sketch
from lockstep.training.accumulate import micro_batches
from lockstep.training.clip import clip_gradients
from lockstep.training.optim import build_optimizer, build_scheduler
from lockstep.training.stage_clock import StageClock


@dataclass
class ModelParallelConfig(Config):
    several_devices: ClassVar[bool] = True
    cut: Any = key(AUTO, CUT_HELP)
    devices: list[str] | None = key(None, "devices of the parts (null: two GPUs, or cpu twice)")
    micro_batches: int = key(1, "micro-batches that a global batch is piped through in", minimum=1)

    @property
    def pipeline_micro_batches(self) -> int:
        return self.micro_batches


class ModelParallel(nn.Module):
    """A model in consecutive parts, part i on devices[i]: inputs on any device to outputs on the last one."""

    def __init__(
        self, module: nn.Module, firsts: list[str], devices: list[torch.device], pieces: int, blocks: list[str]
    ) -> None:
        super().__init__()
        self.module = module
        parts = split(module, firsts, blocks)  # the same parameters, so moving a part moves a part of `module`
        self._parts = [part.to(device) for part, device in zip(parts, devices, strict=True)]
        self._devices, self._pieces = devices, pieces
        trained = (each for part in parts for each in part.parameters() if each.requires_grad)
        self.clock = StageClock(devices, next(trained))
        # Whoever evaluates or exports `module` calls it directly, and its own forward knows nothing of devices.
        module.forward = self.forward

    def forward(self, inputs: Any) -> Any:
        # A GPU only queues what it is told to do: piece 2 is at part 0 while piece 1 is still at part 1.
        count = len(first_tensor(inputs, "the inputs"))
        return join_trees([self._one(cut_tree(inputs, *bounds, count)) for bounds in pieces(count, self._pieces)])

    def _one(self, inputs: Any) -> Any:
        values = inputs
        for number, (part, device) in enumerate(zip(self._parts, self._devices, strict=True)):
            values = map_tensors(partial(self._enter, number=number, device=device), values)
            values = part(*values) if number and isinstance(values, tuple) else part(values)
            values = map_tensors(partial(self.clock.leave, part=number), values)
        return values

    def _enter(self, x: Tensor, number: int, device: torch.device) -> Tensor:
        return self.clock.enter(x.to(device, non_blocking=True), number)


def pick_devices(run: Run[ModelParallelConfig]) -> list[torch.device]:
    """`devices`, or two GPUs that no other rank uses, or this rank's device twice."""
    if run.config.devices is not None:
        return [torch.device(name) for name in run.config.devices]
    own = run.world.own_gpus
    return own[:2] if len(own) > 1 else [run.device] * 2


def check(config: ModelParallelConfig, share: int) -> None:
    """Every device must exist, and the cut must make a part for each."""
    allowed = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    if config.cluster is not None:  # a login node need not have the GPUs
        allowed += [name for name in config.devices or [] if re.fullmatch(r"cuda:\d+", name)]
    if config.devices is not None and (len(config.devices) < 2 or not set(config.devices) <= set(allowed)):
        raise UserError(
            f"devices=[{','.join(config.devices)}]: allowed are two or more of {', '.join(allowed)}, repeated or not"
        )
    model = sketch(config)
    check_cut(lambda: model, config.cut, len(config.devices or "ab"), blocks_of_task(known_task(config), model))


@recipe(
    config=ModelParallelConfig,
    proof=Proof({"model.norm": "batch"}),
    ranks=1,
    check=check,
    next_command="python -m recipes.pipeline_parallel     the same cut, with both parts busy",
)
def train(run: Run[ModelParallelConfig]) -> None:
    devices = pick_devices(run)
    model = run.place(run.task.build_model())
    example, blocks = run.data.example(run.config.global_batch_size // run.config.micro_batches), run.blocks(model)
    firsts = choose_cuts(model, run.config.cut, len(devices), example.inputs, blocks)
    model = ModelParallel(model, firsts, devices, run.config.micro_batches, blocks)
    optimizer = build_optimizer(run.config.optim, model)
    scheduler = build_scheduler(run.config.optim, optimizer, run.scheduled_steps)
    scaler = run.scaler()  # precision=fp16 needs it; else it passes everything on

    for batch in run.steps(model=model, optimizer=optimizer, scheduler=scheduler):
        for micro in micro_batches(batch, run.config.accumulate, model):  # one, unless accumulate=N
            with run.autocast():
                outputs = model(micro.inputs)
                loss = run.task.loss(outputs, on_device_of(outputs, micro.targets))
            scaler.scale(loss * micro.weight).backward()
            run.record(loss=loss, weight=micro.weight)
        clip_gradients(model, optimizer, scaler, run.config.gradients)
        scaler.step(optimizer)  # unscales the gradients, unless that is done; if one is not finite, no rank updates
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()

    shares = model.clock.idle_shares()
    where = ", ".join(f"{share:.0%} of part {part} on {devices[part]}" for part, share in enumerate(shares))
    run.note(f"idle: {where}; cut before {', '.join(firsts)}", idle_shares=shares, cuts=firsts)


if __name__ == "__main__":
    train.main()
