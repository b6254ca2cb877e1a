"""What a training step would hold, found without any memory: on fake tensors, or by formula for what is sharded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lockstep.config.schema import Config
from lockstep.data.batch import map_tensors
from lockstep.memory.tracker import KINDS, LayerMemory, MemoryTracker, local_bytes, memory_by_layer
from lockstep.tasks.build import blocks_of_task, known_task, one_sample, sketch
from lockstep.training.activation_checkpointing import checkpoint_activations
from lockstep.training.optim import build_optimizer, states_per_weight
from lockstep.training.precision import AUTOCAST, DTYPES


@dataclass(frozen=True)
class MemoryPrediction:
    """What a training step of one rank holds, by layer, and what is there at its peak, in bytes by kind."""

    layers: list[LayerMemory]
    peak: dict[str, int]

    def sums(self) -> dict[str, int]:
        """Bytes over all layers of parameters, gradients, optimizer and activations."""
        return {kind: sum(getattr(layer, kind) for layer in self.layers) for kind in KINDS}


def predict_memory(config: Config, samples: int, device: str = "cpu", peak: bool = True) -> MemoryPrediction:
    """What two training steps of the whole model on `samples` samples would hold, found without any memory.

    The model is built and trained on torch's fake tensors, which have shapes and storages but no bytes, so that a batch
    that fits no machine can be asked about. Left out is what lies outside of torch's tensors: the interpreter, scratch
    space of cuDNN or oneDNN, buffers in which ranks exchange gradients.

    Args:
        samples: that go through the model at once: a rank's share, or a micro-batch of it.
        peak: whether to find the peak too, which takes twice as long.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    example = one_sample(config)
    with torch.random.fork_rng(devices=[]), FakeTensorMode():
        model, optimizer, forward = _training(config, samples, device, example)
        tracker = MemoryTracker(model)
        gradients: dict[str, int] = {}
        optimizer.register_step_pre_hook(
            lambda *_: gradients.update({name: local_bytes(p.grad) for name, p in model.named_parameters()})
        )
        with tracker:
            _step(forward, optimizer)
        by_layer = memory_by_layer(model, optimizer, gradients, tracker)
        most = _peak(config, samples, device, example) if peak else {}
    return MemoryPrediction(by_layer, most)


def predict_activations(config: Config, samples: int, device: str = "cpu") -> MemoryTracker:
    """What one forward would keep for backward, found as `predict_memory` does, but at once and without a thread."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    example = one_sample(config)
    with torch.random.fork_rng(devices=[]), FakeTensorMode():
        model, _, forward = _training(config, samples, device, example)
        with MemoryTracker(model) as tracker:
            forward()
    return tracker


def _training(
    config: Config, samples: int, device: str, example: Any
) -> tuple[nn.Module, Optimizer, Callable[[], Tensor]]:
    """A model, its optimizer, and a function that computes the loss of a batch."""
    task = known_task(config)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[config.precision])  # a fake model cannot be moved: it is built where it belongs
    try:
        with torch.device(device):
            model = task.build_model().train()
    finally:
        torch.set_default_dtype(before)
    checkpoint_activations(model, blocks_of_task(task, model), config.checkpoint_activations)
    inputs, targets = (map_tensors(partial(_empty, samples, config, device), each) for each in example)
    optimizer = build_optimizer(replace(config.optim, lr=0.0, weight_decay=0.0), model)

    def forward() -> Tensor:
        with torch.autocast(device, AUTOCAST.get(config.precision), enabled=config.precision in AUTOCAST):
            loss: Tensor = task.loss(model(inputs), targets)
            return loss

    return model, optimizer, forward


def _empty(samples: int, config: Config, device: str, tensor: Tensor) -> Tensor:
    """A tensor of an example with one sample, as it would be with so many."""
    dtype = DTYPES[config.precision] if tensor.is_floating_point() else tensor.dtype
    shape = (samples, *tensor.shape[1:]) if tensor.dim() else ()
    return torch.zeros(shape, dtype=dtype, device=device)


def _step(forward: Callable[[], Tensor], optimizer: Optimizer) -> None:
    forward().backward()
    optimizer.step()
    optimizer.zero_grad()


def _peak(config: Config, samples: int, device: str, example: Any) -> dict[str, int]:
    """Bytes by kind at the peak of the second step, when there is an optimizer state."""
    from torch.distributed._tools.mem_tracker import MemTracker

    model, optimizer, forward = _training(config, samples, device, example)
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


def sharded_state_bytes(config: Config, ranks: int) -> dict[str, dict[str, int]]:
    """{technique: bytes of parameters, gradients and optimizer on the rank that holds most}, by formula.

    W is the weights' size, k the optimizer's states a weight. DDP holds W + W + kW. ZeRO's optimizer keeps the weights
    in fp32 besides, so its part is (1 + k)W / N from stage 1 on; stage 2 cuts the gradients, stage 3 the weights too,
    but for parameters of less than 1,000 numbers. FSDP cuts each tensor along its first dim, rounded up.
    """
    with torch.device("meta"):
        shapes = [tuple(parameter.shape) for parameter in sketch(config).parameters()]
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
