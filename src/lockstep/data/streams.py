"""Streams: iterable data sets, which give one sample after the other and cannot be asked for any one of them.

By default every rank reads the whole stream and keeps its share of each global batch: what the optimizer sees does not
depend on the number of ranks, and a run resumes on any number of them. A stream that is each rank's own part already
(`stream_per_rank = True` in the task, as after Hugging Face's `split_dataset_by_node`) is read as it is; it resumes on
as many ranks as it was saved by.

A stream with `state_dict` and `load_state_dict` (the convention of torchdata's StatefulDataLoader, which Hugging Face's
`datasets` follows too) resumes there. Any other one is read up to the place again, which takes its time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset

from lockstep.data.batch import Batch
from lockstep.data.loader import default_pair, generators_restored, pair, seed_all
from lockstep.data.sampler import sample_seeds
from lockstep.distributed.collectives import gather_objects
from lockstep.distributed.signals import be_a_helper
from lockstep.errors import UserError

Position = dict[str, Any]  # epoch: times that the stream has begun; samples: read since then; state: the stream's own
START: Position = {"epoch": 0, "samples": 0, "state": None}


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
    ) -> None:
        self.dataset, self.collate, self.seed = dataset, collate or default_pair, seed
        self.read, self.start, self.stop, self.position = read, start, stop, position

    def __iter__(self) -> Iterator[tuple[Batch, Position]]:
        epoch, done, state = self.position["epoch"], self.position["samples"], self.position["state"]
        samples = self._begin(epoch, done, state)
        while True:
            found: list[Any] = []
            with generators_restored():
                while len(found) < self.read:
                    seed_all(sample_seeds(self.seed, epoch, torch.tensor([done]))[0])
                    try:
                        found.append(next(samples))
                        done += 1
                    except StopIteration:
                        if not done:
                            raise UserError("the task's train_set is a stream that gives no sample") from None
                        epoch, done = epoch + 1, 0
                        samples = self._begin(epoch, 0, None)
                mine = found[self.start : self.stop]
                inputs, targets = pair(self.collate(mine), "collate")
            yield Batch(inputs, targets, len(mine)), {"epoch": epoch, "samples": done, "state": self._state()}

    def _begin(self, epoch: int, done: int, state: Any) -> Iterator[Any]:
        """The stream's samples from number `done` of an epoch on."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        if state is not None:
            self.dataset.load_state_dict(state)
            return iter(self.dataset)
        samples = iter(self.dataset)
        with generators_restored():
            for number in range(done):  # read again, under the same generators, and thrown away
                seed_all(sample_seeds(self.seed, epoch, torch.tensor([number]))[0])
                next(samples, None)
        return samples

    def _state(self) -> Any:
        return self.dataset.state_dict() if hasattr(self.dataset, "state_dict") else None


class Stream:
    """The stream that a run trains on, and where this rank is in it: an object that checkpoints keep.

    Args:
        per_rank: it is this rank's own part, and not the whole.
        group: connects the CPUs of all ranks.
    """

    def __init__(self, dataset: Any, per_rank: bool, group: dist.ProcessGroup | None) -> None:
        self.dataset, self.per_rank, self._group = dataset, per_rank, group
        self.position = dict(START)

    def batches(
        self,
        collate: Callable[[list[Any]], Any] | None,
        seed: int,
        share: int,
        shard: int,
        shards: int,
        workers: int,
        pin_memory: bool,
    ) -> Iterator[Batch]:
        """This rank's batches of `share` samples, without end; `workers` processes, one at most, read ahead."""
        read, start = (share, 0) if self.per_rank else (share * shards, share * shard)
        reader = StreamReader(self.dataset, collate, seed, read, start, start + share, self.position)
        if workers or pin_memory:
            loader: Any = DataLoader(
                reader,
                batch_size=None,
                num_workers=min(workers, 1),
                pin_memory=pin_memory,
                multiprocessing_context="fork" if workers else None,
                worker_init_fn=be_a_helper,
                generator=torch.Generator(),
            )
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
        self.position = positions[dist.get_rank() if self.per_rank else 0]


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
