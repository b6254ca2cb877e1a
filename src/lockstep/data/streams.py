"""Streams: iterable data sets, which give one sample after the other and cannot be asked for any one of them.

By default every rank reads the whole stream and keeps its share of each global batch: what the optimizer sees does not
depend on the number of ranks, and a run resumes on any number of them. A stream that is each rank's own part already
(`stream_per_rank = True` in the task, as after Hugging Face's `split_dataset_by_node`) is read as it is; it resumes on
as many ranks as it was saved by.

A stream with `state_dict` and `load_state_dict` (the convention of torchdata's StatefulDataLoader, which Hugging Face's
`datasets` follows too) resumes there. Any other one is read up to the place again, which takes its time. So is one whose
state is not all of its place: a `datasets.IterableDataset` that was shuffled forgets what was in its buffer. Therefore a
resume begins one batch early and looks whether the stream gives that batch again.
"""

from __future__ import annotations

import copy
import itertools
import pickle
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset

from lockstep.data.batch import Batch, map_tensors
from lockstep.data.loader import default_pair, generators_restored, pair, read_ahead, seed_all
from lockstep.data.sampler import sample_seeds
from lockstep.distributed.collectives import gather_objects
from lockstep.distributed.signals import be_a_helper
from lockstep.errors import UserError

# epoch: times that the stream has begun; samples: read since then; state: the stream's own. After a batch also `before`,
# the position in front of it, how many samples were `read` for it, and what was `seen` of them.
Position = dict[str, Any]
START: Position = {"epoch": 0, "samples": 0, "state": None}
SAMPLED = 4  # samples of a batch


def is_stream(dataset: Any) -> bool:
    """Whether a data set can only be iterated over."""
    return isinstance(dataset, IterableDataset) or (
        hasattr(dataset, "__iter__") and not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"))
    )


