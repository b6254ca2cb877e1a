"""What a training step holds, counted by layer and by kind.

torch.distributed._tools.mem_tracker counts all memory while a module runs, but not which layer keeps how much for
backward, and it sees every operation, which slows a step down; lockstep.memory.predict asks it for the peak alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lockstep.distributed.collectives import gather_numbers
from lockstep.distributed.dtensor import local_shard
from lockstep.distributed.parallel_dims import ParallelDims
from lockstep.memory.usage import process_bytes

KINDS = ("parameters", "gradients", "optimizer", "activations")
LOSS = "(loss)"  # what is saved outside of every layer
ENGINE = "(engine)"  # what is held for all layers in one piece


@dataclass
class LayerMemory:
    """What one layer holds during a step, in bytes; activations are what it keeps from forward for backward.

    A tensor that two layers keep is counted once, for the first of them.
    """

    name: str
    kind: str
    output: list[int] = field(default_factory=list)
    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations


class MemoryTracker:
    """Counts, by layer, what autograd keeps for backward: parameters and buffers left out, each storage once.

    Between `start` and `stop`, or as a context. It counts what is alive: in a step of several micro-batches, what
    backward has freed before the next one is kept is not there twice. Saved-tensor hooks see every tensor that is kept,
    on CPU and GPU alike; module hooks say whose forward is running. Nothing that is computed changes.
    Source: https://docs.pytorch.org/tutorials/intermediate/autograd_saved_tensors_hooks_tutorial.html

    Attributes:
        peak: the most that was kept at any moment, by layer.
        outputs: the shape of each layer's output.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.peak: dict[str, int] = {}
        self.outputs: dict[str, list[int]] = {}
        self._running: list[str] = []
        self._now: set[int] = set()
        self._kept: dict[int, list[Any]] = {}  # by storage: [times kept, layer, bytes]
        self._sizes: dict[str, int] = {}
        self._total = self._most = 0

    def start(self) -> None:
        own = [*self._model.parameters(), *self._model.buffers()]
        self._own = {local_shard(tensor).untyped_storage()._cdata for tensor in own}
        self._handles = []
        for name, module in self._model.named_modules():
            self._handles.append(module.register_forward_pre_hook(partial(self._enter, name)))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept.tensor)
        self._hooks.__enter__()

    def stop(self) -> None:
        self._hooks.__exit__()
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> MemoryTracker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def total(self) -> int:
        """Bytes kept when most were."""
        return sum(self.peak.values())

    def _enter(self, name: str, module: nn.Module, inputs: Any) -> None:
        self._running.append(name)
        # Of a sharded model the weights are whole, in other memory, while a layer computes.
        self._now = {local_shard(parameter).untyped_storage()._cdata for parameter in module.parameters(recurse=False)}

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        name = self._running.pop() if self._running else ""
        if isinstance(output, Tensor):
            self.outputs[name] = list(output.shape)

    def _keep(self, tensor: Tensor) -> _Kept:
        storage = local_shard(tensor).untyped_storage()
        key = storage._cdata
        if key in self._own or key in self._now:
            return _Kept(tensor.detach(), None)
        if key in self._kept:
            self._kept[key][0] += 1
        else:
            layer = self._running[-1] if self._running else LOSS
            self._kept[key] = [1, layer, storage.nbytes()]
            self._sizes[layer] = self._sizes.get(layer, 0) + storage.nbytes()
            self._total += storage.nbytes()
            if self._total > self._most:
                self._most, self.peak = self._total, dict(self._sizes)
        return _Kept(tensor.detach(), lambda: self._let_go(key))

    def _let_go(self, key: int) -> None:
        entry = self._kept[key]
        entry[0] -= 1
        if not entry[0]:
            del self._kept[key]
            self._sizes[entry[1]] -= entry[2]
            self._total -= entry[2]


class _Kept:
    """A tensor that autograd keeps, and whom to tell when it does no more."""

    def __init__(self, tensor: Tensor, let_go: Any) -> None:
        self.tensor, self._let_go = tensor, let_go

    def __del__(self) -> None:
        if self._let_go:
            self._let_go()


