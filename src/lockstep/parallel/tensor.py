"""A model whose layers several ranks share: what torch's `parallelize_module` leaves to do.

torch cuts linear layers and embeddings. Here are the weights that every rank has whole, dropout on slices of a
sequence, sequences that do not divide, and gradients that are complete before anyone looks at them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional as F

from lockstep.distributed.dtensor import is_sharded
from lockstep.errors import UserError


class WholeWeights(ParallelStyle):
    """A layer that each rank has whole, and that sees each position by itself.

    Args:
        between: the layout of its input and output: the same on all ranks, or slices of the sequence, whose gradients
            of the weights then add up.
    """

    def __init__(self, between: Placement) -> None:
        super().__init__()
        self.between = between

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, None, self._enter, self._leave)

    def _enter(self, module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        return (DTensor.from_local(inputs[0], mesh, [self.between], run_check=False), *inputs[1:])

    def _leave(self, module: nn.Module, outputs: Any, mesh: DeviceMesh) -> Any:
        return cast(DTensor, outputs.redistribute(placements=[self.between])).to_local()


class SlicedDropout(nn.Dropout):
    """Dropout on a rank's slice of the sequence, dim 1: it drops what one process would drop of the slice.

    All ranks have the same random numbers. Each draws the mask of the whole sequence and uses its slice of it.

    Attributes:
        place: which slice this rank has.
        length: of the whole sequence, without what it was filled up with.
        positions: of the whole sequence, those that are sliced; None: all.
    """

    place, length = 0, 0
    positions: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        mask = F.dropout(x.new_ones(x.shape[0], self.length, *x.shape[2:]), self.p)
        mask = mask if self.positions is None else mask[:, self.positions]
        mine = mask[:, self.place * x.shape[1] :][:, : x.shape[1]]
        filled = torch.zeros_like(x)  # where there is no position, there is nothing to keep
        filled[:, : mine.shape[1]] = mine
        return x * filled


class SharedModel(nn.Module):
    """What the class of a model becomes a subclass of: its names and its state_dict stay what they were.

    In training it gives each rank its part of the outputs, for a loss that is shared too; in evaluation all of them.

    Attributes:
        multiple: of which the length of a sequence must be, dim 1 of the inputs.
        causal: whether sequences may be filled up to it.
        sliced: dropouts on a slice of it.
    """

    multiple, causal = 1, False
    sliced: Sequence[SlicedDropout] = ()
    _length = 0

    def enter(self, inputs: Any) -> Any:
        """What the layers are given: sequences filled up to a multiple.

        Raises:
            UserError: they do not divide, and what is behind their end would count.
        """
        self._length = inputs.shape[1] if self.multiple > 1 else 0
        missing = -self._length % self.multiple
        if missing and not self.causal:
            raise UserError(
                f"sequence_parallel=true: sequences of {self._length} do not divide by tensor={self.multiple}; allowed are "
                'multiples of it, or a model whose plan says {"": "causal"}'
            )
        for module in self.sliced:
            if module.positions is None:
                module.length = self._length
        return F.pad(inputs, (0, missing)) if missing else inputs

    def leave(self, outputs: Any) -> Any:
        """Outputs without those behind the end."""
        return outputs[:, : self._length] if -self._length % self.multiple else outputs

    def forward(self, inputs: Any) -> Any:
        outputs = SharedModel.leave(self, super().forward(SharedModel.enter(self, inputs)))
        return outputs if self.training or not is_sharded(outputs) else outputs.full_tensor()


def layer_styles(sequence: bool) -> dict[str, ParallelStyle]:
    """What torch does to a layer, by the words of the task's plan."""
    between = Shard(1) if sequence else Replicate()  # what ranks have of [samples, sequence, width] between layers
    return {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "gather": PrepareModuleInput(input_layouts=between, desired_input_layouts=Replicate()),
        "columns": ColwiseParallel(),
        "rows": RowwiseParallel(output_layouts=between),
        "whole": WholeWeights(between),
        "output": ColwiseParallel(input_layouts=between, use_local_output=False),
    }


def share_layers(
    model: nn.Module,
    plan: dict[str, str],
    styles: dict[str, ParallelStyle],
    mesh: DeviceMesh,
    sequence: bool,
    around: nn.Module | None = None,
    causal: bool = True,
) -> nn.Module:
    """Cut a model's layers between the ranks of a mesh, in place; one parameter at a time comes to their devices.

    Args:
        model: the same on all ranks, on the CPU; or a part of it.
        plan: `tensor_parallel_plan`'s.
        styles: what torch does to a layer, by the plan's words.
        sequence: whether ranks have slices of the sequence between layers.
        around: what takes the inputs and gives the outputs, where that is not `model` itself.
        causal: whether sequences may be filled up where the plan says that the model is.
    """
    modules, outer = dict(model.named_modules()), model if around is None else around
    for name, word in plan.items():
        if word in styles and name in modules:
            parallelize_module(modules[name], mesh, styles[word])
    sliced = []
    for module in modules.values() if sequence else ():
        if type(module) is nn.Dropout:
            module.__class__ = SlicedDropout
            sliced.append(cast(SlicedDropout, module))
            sliced[-1].place = mesh.get_local_rank()
    kind: Any = type(outer)
    outer.__class__ = type(kind.__name__, (SharedModel, kind), {"__module__": kind.__module__})
    shared = cast(SharedModel, outer)
    object.__setattr__(shared, "sliced", sliced)  # a list of modules, which are the model's already
    shared.multiple, shared.causal = mesh.size() if sequence else 1, causal and plan.get("") == "causal"
    return model


@torch.no_grad()
def complete_gradients(model: nn.Module) -> None:
    """Add up the gradients of weights that each rank has whole, where each has seen its slice of the sequence."""
    for parameter in model.parameters():
        gradient: Any = parameter.grad
        if is_sharded(parameter) and gradient is not None:
            wanted = cast(Any, parameter).placements
            if gradient.placements != wanted:
                parameter.grad = gradient.redistribute(placements=wanted)