class StreamReader(IterableDataset[tuple[Batch, Position]]):
    """A rank's batches of a stream, from a position on, each with the position after it.

    A stream that ends begins anew, after `set_epoch(n)` where it has that. Each sample is drawn under generators seeded
    by (seed, epoch, its number in the stream), so random transforms depend on neither ranks nor resumes.

    Args:
        read: samples that are read for each batch: of the whole global batch, or of this rank's share.
        start, stop: which of them are this rank's.
        fresh: the stream's own state where nothing has been read; None: it has none.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Any] | None,
        seed: int,
        read: int,
        start: int,
        stop: int,
        position: Position,
        fresh: Any,
    ) -> None:
        self.dataset, self.collate, self.seed = dataset, collate or default_pair, seed
        self.read, self.start, self.stop, self.position, self.fresh = read, start, stop, position, fresh

    def __iter__(self) -> Iterator[tuple[Batch, Position]]:
        position = self.position
        if "before" in position:
            _, samples = last_batch_again(self.dataset, self.seed, position, self.fresh)
        else:
            samples = samples_from(self.dataset, self.seed, position, self.fresh)
        while True:
            before = {name: position[name] for name in START}
            with generators_restored():
                found = [next(samples) for _ in range(self.read)]
                mine = [sample for sample, _, _ in found[self.start : self.stop]]
                inputs, targets = pair(self.collate(mine), "collate")
            _, epoch, done = found[-1]
            position = {"epoch": epoch, "samples": done, "state": _state(self.dataset)}
            if position["state"] is not None:
                position |= {"before": before, "read": self.read, "seen": _digest([sample for sample, _, _ in found])}
            yield Batch(inputs, targets, len(mine)), position


def samples_from(dataset: Any, seed: int, position: Position, fresh: Any) -> Iterator[tuple[Any, int, int]]:
    """A stream's samples from a position on, without end: (sample, epoch, samples read since it began).

    Each is drawn under generators that it leaves as they are then: use it under `generators_restored`.
    """
    epoch, done, state = position["epoch"], position["samples"], position["state"]
    samples = _begin(dataset, epoch, fresh if state is None else state)
    for number in range(0 if state is not None else done):  # read again, under the same generators, and thrown away
        seed_all(sample_seeds(seed, epoch, torch.tensor([number]))[0])
        next(samples, None)
    while True:
        seed_all(sample_seeds(seed, epoch, torch.tensor([done]))[0])
        try:
            sample = next(samples)
        except StopIteration:
            if not done:
                raise UserError("the task's train_set is a stream that gives no sample") from None
            epoch, done = epoch + 1, 0
            samples = _begin(dataset, epoch, fresh)
            continue
        done += 1
        yield sample, epoch, done


def last_batch_again(
    dataset: Any, seed: int, position: Position, fresh: Any
) -> tuple[list[Any], Iterator[tuple[Any, int, int]]]:
    """(the samples of the batch in front of a position, read again, and what `samples_from` gives behind them)."""
    samples = samples_from(dataset, seed, position["before"], fresh)
    with generators_restored():
        return [next(samples)[0] for _ in range(position["read"])], samples


def _begin(dataset: Any, epoch: int, state: Any) -> Iterator[Any]:
    """The stream from a state of its own on. That of its beginning is loaded too: what was loaded last, when an example
    was read or a run resumed, may be where it begins otherwise."""
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(epoch)
    if state is not None:
        dataset.load_state_dict(copy.deepcopy(state))
    return iter(dataset)


def _state(dataset: Any) -> Any:
    return copy.deepcopy(dataset.state_dict()) if hasattr(dataset, "state_dict") else None


def _digest(samples: list[Any]) -> int:
    """Of a few of the samples and, of tensors, of the first numbers: enough to tell whether they are others."""
    some = samples[:: max(1, len(samples) // SAMPLED)]
    try:
        return zlib.crc32(pickle.dumps(map_tensors(lambda tensor: tensor.flatten()[:64].tolist(), some)))
    except (pickle.PicklingError, TypeError, AttributeError):  # samples that no pickle takes
        return 0


def _read_alone(worker: int) -> None:
    """Begin a worker process that reads as the training process would. A stream that saw that it is in a worker might
    draw from other generators there (`datasets` does), or leave parts to others."""
    be_a_helper(worker)
    torch.utils.data._utils.worker._worker_info = None


class Stream:
    """The stream that a run trains on, and where this rank is in it: an object that checkpoints keep.

    Args:
        per_rank: it is this rank's own part, and not the whole.
        group: connects the CPUs of all ranks.
    """

    def __init__(self, dataset: Any, per_rank: bool, group: dist.ProcessGroup | None, seed: int = 0) -> None:
        self.dataset, self.per_rank, self._group, self._seed = dataset, per_rank, group, seed
        self.position = dict(START)
        self._fresh = _state(dataset)

    def batches(
        self,
        collate: Callable[[list[Any]], Any] | None,
        share: int,
        shard: int,
        shards: int,
        workers: int,
        pin_memory: bool,
        timeout_seconds: float = 0,
    ) -> Iterator[Batch]:
        """This rank's batches of `share` samples, without end; `workers` processes, one at most, read ahead, and are
        waited for so long at most, where that is not 0."""
        read, start = (share, 0) if self.per_rank else (share * shards, share * shard)
        stop = start + share
        reader = StreamReader(self.dataset, collate, self._seed, read, start, stop, self.position, self._fresh)
        if workers or pin_memory:
            loader: Any = read_ahead(reader, min(workers, 1), pin_memory, timeout_seconds, _read_alone)
        else:
            loader = reader
        for batch, position in loader:
            self.position = position
            yield batch

    def first(self, count: int) -> list[Any]:
        """Samples from the beginning of the stream, as many as there are up to `count`; its place is kept."""
        before = self.dataset.state_dict() if hasattr(self.dataset, "state_dict") else None
        with generators_restored():
            seed_all(0)
            found = list(itertools.islice(iter(self.dataset), count))
        if before is not None:
            self.dataset.load_state_dict(before)
        return found

    def state_dict(self) -> dict[str, Any]:
        """All ranks call it together where each has a stream of its own."""
        return {"positions": gather_objects(self.position, self._group) if self.per_rank else [self.position]}

    def load_state_dict(self, state: Any) -> None:
        """Resume at a saved position.

        Raises:
            UserError: other ranks than now had each a stream of their own.
        """
        positions = state["positions"]
        expected = dist.get_world_size() if self.per_rank else 1
        if len(positions) != expected:
            raise UserError(
                f"the checkpoint holds the places of {len(positions)} ranks' streams, and these are {expected}: a stream "
                "of each rank's own (stream_per_rank) resumes on as many ranks as it was saved by"
            )
        self.position = self._found_again(positions[dist.get_rank() if self.per_rank else 0])

    def _found_again(self, position: Position) -> Position:
        """The same place, without the stream's own state where that does not lead to it."""
        if "before" not in position:
            return position
        again, _ = last_batch_again(self.dataset, self._seed, position, self._fresh)
        if _digest(again) == position["seen"]:
            return position
        if dist.get_rank() == 0:
            print(
                f"the stream's state_dict() is not all of its place: {position['samples']:,} samples of it are read again",
                file=sys.stderr,
            )
        return {"epoch": position["epoch"], "samples": position["samples"], "state": None}


def read_whole(dataset: Any, seed: int) -> list[Any]:
    """A stream to evaluate on, in memory: each rank evaluates its own batches of it, which a stream cannot give."""
    found: list[Any] = []
    samples = iter(dataset)
    with generators_restored():
        while True:
            seed_all(sample_seeds(seed, 0, torch.tensor([len(found)]))[0])
            try:
                found.append(next(samples))
            except StopIteration:
                return found