def saved_bytes(model: nn.Module, inputs: Any) -> int:
    """Bytes that autograd keeps from one forward for the backward, parameters left out: the activations.

    Counted on a copy of the model, without disturbing its BatchNorm statistics.
    """
    model = copy.deepcopy(model).train()
    with MemoryTracker(model) as tracker:
        model(inputs)
    return tracker.total


def local_bytes(tensor: Tensor | None) -> int:
    """Bytes of the part of a tensor that this rank holds."""
    if not isinstance(tensor, Tensor):
        return 0
    mine = local_shard(tensor)
    return mine.numel() * mine.element_size()


def state_bytes(optimizer: Optimizer) -> tuple[int, int]:
    """Bytes of parameters, gradients and optimizer state: (what this rank holds, what all of it is without shards).

    Counted for what the optimizer trains, gradients as if they were there, one the size of its parameter.
    """
    mine = total = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = [value for value in optimizer.state.get(parameter, {}).values() if isinstance(value, Tensor)]
            for tensor in (parameter, parameter, *state):
                mine += local_bytes(tensor)
                total += tensor.numel() * tensor.element_size()
    return mine, total


def gathered_state_bytes(optimizer: Optimizer, dims: ParallelDims, device: torch.device) -> tuple[list[int], int]:
    """`state_bytes` of all ranks, which call it together: (what each holds, what all stages of one model are)."""
    mine, total = (gather_numbers(size, device) for size in state_bytes(optimizer))
    each = dims.model_parallel_size // dims.stages
    return [int(size) for size in mine], int(sum(total[stage * each] for stage in range(dims.stages)))


def memory_by_layer(
    model: nn.Module, optimizer: Optimizer, gradients: Mapping[str, int], tracker: MemoryTracker
) -> list[LayerMemory]:
    """What each layer holds on this rank, in the model's order; a layer without anything is left out.

    Args:
        gradients: bytes of each parameter's gradient, by its name, from the moment when they were there.
    """
    found = {name: LayerMemory(name or "(model)", type(module).__name__) for name, module in model.named_modules()}
    for name, parameter in model.named_parameters():
        layer = found[name.rpartition(".")[0]]
        layer.parameters += local_bytes(parameter) or local_bytes(
            getattr(parameter, "ds_tensor", None)
        )  # DeepSpeed's part of it
        layer.gradients += gradients.get(name, 0)
        layer.optimizer += sum(map(local_bytes, optimizer.state.get(parameter, {}).values()))
    mine = {id(parameter) for parameter in model.parameters()}
    others = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in mine]
    if others:  # an engine's own vectors, cut across all layers: weights once more, and what goes with them
        states = [value for parameter in others for value in optimizer.state.get(parameter, {}).values()]
        vectors = sum(map(local_bytes, [*others, *states]))
        found[ENGINE] = LayerMemory(ENGINE, "", gradients=gradients.get(ENGINE, 0), optimizer=vectors)
    found[LOSS] = LayerMemory(LOSS, "")
    for name, kept in tracker.peak.items():
        found[name].activations += kept
    for name, shape in tracker.outputs.items():
        found[name].output = shape
    return [layer for layer in found.values() if layer.total]


def held_bytes(
    model: nn.Module | None, optimizer: Optimizer | None, device: torch.device, before: int
) -> dict[str, int]:
    """What this process's memory is held by, in bytes by name; the last line is what no list of tensors explains.

    Args:
        before: bytes that it held before it had a model: on the CPU the interpreter, libraries and data.
    """
    parameters = list(model.parameters()) if model is not None else []
    states = [value for state in optimizer.state.values() for value in state.values()] if optimizer else []
    found = {
        "parameters": sum(map(local_bytes, parameters)),
        "gradients": sum(local_bytes(parameter.grad) for parameter in parameters),
        "optimizer": sum(map(local_bytes, states)),
    }
    if device.type == "cuda":
        total = torch.cuda.memory_allocated(device)
        found["activations and the rest"] = max(0, total - sum(found.values()))
        found["kept by torch, in pieces too small"] = torch.cuda.memory_reserved(device) - total
        free, everything = torch.cuda.mem_get_info(device)
        found["CUDA itself and other processes"] = max(0, everything - free - torch.cuda.memory_reserved(device))
        return found
    found["activations and the rest"] = max(0, process_bytes("VmRSS") - before - sum(found.values()))
    found["interpreter, libraries, data"] = before
    return found
