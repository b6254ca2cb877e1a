"""Stages of a model that torch's schedules run: what they take and give, how they are cut, checked and put together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble

from lockstep.data.batch import Batch, pieces, tree_tensors, with_tensors
from lockstep.distributed.collectives import broadcast_object
from lockstep.distributed.dtensor import full_tensor
from lockstep.errors import UserError
from lockstep.parallel.context import ContextShare, entered, left
from lockstep.parallel.in_turn import PartsInTurn
from lockstep.parallel.partition import Names, Part, check_cut, choose_cuts, join, split, wanted_cut
from lockstep.tasks.build import blocks_of_task, known_task, sketch
from lockstep.training.accumulate import micro_batch
from lockstep.training.precision import Scaler

STAGES_A_RANK = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zero_bubble": 2}  # by schedule


class Received(torch.autograd.Function):
    """Activations as they came, in the memory format the part wants; their gradient, contiguous as a send wants it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, memory_format: torch.memory_format) -> Tensor:
        return x.contiguous(memory_format=memory_format).view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0].contiguous(), None


class Contiguous(nn.Module):
    """A part whose outputs, and whose inputs' gradients, lie in memory as sends want them.

    With channels_last they would not, and gloo refuses: "input tensor has to be contiguous". A schedule takes tensors
    alone: the model's inputs and outputs, which may be any tree of them, go in and come out as their tensors in order.
    """

    def __init__(self, part: Part, memory_format: torch.memory_format, takes: Any) -> None:
        super().__init__()
        self.part, self.memory_format = part, memory_format
        self.takes, self.gives = takes, None  # what the model's inputs look like, and its outputs

    def forward(self, *inputs: Any) -> Any:
        taken = [Received.apply(x, self.memory_format) if isinstance(x, Tensor) and x.dim() == 4 else x for x in inputs]
        if self.takes is not None:
            taken = [with_tensors(self.takes, taken)]
        outputs = self.part(*taken)
        if not isinstance(outputs, Tensor | tuple):
            self.gives, outputs = outputs, tuple(tree_tensors(outputs))
        if isinstance(outputs, tuple):  # several tensors cross the cut; what only passes through is sent as a copy
            return tuple(x.clone() if any(x is y for y in taken) else x.contiguous() for x in outputs)
        return outputs.contiguous()


class Pipeline:
    """This rank's stages of a model, to be shared and sharded as any model is, and then run.

    Args:
        model: whole, on the host; it stays what evaluations and exports are put together in.
        parts: what it is cut into; part i is on rank i % size of the pipeline.
        mesh: has the dims `pipeline`, the ranks that hold one model after the other, and `batch`, its copies.
        example: inputs of a micro-batch.
        schedule: by STAGES_A_RANK.
        pieces: micro-batches of a step.

    Attributes:
        mine: what this rank holds, under the model's names.
        stages: the same as modules that are called, by their numbers.
        group: the ranks that hold one model.
        around: the whole model's forward, which the ranks make together in evaluation.
    """

    def __init__(
        self, model: nn.Module, parts: Sequence[Part], mesh: DeviceMesh, device: torch.device, example: Any,
        schedule: str, pieces: int,
    ) -> None:  # fmt: skip
        self._whole, self._parts, self._device = copy.deepcopy(model), parts, device
        self.group, copies = mesh.get_group("pipeline"), mesh.get_group("batch")
        self._kind, self._pieces, self._schedules = schedule, pieces, dict[Any, Any]()
        rank, self._size = dist.get_rank(self.group), dist.get_world_size(self.group)
        contiguous = torch.contiguous_format
        self.stages = {
            number: Contiguous(parts[number], contiguous, None if number else example)
            for number in range(rank, len(parts), self._size)
        }
        self._end = self.stages.get(len(parts) - 1)
        self.mine = join([parts[number] for number in self.stages])
        self.around = PartsInTurn(
            self.stages, len(parts), self.group, copies, lambda: self._end and self._end.gives, device
        )

    def sharded(self) -> nn.Module:
        """`mine`, once more: to be called when parameters have become others."""
        self.mine = join([self._parts[number] for number in self.stages])
        self.around.gathers = any(hasattr(stage, "set_requires_gradient_sync") for stage in self.stages.values())
        return self.mine

    def handed(self) -> dict[str, Any]:
        """What `Run.steps` is told."""
        return {"whole": self.whole, "evaluated": self.around}

    def whole(self) -> nn.Module:
        """The complete model, on the host; all ranks call it together."""
        self._whole.forward = self._forward  # for whoever calls it, such as a task that shows what it has learnt
        return gather_model(self._whole, self.mine, self._parts, self._size, self._device, self.group)

    def _forward(self, inputs: Any) -> Any:
        if self.around.training != self._whole.training:
            self.around.train(self._whole.training)
        return self.around(inputs)

    def step(
        self,
        batch: Batch,
        share: ContextShare,
        task: Any,
        scaler: Scaler,
        record: Callable[..., None],
    ) -> None:
        """Forward and backward of a batch, in micro-batches; the ranks of a pipeline call it together.

        Args:
            share: which positions of the targets this rank has.
            task: has the loss.
            record: told the batch's mean loss, where the model ends.
        """
        self.around.training = True
        given = tuple(tree_tensors(entered(self.around, batch.inputs)))
        shapes = tuple((x.shape, x.dtype) for x in given)
        micros = [share.part(micro_batch(batch, *bounds)) for bounds in pieces(batch.count, self._pieces)]

        def weighted(outputs: Any, number: Tensor) -> Tensor:
            """The schedule divides the sum of these losses' gradients by the number of micro-batches."""
            micro, form = micros[int(number)], self._end and self._end.gives
            whole = left(self.around, outputs if form is None else with_tensors(form, outputs))
            mean = share.counted(full_tensor(task.loss(whole, micro.targets), self._device), micro)
            return scaler.scale(mean * micro.weight * len(micros))

        self._weighted = weighted
        if shapes not in self._schedules:  # what a stage receives is as large as in its first step
            stages = [
                PipelineStage(stage, number, len(self._parts), self._device, group=self.group)
                for number, stage in self.stages.items()
            ]
            self._schedules[shapes] = build_schedule(
                self._kind, stages, self._pieces, lambda outputs, number: self._weighted(outputs, number)
            )
        losses: list[Tensor] = []
        numbers = torch.arange(self._pieces)  # the schedule cuts tensors alone, and targets may be anything
        targets = {"target": numbers, "losses": losses} if self._end else {}
        self._schedules[shapes].step(*(given if 0 in self.stages else ()), **targets)
        if losses:
            record(loss=scaler.unscale_loss(torch.stack(losses).mean()))


