"""Where memory goes, counted instead of guessed, and what a machine has of it."""

from __future__ import annotations

import copy
import math
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW, Optimizer

from lockstep.models import AUTOCAST, DTYPES, build_model
from lockstep.schema import Config
from lockstep.state import local
from lockstep.words import mebibytes

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


class Ledger:
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
        self._own = {local(tensor).untyped_storage()._cdata for tensor in own}
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

    def __enter__(self) -> Ledger:
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
        self._now = {local(parameter).untyped_storage()._cdata for parameter in module.parameters(recurse=False)}

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        name = self._running.pop() if self._running else ""
        if isinstance(output, Tensor):
            self.outputs[name] = list(output.shape)

    def _keep(self, tensor: Tensor) -> _Kept:
        storage = local(tensor).untyped_storage()
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
    with Ledger(model) as ledger:
        model(images)
    return ledger.total


def size(tensor: Tensor | None) -> int:
    """Bytes of the part of a tensor that this rank holds."""
    if not isinstance(tensor, Tensor):
        return 0
    mine = local(tensor)
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


def layers(model: nn.Module, optimizer: Optimizer, gradients: Mapping[str, int], ledger: Ledger) -> list[Layer]:
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
        ledger = Ledger(model)
        gradients: dict[str, int] = {}
        optimizer.register_step_pre_hook(
            lambda *_: gradients.update({name: size(p.grad) for name, p in model.named_parameters()})
        )
        with ledger:
            _step(forward, optimizer)
        by_layer = layers(model, optimizer, gradients, ledger)
        most = _peak(config, images, device) if peak else {}
    return Prediction(by_layer, most)


def foretell(config: Config, images: int, device: str = "cpu") -> Ledger:
    """What one forward would keep for backward, found as `predict` does, but at once and without a thread."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.random.fork_rng(devices=[]), FakeTensorMode():
        model, _, forward = _training(config, images, device)
        with Ledger(model) as ledger:
            forward()
    return ledger


def _training(config: Config, images: int, device: str) -> tuple[nn.Module, Optimizer, Callable[[], Tensor]]:
    """A model, its optimizer, and a function that computes the loss of a batch."""
    optim, side = config.optim, config.model.image_size or config.data.image_size
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[config.precision])  # a fake model cannot be moved: it is built where it belongs
    try:
        with torch.device(device):
            model = build_model(config.model).train()
            batch = torch.empty(images, 3, side, side)
    finally:
        torch.set_default_dtype(before)
    labels = torch.empty(images, dtype=torch.int64, device=device)
    if optim.name == "sgd":
        optimizer: Optimizer = SGD(model.parameters(), lr=0.0, momentum=optim.momentum)
    else:
        optimizer = AdamW(model.parameters(), lr=0.0)

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
    moments = 2 if config.optim.name == "adamw" else int(config.optim.momentum > 0)
    counters = 4 * len(shapes) if config.optim.name == "adamw" else 0  # its steps, one a parameter
    weights = item * sum(map(math.prod, shapes))
    tops = item * sum(math.ceil(shape[0] / ranks) * math.prod(shape[1:]) for shape in shapes)
    pieces = item * sum(numel if numel < 1000 else math.ceil(numel / ranks) for numel in map(math.prod, shapes))
    part = math.ceil(weights / ranks)
    master = (1 + moments) * part
    table = {
        "ddp": (weights, weights, moments * weights + counters),
        "zero.stage=1": (weights, weights, master),
        "zero.stage=2": (weights, part, master),
        "zero.stage=3": (pieces, part, master),
        "fsdp": (tops, tops, moments * tops + counters),
    }
    return {name: dict(zip(KINDS, sizes, strict=False)) | {"total": sum(sizes)} for name, sizes in table.items()}


# What a machine has -------------------------------------------------------------------------------------------------


def process_bytes(entry: str) -> int:
    """An entry of /proc/self/status: VmRSS, the resident memory; VmHWM, its peak; VmSize and VmData, what is mapped."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{entry}:"):
            return int(line.split()[1]) * 1024
    return 0


