"""A recipe's own training, taken by one process that is rank r of N, on tensors that have shapes and no numbers.

The recipe's function is called as it stands, with a Run whose `steps` yields fake batches. Its model is built on torch's fake
tensors; its collectives go to torch's fake process group, which has N ranks and sends nothing. So whatever the recipe does,
one of your own too, is what is counted: which collectives, on which tensors, among which ranks.
"""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore

from lockstep.config.schema import Config
from lockstep.data.batch import Batch, map_tensors
from lockstep.data.batches import items_of
from lockstep.distributed.parallel_dims import ParallelDims
from lockstep.distributed.process_group import World
from lockstep.memory.tracker import state_bytes
from lockstep.plan.exchanges import mean_step, shortened
from lockstep.plan.hardware import Hardware
from lockstep.plan.memory import StorageLedger
from lockstep.plan.watch import StepTrace, StepWatch
from lockstep.recipe import Recipe
from lockstep.run import Run
from lockstep.task import option
from lockstep.tasks.build import known_task, sample_of
from lockstep.training.precision import DTYPES

STEPS = 3  # the second has the optimizer's state from its beginning; after it DDP has its buckets in order


@dataclass(frozen=True)
class DryRun:
    """What a rank would do and hold.

    Attributes:
        step: the last one; where ranks meet in one of many, the mean of these.
        peak: bytes by part when most was there, over the last two.
        samples: of a rank's share of the global batch.
        slack: bytes that a GPU's allocator takes beyond them.
        state: bytes of parameters, gradients and optimizer; 0: not known, as of an engine's.
        config: with which the steps were taken.
        where: the rank that this is, where ranks differ.
        host_peak: bytes that the rank holds in the host's memory when most is there, of what is offloaded.
    """

    step: StepTrace
    peak: dict[str, int]
    samples: int
    slack: int
    state: int
    config: Any
    where: str = ""
    host_peak: int = 0

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak.values())


class Enough(BaseException):
    """The steps are taken: what a recipe does after them is not planned."""


class Recent(dict[Any, Any]):
    """What torch's fake tensors keep of tensors that they were made from: here only the newest.

    It is a weak dictionary otherwise, and nn.Module.to refuses a parameter to which there is a weak reference.
    """

    def __setitem__(self, key: Any, value: Any) -> None:
        self.clear()
        super().__setitem__(key, value)