def agreed_parts(model: nn.Module, cut: Any, count: int, example: Any, names: Names) -> list[Part]:
    """Cut a model as `choose_cuts` has it; what is measured is measured once: ranks that cut differently could not talk."""
    chosen = choose_cuts(model, cut, count, example, names) if dist.get_rank() == 0 or cut != "balanced" else []
    return split(model, broadcast_object(chosen) if cut == "balanced" else chosen, names)


def build_schedule(name: str, stages: Sequence[Any], pieces: int, loss_fn: Callable[[Any, Tensor], Tensor]) -> Any:
    """The object whose step() runs a batch through the pipeline, each micro-batch's mean loss counting 1 / m."""
    if name == "gpipe":
        return ScheduleGPipe(stages[0], pieces, loss_fn=loss_fn)
    if name == "1f1b":
        return Schedule1F1B(stages[0], pieces, loss_fn=loss_fn)
    kind = ScheduleInterleaved1F1B if name == "interleaved" else ScheduleInterleavedZeroBubble
    return kind(list(stages), pieces, loss_fn=loss_fn)


def gather_model(
    whole: nn.Module,
    mine: nn.Module,
    parts: Sequence[Part],
    size: int,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> nn.Module:
    """The complete model: each stage's tensors from the rank of a pipeline that trains it.

    Other ranks' tensors arrive one by one on `device`, and stay in the host's memory, where the model was built.

    Args:
        whole: what they are put into.
        mine: what this rank holds of it; of a tensor that ranks share they put it together first.
        size: ranks of a pipeline.
        group: these ranks; None: all take the first pipeline's.
    """
    ranks, every, held = dist.get_process_group_ranks(group), whole.state_dict(), mine.state_dict()
    for number, part in enumerate(parts):
        for name in part.state_dict():
            tensor = held.get(name, every[name])
            arrived = full_tensor(tensor.detach(), device).to(device, memory_format=torch.contiguous_format)
            dist.broadcast(arrived, src=ranks[number % size], group=group)
            every[name].copy_(arrived)
    return whole


def check_stages(config: Any, stages: int, parts: int) -> None:
    """Hold a config to what the schedules and the cut ask for, before anything starts.

    Args:
        config: with micro_batches, schedule and cut.
        stages: ranks of a pipeline.
        parts: that the model is cut into.

    Raises:
        UserError: it does not fit.
    """
    pieces, name = config.micro_batches, config.schedule
    if name != "gpipe" and pieces < stages:
        raise UserError(
            f"micro_batches={pieces}: schedule={name} needs one for each of the {stages} stages; "
            f"allowed are numbers from {stages} up, or schedule=gpipe"
        )
    if STAGES_A_RANK[name] > 1 and pieces % max(1, pieces // stages):
        raise UserError(
            f"micro_batches={pieces}: schedule={name} takes them in rounds of about {stages}, which must be equal; "
            f"allowed are multiples of {stages}"
        )
    if name == "zero_bubble" and config.checkpoint_activations == "selective":
        raise UserError(
            "checkpoint_activations=selective: schedule=zero_bubble runs backward in two halves, and torch gives away "
            "what selective keeps in the first; allowed are none, full, K, or another schedule"
        )
    here = "cuda" if torch.cuda.is_available() else "cpu"
    if config.cluster is None:  # else it is for the ranks to say what they have
        refuse_gloo_between_gpus(here if config.device == "auto" else config.device, config.backend)
    if config.accumulate > 1:
        raise UserError(f"accumulate={config.accumulate}: a pipeline accumulates by itself; set micro_batches instead")
    model = sketch(config)
    check_cut(lambda: model, wanted_cut(config.cut, parts), parts, blocks_of_task(known_task(config), model))


def refuse_gloo_between_gpus(device: str, backend: str) -> None:
    """gloo would hand the address of a GPU's memory to a socket."""
    if device == "cuda" and backend == "gloo":
        raise UserError(
            "backend=gloo: cannot send activations from one GPU to another; set backend=nccl, with a GPU for each rank, "
            "or device=cpu"
        )
