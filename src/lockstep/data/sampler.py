"""The order of samples and their random numbers: pure functions of (seed, epoch) and of (seed, epoch, sample).

An epoch's order is cut into global batches and those into equal slices, one per rank: step k takes global batch k, and
rank r its r-th slice. So what the optimizer sees does not depend on the number of ranks, and one integer (steps done)
says where to resume.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch's samples: a permutation of 0…size−1 that depends on (seed, epoch) alone."""
    state = np.random.SeedSequence(seed, spawn_key=(epoch,)).generate_state(1)  # (seed, epoch) pairs never collide
    return torch.randperm(size, generator=torch.Generator().manual_seed(int(state[0])))


class ComputedOrder:
    """Another such permutation, each of whose entries is computed when it is asked for: no memory, at any size.

    `order[a:b]` is a tensor, as of `epoch_order`'s. A Feistel network on the bits of a position, keyed by (seed, epoch), is
    a permutation of 0…2**bits−1 whatever its round function; walked from a position until it comes to a number below
    `size`, it is one of 0…size−1, in fewer than two rounds on average (Black and Rogaway, "Ciphers with arbitrary finite
    domains", https://doi.org/10.1007/3-540-45760-7_9).
    """

    ROUNDS = 8

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        self.size = size
        bits = max(2, (size - 1).bit_length())
        self._right, self._left = bits // 2, bits - bits // 2  # bits of the two halves
        self._keys = np.random.SeedSequence(seed, spawn_key=(epoch, 2)).generate_state(self.ROUNDS, np.uint64)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, places: slice) -> Tensor:
        numbers = self._permuted(np.arange(*places.indices(self.size), dtype=np.uint64))
        while (outside := numbers >= self.size).any():
            numbers[outside] = self._permuted(numbers[outside])
        return torch.from_numpy(numbers.astype(np.int64))

    def _permuted(self, numbers: np.ndarray) -> np.ndarray:
        right = numbers & np.uint64((1 << self._right) - 1)
        left = numbers >> np.uint64(self._right)
        for turn, key in enumerate(self._keys):
            if turn % 2:
                right = right ^ (_mixed(left + key) >> np.uint64(64 - self._right))
            else:
                left = left ^ (_mixed(right + key) >> np.uint64(64 - self._left))
        return (left << np.uint64(self._right)) | right


def weighted_order(weights: Tensor, seed: int, epoch: int) -> Tensor:
    """As many samples as there are weights, drawn with replacement, each as often as its weight says: a function of
    (seed, epoch) alone."""
    state = np.random.SeedSequence(seed, spawn_key=(epoch, 1)).generate_state(1)
    generator = torch.Generator().manual_seed(int(state[0]))
    # The cumulative sum and not torch.multinomial, which ends at 2**24 categories.
    ends = weights.double().cumsum(0)
    drawn = torch.rand(len(weights), generator=generator, dtype=torch.float64) * ends[-1]
    return torch.searchsorted(ends, drawn, right=True).clamp_(max=len(weights) - 1)


def rank_slice(order: Tensor | ComputedOrder, step: int, batch_size: int, rank: int, world_size: int) -> Tensor:
    """Rank `rank`'s samples of global batch `step` of an epoch's order: [batch_size / world_size]."""
    share = batch_size // world_size
    start = step * batch_size + rank * share
    return order[start : start + share]


class StepSampler(Sampler[tuple[int, Tensor]]):
    """Yields (epoch, this rank's sample numbers) for every step from `start` to `stop`, over all the epochs they span.

    With `weights`, an epoch's samples are drawn by them, with replacement. `computed`: their order takes no memory.
    The last size % batch_size samples of an epoch's order are dropped, which are different ones each epoch.
    One sampler spans all epochs: DataLoader workers then keep working across the end of an epoch.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        start: int,
        stop: int,
        weights: Tensor | None = None,
        computed: bool = False,
    ) -> None:
        self.size, self.batch_size, self.seed, self.weights = size, batch_size, seed, weights
        self.computed = computed
        self.rank, self.world_size = rank, world_size
        self.start, self.stop = start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def order(self, epoch: int) -> Tensor | ComputedOrder:
        """The samples of an epoch, in their order."""
        if self.weights is not None:
            return weighted_order(self.weights, self.seed, epoch)
        if self.computed:
            return ComputedOrder(self.size, self.seed, epoch)
        return epoch_order(self.size, self.seed, epoch)

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        steps_per_epoch = self.size // self.batch_size
        epoch = -1
        order: Tensor | ComputedOrder = torch.empty(0)
        for done in range(self.start, self.stop):
            now, step = divmod(done, steps_per_epoch)
            if now != epoch:
                epoch, order = now, self.order(now)
            yield epoch, rank_slice(order, step, self.batch_size, self.rank, self.world_size)


class EvalSampler(Sampler[tuple[int, Tensor]]):
    """Yields (batch number, sample numbers): the evaluation set in fixed batches, dealt out to the ranks in turn.

    Nothing is padded, so every sample is counted once. And the batches themselves do not depend on the number of
    ranks, so neither do the sums over them, to the last bit.
    """

    def __init__(self, size: int, batch_size: int, rank: int, world_size: int) -> None:
        self.size, self.batch_size, self.rank, self.world_size = size, batch_size, rank, world_size

    def batches(self) -> int:
        """Batches over all ranks."""
        return math.ceil(self.size / self.batch_size)

    def rounds(self) -> int:
        """Batches of the rank that has most; any other has one less at most."""
        return math.ceil(self.batches() / self.world_size)

    def numbers(self) -> range:
        """The numbers of this rank's batches."""
        return range(self.rank, self.batches(), self.world_size)

    def __len__(self) -> int:
        return len(self.numbers())

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        for number in self.numbers():
            yield number, torch.arange(number * self.batch_size, min((number + 1) * self.batch_size, self.size))


def sample_uniform(seed: int, epoch: int, samples: Tensor, draws: int) -> Tensor:
    """Random numbers in [0, 1) that belong to a sample: [len(samples), draws], float64.

    A counter-based generator: no state that a worker, a rank or a resume could get out of step.
    """
    return torch.from_numpy((_bits(seed, epoch, samples, draws) >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def sample_seeds(seed: int, epoch: int, samples: Tensor) -> list[int]:
    """A seed for everything random that is done to a sample in an epoch: [len(samples)], each below 2**63."""
    return [int(number) for number in (_bits(seed, epoch, samples, 1)[:, 0] >> np.uint64(1))]


def _bits(seed: int, epoch: int, samples: Tensor, draws: int) -> np.ndarray:
    """64 random bits each, [len(samples), draws]: SplitMix64 (https://doi.org/10.1145/2660193.2660195) over the key
    (seed, epoch), the sample and the draw."""
    base = np.random.SeedSequence(seed, spawn_key=(epoch,)).generate_state(1, np.uint64)[0]
    counter = samples.numpy().astype(np.uint64)[:, None] * np.uint64(draws) + np.arange(1, draws + 1, dtype=np.uint64)
    return _mixed(base + counter * np.uint64(0x9E3779B97F4A7C15))


def _mixed(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finisher: each bit of the result depends on each of z's."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