class DryTraining(Run[Any]):
    """The Run of a recipe that only makes as if: no data are read, nothing is written, `steps` ends after three."""

    def __init__(self, recipe: Recipe, config: Config, world: World, watch: StepWatch, example: Any) -> None:
        self.recipe, self.world, self.out, self.started = recipe.name, world, Path("no-folder"), time.perf_counter()
        self.asked = self.config = config
        self.device, self.device_ids, self.listener = world.device, world.device_ids, None
        dims = ParallelDims.of(world.rank, world.world_size, config, recipe.ranks)
        self.shards, self.shard, self._home = dims.shards, dims.shard, "cpu" if dims.in_stages else self.device
        self._on_host: list[torch.Tensor] = []  # a whole model, of which a rank takes its stages
        self.task, self.prepare = known_task(config), None
        self.scheduled_steps = self.steps_per_epoch = 1_000_000
        self._watch, self._example = watch, example
        self._context = SimpleNamespace(  # type: ignore[assignment]
            notes={}, step=0, total_steps=STEPS, scaler=None, note=lambda *_, **__: None
        )
        self.report = SimpleNamespace(line=lambda *_: None, log=io.StringIO())  # type: ignore[assignment]
        self.data = SimpleNamespace(train_size=10**9, example=self._batch)  # type: ignore[assignment]
        self.loop = SimpleNamespace(backbone_only=False)  # type: ignore[assignment]
        self.peak: dict[str, int] = {}
        self.slack = self.state = 0

    @property
    def samples(self) -> int:
        return int(self.config.global_batch_size) // self.shards

    def place(self, model: nn.Module) -> nn.Module:
        """As in a real run; a pipeline's rank then takes its stages from the host."""
        model = super().place(model)
        if self._home == "cpu" and self._watch.clock.hardware.device != "cpu":
            self._on_host = [*model.parameters(), *model.buffers()]
        return model

    def record(self, **_: Any) -> None:
        """Nobody logs."""

    def finish(self) -> None:
        """Nothing is exported."""

    def held_bytes(self) -> dict[str, int]:
        return {}

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        return (self._weighted(self._batch(self.samples)) for _ in range(start, stop))

    def steps(
        self, *, model: nn.Module, optimizer: Any, keep: Any = None, engine: Any = None, **_: Any
    ) -> Iterator[Batch]:
        ledger = self._watch.ledger
        mine = {id(each) for each in [*model.parameters(), *model.buffers()]}
        ledger.leave_out(each for each in self._on_host if id(each) not in mine)
        if self._watch.offloads:
            ledger.move_to_host(engine.offloaded_tensors() if engine else model.parameters())
            self._watch.copies_hide = engine.copies_hide if engine else True  # FSDP copies in streams of its own
        if hasattr(engine, "held_tensors"):
            engine.before_update(lambda: self._name_held(engine))
        optimizers: list[Optimizer] = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
        for each in optimizers:
            each.register_step_pre_hook(lambda *_: self._name_gradients(model))
            if self._watch.clock.hardware.device != "cpu" and not self._watch.offloads:
                for group in each.param_groups:
                    if group.get("foreach", 0) is None:  # what torch chooses on a GPU
                        group["foreach"] = True
        ledger.call([*model.parameters(), *model.buffers()], "parameters")
        model.train()
        for number in range(STEPS - 1 + self.config.steps_between_exchanges):
            if number == 1:
                ledger.begin()
            watched = number >= STEPS - 1  # the others are for what they leave behind
            if watched:
                self._watch.begin()
            yield self._weighted(self._batch(self.samples))
            if watched:
                self._watch.end()
            kept = (value for thing in (keep or {}).values() for value in thing.state_dict().values())
            ledger.call((value for value in kept if isinstance(value, torch.Tensor)), "optimizer")
            for each in optimizers:
                states = (value for state in each.state.values() for value in state.values())
                ledger.call((value for value in states if isinstance(value, torch.Tensor)), "optimizer")
            self._context.step += 1
        self.peak = ledger.peak()
        self.state = 0 if engine else sum(state_bytes(each)[0] for each in optimizers)
        self.slack = ledger.slack() if self._watch.clock.hardware.device != "cpu" else 0
        raise Enough

    def _name_held(self, engine: Any) -> None:
        if self._watch.offloads:
            self._watch.ledger.move_to_host(engine.offloaded_tensors())
        for part, tensors in engine.held_tensors().items():
            self._watch.ledger.call(tensors, part)

    def _name_gradients(self, model: nn.Module) -> None:
        self._watch.ledger.call((each.grad for each in model.parameters()), "gradients")

    def _batch(self, count: int) -> Batch:
        """A batch of so many samples as the model takes them, but without numbers."""
        dtype, layout = DTYPES[self.config.precision], self.config.channels_last

        def fake(tensor: torch.Tensor) -> torch.Tensor:
            shape = (count, *tensor.shape[1:]) if tensor.dim() else ()
            made = torch.zeros(shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype, device=self.device)
            if layout is True and made.dim() == 4 and made.is_floating_point():
                made = made.contiguous(memory_format=torch.channels_last)
            return made

        inputs, targets = (map_tensors(fake, each) for each in self._example)
        return Batch(inputs, targets, count)

    def _weighted(self, batch: Batch) -> Batch:
        """With the weight that a loader gives it where the task counts its own items: an all-reduce of a number."""
        if (weigh := option(self.task, "weigh")) is None:
            return batch
        batch.items, batch.weigh = items_of(weigh, batch.targets), weigh
        total = batch.items.clone()
        if self.shards > 1:
            dist.all_reduce(total)
        batch.weight = (batch.items * self.shards / total).to(DTYPES[self.config.precision])
        return batch


