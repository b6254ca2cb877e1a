"""Where memory goes, counted instead of guessed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from lockstep.config.schema import Config
from lockstep.distributed.dtensor import local_shard
from lockstep.memory.usage import process_bytes
from lockstep.models.resnet import build_model
from lockstep.training.optim import build_optimizer, states_per_weight
from lockstep.training.precision import AUTOCAST, DTYPES

LOSS = "(loss)"  # what is saved outside of every layer
ENGINE = "(engine)"  # what is held for all layers in one piece


# What a step holds ------------------------------------------------------------------------------------------------


@dataclass
class Layer:
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
            return _Kept(tensor, None)
        if key in self._kept:
            self._kept[key][0] += 1
        else:
            layer = self._running[-1] if self._running else LOSS
            self._kept[key] = [1, layer, storage.nbytes()]
            self._sizes[layer] = self._sizes.get(layer, 0) + storage.nbytes()
            self._total += storage.nbytes()
            if self._total > self._most:
                self._most, self.peak = self._total, dict(self._sizes)
        return _Kept(tensor, lambda: self._let_go(key))

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


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes that autograd keeps from one forward for the backward, parameters left out: the activations.

    Counted on a copy of the model, without disturbing its BatchNorm statistics.
    """
    model = copy.deepcopy(model).train()
    with MemoryTracker(model) as ledger:
        model(images)
    return ledger.total


def size(tensor: Tensor | None) -> int:
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
                mine += size(tensor)
                total += tensor.numel() * tensor.element_size()
    return mine, total


def layers(model: nn.Module, optimizer: Optimizer, gradients: Mapping[str, int], ledger: MemoryTracker) -> list[Layer]:
    """What each layer holds on this rank, in the model's order; a layer without anything is left out.

    Args:
        gradients: bytes of each parameter's gradient, by its name, from the moment when they were there.
    """
    found = {name: Layer(name or "(model)", type(module).__name__) for name, module in model.named_modules()}
    for name, parameter in model.named_parameters():
        layer = found[name.rpartition(".")[0]]
        layer.parameters += size(parameter) or size(getattr(parameter, "ds_tensor", None))  # DeepSpeed's part of it
        layer.gradients += gradients.get(name, 0)
        layer.optimizer += sum(map(size, optimizer.state.get(parameter, {}).values()))
    mine = {id(parameter) for parameter in model.parameters()}
    others = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in mine]
    if others:  # an engine's own vectors, cut across all layers: weights once more, and what goes with them
        states = [value for parameter in others for value in optimizer.state.get(parameter, {}).values()]
        vectors = sum(map(size, [*others, *states]))
        found[ENGINE] = Layer(ENGINE, "", gradients=gradients.get(ENGINE, 0), optimizer=vectors)
    found[LOSS] = Layer(LOSS, "")
    for name, kept in ledger.peak.items():
        found[name].activations += kept
    for name, shape in ledger.outputs.items():
        found[name].output = shape
    return [layer for layer in found.values() if layer.total]


def held_bytes(
    model: nn.Module | None, optimizer: Optimizer | None, device: torch.device, before: int
) -> dict[str, int]:
    """What this process's memory is held by, in bytes by name; the last line is what no list of tensors explains.

    Args:
        before: bytes that it held before it had a model: on the CPU the interpreter, libraries and images.
    """
    parameters = list(model.parameters()) if model is not None else []
    states = [value for state in optimizer.state.values() for value in state.values()] if optimizer else []
    found = {
        "parameters": sum(map(size, parameters)),
        "gradients": sum(size(parameter.grad) for parameter in parameters),
        "optimizer": sum(map(size, states)),
    }
    if device.type == "cuda":
        total = torch.cuda.memory_allocated(device)
        found["activations and the rest"] = max(0, total - sum(found.values()))
        found["kept by torch, in pieces too small"] = torch.cuda.memory_reserved(device) - total
        free, everything = torch.cuda.mem_get_info(device)
        found["CUDA itself and other processes"] = max(0, everything - free - torch.cuda.memory_reserved(device))
        return found
    found["activations and the rest"] = max(0, process_bytes("VmRSS") - before - sum(found.values()))
    found["interpreter, libraries, images"] = before
    return found


# What a step would hold ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """What a training step of one rank holds, by layer, and what is there at its peak, in bytes by kind."""

    layers: list[Layer]
    peak: dict[str, int]

    def sums(self) -> dict[str, int]:
        """Bytes over all layers of parameters, gradients, optimizer and activations."""
        return {kind: sum(getattr(layer, kind) for layer in self.layers) for kind in KINDS}


KINDS = ("parameters", "gradients", "optimizer", "activations")