def free_bytes(device: torch.device) -> tuple[int, str]:
    """(bytes that this process could still take, who says so).

    On a GPU what the driver has free and torch keeps unused; on the CPU the least of what the host has, what the
    process's control group may take, and its own limits (`ulimit -v`, `ulimit -d`).
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused, "the driver"
    limits = [(host_bytes(), "the host"), *group_bytes()]
    for name, entry, words in (
        (resource.RLIMIT_AS, "VmSize", "ulimit -v"),
        (resource.RLIMIT_DATA, "VmData", "ulimit -d"),
    ):
        most = resource.getrlimit(name)[0]
        if most != resource.RLIM_INFINITY:
            limits.append((max(0, most - process_bytes(entry)), words))
    return min(limits)


def host_bytes() -> int:
    """Memory of this host that is free, or could be made so without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def group_bytes(machine: Path = Path("/")) -> Iterator[tuple[int, str]]:
    """What the control groups of this process may still take: a container's limit, or a Slurm job's."""
    files = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }
    for group, version in control_groups("memory", machine):
        limit, usage, inactive = files[version]
        try:
            most, used = ((group / name).read_text().strip() for name in (limit, usage))
            rows = (row.split() for row in (group / "memory.stat").read_text().splitlines())
            cached = [row[1] for row in rows if row[0] == inactive]
        except OSError:
            continue
        if most != "max" and int(most) < 2**60:
            yield max(0, int(most) - int(used) + int(cached[0] if cached else 0)), "the control group"


def control_groups(controller: str, machine: Path = Path("/")) -> Iterator[tuple[Path, int]]:
    """The folders of this process's control groups for memory or cpu, the innermost first; each with its version."""
    for line in (machine / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = machine / "sys/fs/cgroup" / controllers
        folder = root / path.lstrip("/")
        if not folder.is_dir():  # inside a container its own group is the root
            folder = root
        for group in [folder, *folder.parents]:
            yield group, 1 if controllers else 2
            if group == root:
                break


def peak_from_now(device: torch.device) -> Callable[[], int]:
    """What tells by how many bytes memory has risen at most since this was called: what torch's allocator gave out on a
    GPU, this process's resident memory on the CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return lambda: torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM starts again from VmRSS
    before = process_bytes("VmRSS")
    return lambda: process_bytes("VmHWM") - before


MOMENT = 1.0  # seconds for which what a CPU is said to do stays said; to find it out takes as long as a small step


class Meter:
    """How busy a rank's device is and how full, since it was last asked; a line for people, and figures on a GPU.

    A GPU's figures are NVML's, other processes' work among them: the share of the last moment in which it computed. A
    CPU's are this process's own: how many cores it kept busy. They are read anew after a second at the earliest.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = (time.perf_counter(), time.process_time())
        self._words = ""

    def read(self) -> tuple[str, dict[str, float]]:
        """(words for the progress line, figures for metrics.jsonl)."""
        if self._device.type == "cuda":
            return self._read_gpu()
        now = (time.perf_counter(), time.process_time())
        seconds, busy = (after - before for after, before in zip(now, self._before, strict=True))
        if not self._words or seconds > MOMENT:
            self._before = now
            self._words = f"{busy / max(seconds, 1e-9):.1f} cores busy, {mebibytes(process_bytes('VmRSS'), 0)} MiB"
        return self._words, {}

    def _read_gpu(self) -> tuple[str, dict[str, float]]:
        free, total = torch.cuda.mem_get_info(self._device)
        figures: dict[str, float] = {"gpu_memory_bytes": total - free, "gpu_memory_share": round(1 - free / total, 3)}
        words = f"{mebibytes(total - free, 0)} of {mebibytes(total, 0)} MiB"
        try:
            figures["gpu_busy"] = torch.cuda.utilization(self._device) / 100  # by nvidia-ml-py
        except Exception:  # it is missing, or has no figure for this device, such as a slice of one (MIG)
            return words, figures
        return f"GPU {figures['gpu_busy']:.0%} busy, {words}", figures