@contextlib.contextmanager
def fake_ranks(rank: int, world_size: int) -> Iterator[World]:
    """Within it this process is a rank of a world whose others are not there."""
    # Brings torch._dynamo, which takes seconds: not before the first line is on the screen.
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    dist.init_process_group(dist.Backend.FAKE, store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield World(rank, world_size, 0, ["plan"] * world_size, torch.device("cpu"), "fake", 1)
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # it remembers meshes, whose groups have had their names


@contextlib.contextmanager
def moves_to_its_place() -> Iterator[None]:
    """Within it a module stays where it is moved to, if it is there: of fake tensors torch refuses even that where
    somebody refers to one weakly."""
    move = nn.Module.to

    def to(module: nn.Module, *to: Any, **how: Any) -> nn.Module:
        stays = not how and len(to) == 1 and isinstance(to[0], torch.device | str) and torch.device(to[0]).type == "cpu"
        return module if stays else move(module, *to, **how)

    nn.Module.to = to  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.Module.to = move  # type: ignore[method-assign]


@contextlib.contextmanager
def resizes_are_seen(ledger: StorageLedger) -> Iterator[None]:
    """Within it the ledger hears of each storage that is made smaller or larger: FSDP does so without an operation."""
    resize = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        made = resize(storage, size)
        ledger.resized(storage)
        return made

    torch.UntypedStorage.resize_ = resize_  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]


@contextlib.contextmanager
def copies_are_made(watch: StepWatch) -> Iterator[None]:
    """Within it `tensor.to(…, non_blocking=…)` makes a copy on the other side; host and device are both the CPU here.

    So FSDP brings its shards to the device and gradients back, and DeepSpeed brings to the device what the host holds.
    """
    move = torch.Tensor.to

    def to(tensor: torch.Tensor, *to: Any, **how: Any) -> torch.Tensor:
        leaves = watch.ledger.is_hosted(tensor) or any(isinstance(each, torch.device) for each in to)
        return watch.cross(tensor) if leaves and "non_blocking" in how else move(tensor, *to, **how)

    torch.Tensor.to = to  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        torch.Tensor.to = move  # type: ignore[method-assign]


@contextlib.contextmanager
def dry_world(
    config: Config, world_size: int, hardware: Hardware, rank: int = 0
) -> Iterator[tuple[World, StepWatch, Any]]:
    """Within it tensors have no numbers, collectives send nothing, and the watch that is given counts both."""
    example = sample_of(known_task(config), config.seed)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    mode.fake_tensor_converter.meta_converter.tensor_memo = Recent()  # type: ignore[assignment]
    watch = StepWatch(hardware)
    before = torch.get_num_threads()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), fake_ranks(rank, world_size) as world:
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # DeepSpeed looks at alignment
        with moves_to_its_place(), resizes_are_seen(watch.ledger), mode, watch:
            yield world, watch, example
    torch.set_num_threads(before)


def as_planned(config: Any) -> Any:
    """A config without what is decided only on the hardware, and without torch.compile, whose kernels no plan knows."""
    return replace(config, channels_last=config.channels_last is True, compile=False)


def dry_steps(recipe: Recipe, config: Config, world_size: int, hardware: Hardware, rank: int = 0) -> DryRun:
    """Take three steps of a recipe as rank `rank` of `world_size`, without numbers.

    Args:
        config: of the recipe, validated for so many ranks.

    Raises:
        whatever the recipe raises on tensors without numbers.
    """
    config = as_planned(config)
    with dry_world(config, world_size, hardware, rank) as (world, watch, example):
        run = DryTraining(recipe, shortened(config), world, watch, example)
        watch.offloads = hardware.offload is not None and getattr(config, "offload", False)
        with contextlib.suppress(Enough), copies_are_made(watch) if watch.offloads else contextlib.nullcontext():
            recipe.train(run)
    if not watch.steps:
        raise NotImplementedError("it never asked run.steps for a batch")
    step, host = mean_step(watch.steps, config), watch.ledger.host_peak
    return DryRun(step, run.peak, run.samples, run.slack, run.state, config, host_peak=host)