def predict(config: Config, images: int, device: str = "cpu", peak: bool = True) -> Prediction:
    """What two training steps of the whole model on `images` images would hold, found without any memory.

    The model is built and trained on torch's fake tensors, which have shapes and storages but no bytes, so that a batch
    that fits no machine can be asked about. Left out is what lies outside of torch's tensors: the interpreter, scratch
    space of cuDNN or oneDNN, buffers in which ranks exchange gradients.

    Args:
        images: that go through the model at once: a rank's share, or a micro-batch of it.
        peak: whether to find the peak too, which takes twice as long.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.random.fork_rng(devices=[]), FakeTensorMode():
        model, optimizer, forward = _training(config, images, device)
        ledger = MemoryTracker(model)
        gradients: dict[str, int] = {}
        optimizer.register_step_pre_hook(
            lambda *_: gradients.update({name: size(p.grad) for name, p in model.named_parameters()})
        )
        with ledger:
            _step(forward, optimizer)
        by_layer = layers(model, optimizer, gradients, ledger)
        most = _peak(config, images, device) if peak else {}
    return Prediction(by_layer, most)


def foretell(config: Config, images: int, device: str = "cpu") -> MemoryTracker:
    """What one forward would keep for backward, found as `predict` does, but at once and without a thread."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.random.fork_rng(devices=[]), FakeTensorMode():
        model, _, forward = _training(config, images, device)
        with MemoryTracker(model) as ledger:
            forward()
    return ledger


def _training(config: Config, images: int, device: str) -> tuple[nn.Module, Optimizer, Callable[[], Tensor]]:
    """A model, its optimizer, and a function that computes the loss of a batch."""
    side = config.model.image_size or config.data.image_size
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[config.precision])  # a fake model cannot be moved: it is built where it belongs
    try:
        with torch.device(device):
            model = build_model(config.model).train()
            batch = torch.empty(images, 3, side, side)
    finally:
        torch.set_default_dtype(before)
    labels = torch.empty(images, dtype=torch.int64, device=device)
    optimizer = build_optimizer(replace(config.optim, lr=0.0, weight_decay=0.0), model)

    def forward() -> Tensor:
        with torch.autocast(device, AUTOCAST.get(config.precision), enabled=config.precision in AUTOCAST):
            return cross_entropy(model(batch), labels)

    return model, optimizer, forward


def _step(forward: Callable[[], Tensor], optimizer: Optimizer) -> None:
    forward().backward()
    optimizer.step()
    optimizer.zero_grad()


def _peak(config: Config, images: int, device: str) -> dict[str, int]:
    """Bytes by kind at the peak of the second step, when there is an optimizer state."""
    from torch.distributed._tools.mem_tracker import MemTracker

    model, optimizer, forward = _training(config, images, device)
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        _step(forward, optimizer)
        tracker.reset_mod_stats()
        _step(forward, optimizer)
    found = tracker.get_tracker_snapshot("peak")
    snapshot = next(found[each] for each in found if each.type == torch.device(device).type)
    names = {"Parameter": "parameters", "Gradient": "gradients", "Optstate": "optimizer", "Activation": "activations"}
    kinds = {getattr(kind, "value", kind): count for kind, count in snapshot.items()}
    peak = {ours: kinds[theirs] for theirs, ours in names.items()}
    return peak | {"temporary": kinds["Total"] - sum(peak.values())}


def sharded(config: Config, ranks: int) -> dict[str, dict[str, int]]:
    """{technique: bytes of parameters, gradients and optimizer on the rank that holds most}, by formula.

    W is the weights' size, k the optimizer's states a weight. DDP holds W + W + kW. ZeRO's optimizer keeps the weights
    in fp32 besides, so its part is (1 + k)W / N from stage 1 on; stage 2 cuts the gradients, stage 3 the weights too,
    but for parameters of less than 1,000 numbers. FSDP cuts each tensor along its first dim, rounded up.
    """
    with torch.device("meta"):
        shapes = [tuple(parameter.shape) for parameter in build_model(config.model).parameters()]
    item = torch.empty((), dtype=DTYPES[config.precision]).element_size()
    moments, others = states_per_weight(config.optim)
    counters = 4 * others * len(shapes)  # its steps, one a parameter
    weights = item * sum(map(math.prod, shapes))
    tops = item * sum(math.ceil(shape[0] / ranks) * math.prod(shape[1:]) for shape in shapes)
    pieces = item * sum(numel if numel < 1000 else math.ceil(numel / ranks) for numel in map(math.prod, shapes))
    part = math.ceil(weights / ranks)
    master = (1 + moments) * part
    table = {
        "ddp": (weights, weights, moments * weights + counters),
        "deepspeed_zero stage=1": (weights, weights, master),
        "deepspeed_zero stage=2": (weights, part, master),
        "deepspeed_zero stage=3": (pieces, part, master),
        "fsdp": (tops, tops, moments * tops + counters),
    }
    return {name: dict(zip(KINDS, sizes, strict=False)) | {"total": sum(sizes)} for name, sizes in table.items()}
