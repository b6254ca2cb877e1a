"""What a training step would hold, found without any memory: on fake tensors, or by formula for what is sharded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from lockstep.config.schema import Config
from lockstep.memory.tracker import KINDS, LayerMemory, MemoryTracker, local_bytes, memory_by_layer
from lockstep.models.resnet import build_model
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


def predict_memory(config: Config, images: int, device: str = "cpu", peak: bool = True) -> MemoryPrediction:
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
        tracker = MemoryTracker(model)
        gradients: dict[str, int] = {}
        optimizer.register_step_pre_hook(
            lambda *_: gradients.update({name: local_bytes(p.grad) for name, p in model.named_parameters()})
        )
        with tracker:
            _step(forward, optimizer)
        by_layer = memory_by_layer(model, optimizer, gradients, tracker)
        most = _peak(config, images, device) if peak else {}
    return MemoryPrediction(by_layer, most)


def predict_activations(config: Config, images: int, device: str = "cpu") -> MemoryTracker:
    """What one forward would keep for backward, found as `predict_memory` does, but at once and without a thread."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.random.fork_rng(devices=[]), FakeTensorMode():
        model, _, forward = _training(config, images, device)
        with MemoryTracker(model) as tracker:
            forward()
    return tracker


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


def sharded_state_bytes(config: Config, ranks: int) -> dict[str, dict[str, int]]:
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
