"""The batches of one rank, for training and for evaluation: fetched, moved to its device, in the model's dtype."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.config.keys import AUTO
from lockstep.config.schema import Config
from lockstep.config.tasks import short_name
from lockstep.data.batch import Batch, as_scalar, first_tensor, map_tensors, tree_tensors
from lockstep.data.loader import Samples, build_loader, default_pair
from lockstep.data.sampler import EvalSampler, StepSampler
from lockstep.data.streams import Stream, is_stream, read_whole
from lockstep.distributed.parallel_dims import ParallelDims
from lockstep.distributed.process_group import World
from lockstep.errors import UserError
from lockstep.task import option

STORED_SAMPLES = 2**27  # up to which an epoch's order is kept in memory: 1 GiB
LOOKED_AT = 8  # samples by which ranks tell whether they have the same data


class FirstSamples:
    """The first samples of a data set."""

    def __init__(self, dataset: Any, size: int) -> None:
        self.dataset, self.size = dataset, min(size, len(dataset))
        if hasattr(dataset, "fetch"):
            self.fetch, self.draws = dataset.fetch, dataset.draws

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]


class BatchSource:
    """Both data sets of a task, and this rank's batches of them.

    Args:
        dtype: of the floating numbers that the model takes.

    Attributes:
        train_set, eval_set: the task's; without one to evaluate on, `eval_set` is empty.
        stream: where this rank is in a train_set that can only be iterated over; None where it has an index.
        train_size: samples of an epoch.
        workers: processes that read samples; data in memory are faster without.
    """

    def __init__(self, task: Any, config: Config, world: World, dims: ParallelDims, dtype: torch.dtype) -> None:
        self.task, self._config, self._world, self._dims, self._dtype = task, config, world, dims, dtype
        self.train_set = task.train_set
        evaluated = option(task, "eval_set")
        if evaluated is not None and is_stream(evaluated):
            evaluated = read_whole(evaluated, config.seed)
        self.eval_set: Any = [] if evaluated is None else evaluated
        own = bool(option(task, "stream_per_rank"))
        self.stream = Stream(self.train_set, own, world.control, config.seed) if is_stream(self.train_set) else None
        self.train_size = train_size(task, config)
        self._weigh = option(task, "weigh")
        workers = config.data.workers
        self.workers = (max(1, world.threads) if getattr(task, "decodes", False) else 0) if workers is None else workers

    def train_batches(self, start: int, stop: int) -> Iterator[Batch]:
        """This rank's shares of the global batches of steps start…stop − 1, each with its weight."""
        config, dims = self._config, self._dims
        if self.stream:
            share, pinned = config.global_batch_size // dims.shards, self._world.device.type == "cuda"
            collate = option(self.task, "collate")
            wait = config.timeout_seconds
            read = self.stream.batches(collate, share, dims.shard, dims.shards, self.workers, pinned, wait)
            return map(self._weighted, map(self.prepare, itertools.islice(read, stop - start)))
        sampler = StepSampler(
            self.train_size,
            config.global_batch_size,
            config.seed,
            dims.shard,
            dims.shards,
            start,
            stop,
            option(self.task, "sample_weights"),
            config.sample_order == "computed" or (config.sample_order == AUTO and self.train_size > STORED_SAMPLES),
        )
        return map(self._weighted, self._load(self._samples(self.train_set), sampler))

    def eval_sampler(self) -> EvalSampler:
        """Which samples of the evaluation set are this rank's."""
        size, batch_size = len(self.eval_set), self._config.eval_batch_size
        return EvalSampler(size, batch_size, *self._dims.evaluation_share)

    def eval_batches(self, sampler: EvalSampler) -> Iterator[Batch]:
        """This rank's batches of the evaluation set, prepared as those to train on are."""
        heartbeat = self._world.heartbeat
        for batch in self._load(self._samples(self.eval_set, fixed=True), sampler):
            heartbeat.move()
            yield batch

    def facts(self) -> dict[str, int]:
        """What all ranks must have alike (lockstep.distributed.consistency)."""
        unit = option(self.task, "unit")
        return {
            f"{unit} to train on": self.train_size,
            f"{unit} to evaluate": len(self.eval_set),
            f"other {unit} to train on": self._checksum(self.train_set),
            f"other {unit} to evaluate": self._checksum(self.eval_set),
        }

    def _checksum(self, dataset: Any) -> int:
        """Of what a data set says of itself, or of a few of its samples: all of them would take too long."""
        if hasattr(dataset, "checksum"):
            return int(dataset.checksum())
        found = 0
        if self.stream and dataset is self.train_set:
            return found  # to look at its samples would be to read them, and each rank's may be its own
        if len(dataset):
            step = max(1, len(dataset) // LOOKED_AT)
            samples = self._samples(dataset, fixed=True)
            for number in range(0, len(dataset), step)[:LOOKED_AT]:
                batch = samples[0, torch.tensor([number])]
                for tensor in itertools.chain(tree_tensors(batch.inputs), tree_tensors(batch.targets)):
                    found = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), found)
        return found

    def sample_bytes(self) -> int:
        """Bytes of the first sample as a worker hands it over."""
        if self.stream:
            inputs, targets = (option(self.task, "collate") or default_pair)(self.stream.first(1))
        else:
            batch = self._samples(self.train_set, fixed=True)[0, torch.tensor([0])]
            inputs, targets = batch.inputs, batch.targets
        return sum(tensor.nbytes for tensor in itertools.chain(tree_tensors(inputs), tree_tensors(targets)))

    @property
    def where(self) -> str:
        """The setting that says where the data lie."""
        data, task = self._config.data, self._config.task.name
        if task != "images":
            return f"task={short_name(task)}'s data"
        return f"data.root={data.root}" if data.root else f"data={data.name}"

    def limit_evaluation(self) -> None:
        """Evaluate one batch per rank from now on, where what an evaluation finds does not matter."""
        self.eval_set = FirstSamples(self.eval_set, self._config.eval_batch_size * self._world.world_size)

    def example(self, count: int) -> Batch:
        """A batch of so many samples as the model takes them, whose content does not matter: the first ones."""
        if hasattr(self.task, "example"):
            inputs, targets = self.task.example(count)
            return self.prepare(Batch(inputs, targets, count))
        if self.stream:
            found = self.stream.first(count)
            inputs, targets = (option(self.task, "collate") or default_pair)(
                list(itertools.islice(itertools.cycle(found), count))
            )
            return self.prepare(Batch(inputs, targets, count))
        samples = torch.arange(count) % len(self.train_set)
        return self.prepare(self._samples(self.train_set, fixed=True)[0, samples])

    def prepare(self, batch: Batch) -> Batch:
        """To the device as it is, then through the task's `to_device`, then in the model's dtype and memory format."""
        device = self._world.device
        inputs, targets = (
            map_tensors(lambda tensor: tensor.to(device, non_blocking=True), each)
            for each in (batch.inputs, batch.targets)
        )
        if (to_device := option(self.task, "to_device")) is not None:
            inputs, targets = to_device(inputs, targets)
        return Batch(map_tensors(self._formatted, inputs), map_tensors(self._cast, targets), batch.count)

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def _formatted(self, tensor: Tensor) -> Tensor:
        tensor = self._cast(tensor)
        if self._config.channels_last and tensor.dim() == 4 and tensor.is_floating_point():
            return tensor.contiguous(memory_format=torch.channels_last)
        return tensor

    def _samples(self, dataset: Any, fixed: bool = False) -> Samples:
        return Samples(dataset, self._config.seed, option(self.task, "collate"), fixed)

    def _load(self, samples: Samples, sampler: StepSampler | EvalSampler) -> Iterator[Batch]:
        pinned, wait = self._world.device.type == "cuda", self._config.timeout_seconds
        return map(self.prepare, build_loader(samples, sampler, self.workers, pinned, wait))

    def _weighted(self, batch: Batch) -> Batch:
        """Give a batch its weight: this rank's items by the mean over the ranks.

        Samples are dealt out equally, so their weight is 1. Items that a task counts itself, such as the tokens of
        sentences of unequal length, are not: one all-reduce of a number says how many there are in all.
        """
        first_tensor(batch.inputs, "the inputs")
        if self._weigh is None:
            return batch
        batch.items, batch.weigh = items_of(self._weigh, batch.targets), self._weigh
        total = batch.items.clone()
        if self._dims.shards > 1:
            dist.all_reduce(total)
            total /= self._world.world_size // self._dims.shards  # the ranks of one pipeline have the same batch
        batch.weight = (batch.items * self._dims.shards / total).to(self._dtype)
        return batch


def train_size(task: Any, config: Config) -> int:
    """Samples of an epoch: of the training set, or for a stream without a length what the task or `max_steps` says.

    Raises:
        UserError: nothing says so.
    """
    if hasattr(task.train_set, "__len__"):
        return len(task.train_set)
    if (size := option(task, "epoch_samples")) is not None:
        return int(size)
    if config.max_steps is None:
        raise UserError(
            f"task={short_name(config.task.name)}: its train_set is a stream without a length; set max_steps, or give "
            "the task epoch_samples"
        )
    if config.global_batch_size == AUTO:
        raise UserError(
            f"global_batch_size=auto: task={short_name(config.task.name)}'s train_set is a stream without a length; set "
            "a number, or give the task epoch_samples"
        )
    return int(config.max_steps * config.global_batch_size)


def items_of(weigh: Any, targets: Any) -> Tensor:
    """How many items a loss is a mean over, as float64 on the targets' device: whole numbers are exact."""
    return as_scalar(weigh(targets), first_tensor(targets, "the targets").device).double()
