"""Data: what a run reads is a function of (seed, epoch, sample), not of ranks, batches, workers or restarts."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import random
import shutil
import socket
import struct
import tarfile
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.transforms.v2 import functional

from lockstep.config.schema import DataConfig
from lockstep.data import datasets, image_files, image_folder, transforms
from lockstep.data.batch import Batch
from lockstep.data.datasets import DRAWS, ImageDataset, ImageFiles, InMemoryImages, load_data
from lockstep.data.loader import Samples, build_loader
from lockstep.data.sampler import ComputedOrder, EvalSampler, StepSampler, epoch_order, rank_slice, sample_uniform
from lockstep.errors import UserError
from tests.helpers.http_site import Site, serving

few = settings(max_examples=60, deadline=None)

seeds = st.integers(0, 2**64)
epochs = st.integers(0, 10_000)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, int, int]:
    """(size, batch size, world size), all that a run would accept."""
    world_size = draw(st.integers(1, 8))
    size = draw(st.integers(world_size, 500))
    return size, world_size * draw(st.integers(1, size // world_size)), world_size


@st.composite
def twice_cuts(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """(size, batch size, world size, another world size); both divide the batch."""
    before, after = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    unit = math.lcm(before, after)
    size = draw(st.integers(unit, 500))
    return size, unit * draw(st.integers(1, size // unit)), before, after


def flat(lists: Iterable[list[int]]) -> list[int]:
    return [number for part in lists for number in part]


# The order --------------------------------------------------------------------------------------------------------


@few
@given(cuts(), seeds, epochs)
def test_the_ranks_together_read_an_epoch_in_its_order(cut: tuple[int, int, int], seed: int, epoch: int) -> None:
    size, batch_size, world_size = cut
    order = epoch_order(size, seed, epoch)
    seen: list[int] = []
    for step in range(size // batch_size):
        shares = [rank_slice(order, step, batch_size, rank, world_size).tolist() for rank in range(world_size)]
        assert {len(share) for share in shares} == {batch_size // world_size}
        together = flat(shares)
        assert together == order.tolist()[step * batch_size : (step + 1) * batch_size]
        seen += together
    assert len(set(seen)) == len(seen), "a sample came twice"
    assert set(range(size)) - set(seen) == set(order.tolist()[size - size % batch_size :]), (
        "not just the tail is missing"
    )


@few
@given(st.integers(1, 500), seeds, epochs)
def test_an_order_is_a_permutation_and_ignores_the_state_of_torch(size: int, seed: int, epoch: int) -> None:
    torch.manual_seed(1)
    first = epoch_order(size, seed, epoch)
    torch.manual_seed(2)
    np.random.seed(2)
    before = torch.get_rng_state()
    second = epoch_order(size, seed, epoch)
    assert first.tolist() == second.tolist()
    assert sorted(first.tolist()) == list(range(size))
    assert torch.equal(torch.get_rng_state(), before), "it took numbers that dropout would have got"


@few
@given(st.integers(1, 3000), seeds, epochs)
def test_a_computed_order_is_a_permutation_too_and_each_part_is_its_own(size: int, seed: int, epoch: int) -> None:
    order = ComputedOrder(size, seed, epoch)
    whole = order[:].tolist()
    assert len(order) == size
    assert sorted(whole) == list(range(size))
    middle = size // 3
    assert order[middle : 2 * middle].tolist() == whole[middle : 2 * middle]
    assert order[size - 1 : size + 5].tolist() == whole[-1:]


def test_a_computed_order_of_a_thousand_million_samples_takes_no_memory() -> None:
    size = 10**9
    tracemalloc.start()
    order = ComputedOrder(size, 0, 0)
    parts = [order[at : at + 1000] for at in range(0, size, size // 100)]
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
    numbers = torch.cat(parts)
    assert len(numbers.unique()) == len(numbers)
    assert int(numbers.min()) >= 0
    assert int(numbers.max()) < size
    # As even as random numbers: 100,000 in 64 bins have a chi-square of 63 on average, of 120 once in 50,000 orders.
    bins = torch.bincount(numbers * 64 // size, minlength=64).double()
    expected = len(numbers) / 64
    assert float(((bins - expected) ** 2 / expected).sum()) < 120
    # And a number says nothing of the next one, nor of its place, nor of the next epoch's.
    for other in (numbers.roll(1), torch.arange(len(numbers)), ComputedOrder(size, 0, 1)[: len(numbers)]):
        assert abs(float(torch.corrcoef(torch.stack([numbers.double(), other.double()]))[0, 1])) < 0.02


def test_ranks_read_a_computed_order_together() -> None:
    size, batch_size, epoch = 103, 12, 2
    steps = size // batch_size
    samplers = [
        StepSampler(size, batch_size, 5, rank, 3, epoch * steps, (epoch + 1) * steps, computed=True)
        for rank in range(3)
    ]
    read = [sample for step in zip(*samplers, strict=True) for _, part in step for sample in part.tolist()]
    assert read == ComputedOrder(size, 5, epoch)[: steps * batch_size].tolist()


def test_every_epoch_of_every_seed_has_its_own_order() -> None:
    computed = {tuple(ComputedOrder(100, seed, epoch)[:].tolist()) for seed in range(10) for epoch in range(10)}
    assert len(computed) == 100
    orders = {tuple(epoch_order(100, seed, epoch).tolist()) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


def test_a_seed_of_more_than_32_bits_is_not_a_smaller_seeds_later_epoch() -> None:
    """SeedSequence([2**32, 0]) and SeedSequence([0, 1]) are the same words."""
    samples = torch.arange(4)
    assert epoch_order(100, 2**32, 0).tolist() != epoch_order(100, 0, 1).tolist()
    assert not torch.equal(sample_uniform(2**32, 0, samples, DRAWS), sample_uniform(0, 1, samples, DRAWS))


def test_consecutive_epochs_drop_different_tails() -> None:
    """Else some images would never be seen; 1437 and 96 are the digits' own numbers."""
    size, batch_size = 1437, 96
    ragged = size % batch_size
    tails = [frozenset(epoch_order(size, 0, epoch)[-ragged:].tolist()) for epoch in range(10)]
    assert {len(tail) for tail in tails} == {ragged}
    assert all(a != b for a, b in pairwise(tails))
    assert not frozenset.intersection(*tails), "an image that ten epochs leave out"


def steps_read(size: int, batch_size: int, seed: int, world_size: int, start: int, stop: int) -> list[Any]:
    """Every step as all ranks together read it: (epoch, global batch)."""
    samplers = [StepSampler(size, batch_size, seed, rank, world_size, start, stop) for rank in range(world_size)]
    steps = []
    for shares in zip(*samplers, strict=True):
        (epoch,) = {epoch for epoch, _ in shares}
        assert {len(samples) for _, samples in shares} == {batch_size // world_size}
        steps.append((epoch, torch.cat([samples for _, samples in shares]).tolist()))
    assert [len(sampler) for sampler in samplers] == [len(steps)] * world_size
    return steps


@few
@given(cuts(), seeds, st.integers(0, 40))
def test_steps_go_through_the_epochs_one_global_batch_after_the_other(
    cut: tuple[int, int, int], seed: int, stop: int
) -> None:
    size, batch_size, world_size = cut
    expected: list[Any] = []
    for epoch in range(stop):
        order = epoch_order(size, seed, epoch).tolist()
        expected += [(epoch, order[i : i + batch_size]) for i in range(0, size - batch_size + 1, batch_size)]
    assert steps_read(size, batch_size, seed, world_size, 0, stop) == expected[:stop]


@few
@given(twice_cuts(), seeds, st.data())
def test_one_integer_resumes_the_order_on_any_number_of_ranks(
    cut: tuple[int, int, int, int], seed: int, choose: st.DataObject
) -> None:
    size, batch_size, before, after = cut
    stop = choose.draw(st.integers(0, min(40, 3 * (size // batch_size))))
    done = choose.draw(st.integers(0, stop))
    whole = steps_read(size, batch_size, seed, before, 0, stop)
    first = steps_read(size, batch_size, seed, before, 0, done)
    assert first + steps_read(size, batch_size, seed, before, done, stop) == whole
    assert first + steps_read(size, batch_size, seed, after, done, stop) == whole


@few
@given(st.integers(1, 500), st.integers(1, 600), st.integers(1, 8))
def test_evaluation_counts_every_sample_once_in_batches_that_ignore_the_ranks(
    size: int, batch_size: int, world_size: int
) -> None:
    found: dict[int, list[int]] = {}
    for rank in range(world_size):
        sampler = EvalSampler(size, batch_size, rank, world_size)
        mine = [(number, samples.tolist()) for number, samples in sampler]
        assert len(mine) == len(sampler)
        assert [number for number, _ in mine] == list(sampler.numbers())
        for number, samples in mine:
            assert number not in found, "two ranks have the same batch"
            found[number] = samples
        assert sampler.batches() == math.ceil(size / batch_size)
    assert flat(found[number] for number in sorted(found)) == list(range(size))
    alone = {number: samples.tolist() for number, samples in EvalSampler(size, batch_size, 0, 1)}
    assert found == alone


# Random numbers of a sample ---------------------------------------------------------------------------------------

sample_lists = st.lists(st.integers(0, 2**40), min_size=1, max_size=20)


@few
@given(sample_lists, seeds, epochs, st.randoms(use_true_random=False))
def test_draws_belong_to_the_sample_not_to_its_batch(
    samples: list[int], seed: int, epoch: int, chance: random.Random
) -> None:
    together = sample_uniform(seed, epoch, torch.tensor(samples), DRAWS)
    assert together.shape == (len(samples), DRAWS)
    assert together.dtype == torch.float64
    assert together.min() >= 0
    assert together.max() < 1
    torch.manual_seed(chance.randrange(1000))
    for sample, draws in zip(samples, together, strict=True):
        assert torch.equal(sample_uniform(seed, epoch, torch.tensor([sample]), DRAWS)[0], draws)
    shuffled = list(range(len(samples)))
    chance.shuffle(shuffled)
    assert torch.equal(sample_uniform(seed, epoch, torch.tensor(samples)[shuffled], DRAWS), together[shuffled])


def test_no_number_comes_twice_over_samples_draws_epochs_and_seeds() -> None:
    """Neither a neighbour's draws shifted by one nor another epoch's: among 2⁵³ values, chance repeats none."""
    samples = torch.arange(2000)
    values = torch.cat(
        [sample_uniform(seed, epoch, samples, DRAWS).flatten() for seed in range(4) for epoch in range(4)]
    )
    assert len(values.unique()) == len(values) == 16 * 2000 * DRAWS


def test_draws_are_even_and_independent_of_each_other() -> None:
    """Bounds are 5 standard deviations and more of what 20,000 numbers would show by chance."""
    samples = torch.arange(20_001)
    draws = sample_uniform(0, 0, samples, DRAWS)
    this, neighbour, next_epoch = draws[:-1], draws[1:], sample_uniform(0, 1, samples, DRAWS)[:-1]
    assert (this.mean(0) - 1 / 2).abs().max() < 0.01
    assert (this.var(0) - 1 / 12).abs().max() < 0.003
    counts = torch.stack([torch.histc(column, 10, 0, 1) for column in this.unbind(1)])
    assert (counts - 2000).abs().max() < 5 * math.sqrt(2000)
    correlation = torch.corrcoef(torch.cat([this, neighbour, next_epoch], dim=1).T)
    assert (correlation - torch.eye(3 * DRAWS)).abs().max() < 0.04


# Augmentation -----------------------------------------------------------------------------------------------------


def noise(count: int, height: int = 8, width: int = 8) -> Tensor:
    """Images without a black pixel, so that a black one is border."""
    return torch.randint(1, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def numbered(count: int, shift: int = 2, flip: bool = True) -> InMemoryImages:
    """Images whose label is their number, so that a batch tells what is in it."""
    return InMemoryImages(noise(count), torch.arange(count), count, shift, flip)


def moved(image: np.ndarray, down: int, right: int, mirrored: bool) -> np.ndarray:
    """What a shift and a mirror are, pixel by pixel: the window moves over the image, black outside."""
    _, height, width = image.shape
    result = np.zeros_like(image)
    for y in range(height):
        for x in range(width):
            from_y, from_x = y + down, (width - 1 - x if mirrored else x) + right
            if 0 <= from_y < height and 0 <= from_x < width:
                result[:, y, x] = image[:, from_y, from_x]
    return result


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 4), st.booleans(), st.integers(0, 99), st.integers(0, 99))
def test_augmentation_is_the_plain_shift_and_mirror_of_each_sample(
    height: int, width: int, shift: int, flip: bool, seed: int, epoch: int
) -> None:
    images = noise(5, height, width)
    samples = torch.tensor([3, 0, 4])
    found = augmented(InMemoryImages(images, torch.arange(5), 5, shift, flip), seed)[epoch, samples]
    assert found.inputs.is_contiguous()
    assert found.targets.tolist() == samples.tolist()
    for i, draws in enumerate(sample_uniform(seed, epoch, samples, DRAWS).tolist()):
        down, right = (int(draw * (2 * shift + 1)) - shift for draw in draws[2:4])
        expected = moved(images[samples[i]].numpy(), down, right, flip and draws[4] < 0.5)
        assert (found.inputs[i].numpy() == expected).all()


@pytest.mark.parametrize("flip", [False, True])
def test_every_shift_up_to_the_limit_comes_equally_often_and_mirrors_only_where_asked(flip: bool) -> None:
    """Found by trying all moves, larger ones too: knows nothing of how draws become moves."""
    count, shift = 900, 1
    images = noise(6)
    tries = {
        moved(images[i].numpy(), down, right, mirrored).tobytes(): (i, down, right, mirrored)
        for i in range(6)
        for down in range(-3, 4)
        for right in range(-3, 4)
        for mirrored in (False, True)
    }
    pictures = InMemoryImages(images.repeat(count // 6, 1, 1, 1), torch.arange(count), count, shift, flip)
    found = augmented(pictures, 0)[0, torch.arange(count)]
    moves: Counter[tuple[Any, ...]] = Counter()
    for sample, image in enumerate(found.inputs):
        i, *move = tries[image.numpy().tobytes()]
        assert i == sample % 6
        moves[tuple(move)] += 1
    ways = [(d, r, m) for d in (-1, 0, 1) for r in (-1, 0, 1) for m in ([False, True] if flip else [False])]
    assert set(moves) == set(ways)
    assert min(moves.values()) > count / len(ways) / 2


def by_sample(
    images: ImageDataset, world_size: int, batch_size: int, workers: int, augment: bool = True
) -> dict[tuple[int, int], Tensor]:
    """{(epoch, sample): image} as all ranks' loaders bring them in two epochs; labels must be sample numbers."""
    steps = 2 * (len(images) // batch_size)
    found: dict[tuple[int, int], Tensor] = {}
    for rank in range(world_size):
        sampler = StepSampler(len(images), batch_size, 0, rank, world_size, 0, steps)
        loader = build_loader((augmented if augment else Samples)(images, 0), sampler, workers, pin_memory=False)
        for (epoch, samples), batch in zip(sampler, loader, strict=True):
            assert batch.targets.tolist() == samples.tolist(), "workers brought batches out of order"
            found |= {(epoch, sample): batch.inputs[i] for i, sample in enumerate(samples.tolist())}
    return found


@pytest.mark.parametrize(
    ("world_size", "batch_size", "workers"), [(1, 12, 0), (1, 24, 2), (2, 12, 0), (3, 24, 2), (4, 48, 0)]
)
def test_a_sample_augments_the_same_in_any_batch_rank_and_worker(
    world_size: int, batch_size: int, workers: int
) -> None:
    images = numbered(48)
    found = by_sample(images, world_size, batch_size, workers)
    assert set(found) == {(epoch, sample) for epoch in range(2) for sample in range(48)}
    for (epoch, sample), image in found.items():
        alone = augmented(images, 0)[epoch, torch.tensor([sample])].inputs[0]
        assert torch.equal(image, alone)
    assert any(not torch.equal(found[0, sample], found[1, sample]) for sample in range(48)), "epochs augment alike"


def test_without_augmentation_the_images_come_as_they_are() -> None:
    images = numbered(24)
    for (_, sample), image in by_sample(images, 1, 8, 0, augment=False).items():
        assert torch.equal(image, images.images[sample])


def test_augmenting_leaves_the_data_set_alone() -> None:
    images = numbered(24)
    by_sample(images, 1, 8, 0)
    assert torch.equal(images.images, noise(24))


# Digits and synthetic ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bytes_become_what_the_formula_says_and_the_same_bits_in_any_batch(
    dtype: torch.dtype, layout: torch.memory_format
) -> None:
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    images = torch.arange(256, dtype=torch.uint8).repeat(21)[: 7 * 3 * 15 * 17].view(7, 3, 15, 17)
    images = images.contiguous(memory_format=layout)
    normalise = transforms.Normalise(mean, std)
    found = normalise(images, dtype)
    assert found.is_contiguous(memory_format=layout)
    expected = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(found, expected.to(dtype), rtol=0, atol=1e-6)
    parts = torch.cat([normalise(part, dtype) for part in (images[:1], images[1:4], images[4:])])
    assert torch.equal(parts, found)
    other = normalise(images[:, :, :9, :9], dtype)  # another size than before
    torch.testing.assert_close(other, found[:, :, :9, :9], rtol=0, atol=0)


def augmented(images: ImageDataset, seed: int) -> Samples:
    images.draws = DRAWS
    return Samples(images, seed)


def everything(images: ImageDataset) -> Batch:
    """All of a set, as evaluation reads it."""
    return Batch(*images.fetch(torch.arange(len(images)), None), len(images))


def scans(batch: Batch) -> Counter[tuple[bytes, int]]:
    return Counter(
        (image.numpy().tobytes(), label.item()) for image, label in zip(batch.inputs, batch.targets, strict=True)
    )


def test_digits_are_split_into_1437_and_360_without_overlap() -> None:
    sets = load_data(DataConfig(), 8, 0)
    train, test = (everything(images) for images in sets)
    assert [len(images) for images in sets] == [1437, 360]
    assert [images.classes for images in sets] == [10, 10]
    assert image_files.check_data(DataConfig()) == (10, 1437)
    bunch = load_digits()
    grey = [np.array([[round(v * 255 / 16) for v in row] for row in image], np.uint8) for image in bunch.images]
    published = Counter((np.stack([g] * 3).tobytes(), int(t)) for g, t in zip(grey, bunch.target, strict=True))
    assert scans(train) + scans(test) == published, "not every scan is in exactly one of the two sets"


def test_digits_are_three_equal_channels_of_bytes_with_all_labels() -> None:
    for images in load_data(DataConfig(), 8, 0):
        batch = everything(images)
        assert batch.inputs.dtype == torch.uint8
        assert batch.inputs.shape == (len(images), 3, 8, 8)
        assert torch.equal(batch.inputs, batch.inputs[:, :1].expand(-1, 3, -1, -1))
        assert batch.inputs.min() == 0
        assert batch.inputs.max() == 255
        assert batch.targets.dtype == torch.int64
        assert set(batch.targets.tolist()) == set(range(10))


def test_digits_have_the_same_split_for_every_seed() -> None:
    torch.manual_seed(1)
    first = load_data(DataConfig(), 8, 0)
    torch.manual_seed(2)
    second = load_data(DataConfig(), 8, 12345)
    for a, b in zip(map(everything, first), map(everything, second), strict=True):
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.targets, b.targets)


def test_synthetic_images_are_the_same_for_a_seed_and_as_many_and_large_as_asked() -> None:
    config = DataConfig(name="synthetic", size=21, image_size=5, num_classes=3)
    sets = [[everything(images) for images in load_data(config, 5, seed)] for seed in (0, 0, 1)]
    for train, test in sets:
        assert (train.inputs.shape, test.inputs.shape) == ((21, 3, 5, 5), (5, 3, 5, 5))
        assert set(train.targets.tolist()) == {0, 1, 2}
    assert image_files.check_data(config) == (3, 21)
    assert torch.equal(sets[0][0].inputs, sets[1][0].inputs)
    assert torch.equal(sets[0][1].targets, sets[1][1].targets)
    assert not torch.equal(sets[0][0].inputs, sets[2][0].inputs)


# CIFAR-10 ---------------------------------------------------------------------------------------------------------

CIFAR_NAMES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def cifar_records() -> dict[str, tuple[np.ndarray, list[int]]]:
    """{batch: (images [N, 3072], labels)}, every batch of another length."""
    chance = np.random.default_rng(0)
    return {
        name: (chance.integers(0, 256, (2 + i, 3072), dtype=np.uint8), chance.integers(0, 10, 2 + i).tolist())
        for i, name in enumerate(CIFAR_NAMES)
    }


def cifar_size() -> int:
    """Training images in `cifar_records`: all but the test batch's."""
    return sum(len(labels) for name, (_, labels) in cifar_records().items() if name != "test_batch")


def cifar_binaries(root: Path) -> Path:
    """`cifar-10-batches-bin/` as published: one byte of label, 3072 of image, and so on."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name, (images, labels) in cifar_records().items():
        records = [bytes([label]) + image.tobytes() for image, label in zip(images, labels, strict=True)]
        (folder / f"{name}.bin").write_bytes(b"".join(records))
    (folder / "batches.meta.txt").write_text("airplane\n")
    return folder


def cifar_pickles(root: Path, dump: Callable[[dict[bytes, Any]], bytes]) -> Path:
    """`cifar-10-batches-py/` as published."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in CIFAR_NAMES:
        (folder / name).write_bytes(dump(cifar_batch(name)))
    return folder


def cifar_batch(name: str, **replaced: Any) -> dict[bytes, Any]:
    images, labels = cifar_records()[name]
    content = {"batch_label": name.encode(), "labels": labels, "data": images}
    content |= {"filenames": [f"{name}_{i}.png".encode() for i in range(len(labels))]} | replaced
    return {key.encode(): value for key, value in content.items()}


def python3_pickle(content: dict[bytes, Any]) -> bytes:
    return pickle.dumps(content, protocol=2)


def python2_pickle(content: dict[bytes, Any]) -> bytes:
    """The published files, opcode by opcode: Python 2's pickles, with `str` as bytes and NumPy under its old name."""

    def text(word: bytes) -> bytes:
        return b"U" + bytes([len(word)]) + word  # SHORT_BINSTRING, which Python 3 no longer writes

    def number(value: int) -> bytes:
        return b"M" + struct.pack("<H", value)

    images = content[b"data"]
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\0K\1\x87R(K\3" + text(b"|") + b"NNNJ" + b"\xff" * 4
    dtype += b"J" + b"\xff" * 4 + b"K\0tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85" + text(b"b") + b"\x87R"
    array += b"(K\1" + number(images.shape[0]) + number(images.shape[1]) + b"\x86" + dtype + b"\x89"
    array += b"T" + struct.pack("<I", images.size) + images.tobytes() + b"tb"
    labels = b"](" + b"".join(b"K" + bytes([label]) for label in content[b"labels"]) + b"e"
    names = b"](" + b"".join(map(text, content[b"filenames"])) + b"e"
    items = text(b"batch_label") + text(content[b"batch_label"]) + text(b"labels") + labels
    items += text(b"data") + array + text(b"filenames") + names
    return b"\x80\2}(" + items + b"u."


def cifar(root: Path, download: bool = False) -> DataConfig:
    return DataConfig(name="cifar10", root=str(root), download=download, image_size=32)


def complaint(config: DataConfig, load: bool = True) -> str:
    """What the user is told about this data, before a run and also when a rank loads it."""
    with pytest.raises(UserError) as caught:
        image_files.check_data(config)
    told = str(caught.value)
    assert told
    assert "\n" not in told
    if load:
        with pytest.raises(UserError) as caught:
            load_data(config, 32, 0)
        assert str(caught.value) == told
    return told


@pytest.mark.parametrize("form", ["binary", "python 2", "python 3"])
def test_cifar10_reads_the_same_images_from_each_of_its_published_forms(form: str, tmp_path: Path) -> None:
    if form == "binary":
        cifar_binaries(tmp_path)
    else:
        cifar_pickles(tmp_path, python2_pickle if form == "python 2" else python3_pickle)
    assert image_files.check_data(cifar(tmp_path)) == (10, cifar_size())
    records = cifar_records()
    for images, names in zip(load_data(cifar(tmp_path), 32, 0), (CIFAR_NAMES[:5], CIFAR_NAMES[5:]), strict=True):
        batch = everything(images)
        planes = np.concatenate([records[name][0] for name in names])
        assert images.classes == 10
        assert batch.inputs.dtype == torch.uint8
        assert batch.inputs.shape == (len(planes), 3, 32, 32)
        assert batch.targets.dtype == torch.int64
        assert batch.targets.tolist() == flat(records[name][1] for name in names)
        # The page says: 1024 red, then green, then blue, row by row.
        for c, y, x in [(0, 0, 0), (0, 0, 31), (0, 1, 0), (1, 0, 0), (2, 17, 5), (2, 31, 31)]:
            assert batch.inputs[:, c, y, x].tolist() == planes[:, c * 1024 + y * 32 + x].tolist()
        assert batch.inputs.flatten(1).tolist() == planes.tolist()


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3 - 1])


def holding(content: bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(content)


def label_10(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[3073] = 10  # the second record's
    file.write_bytes(content)


def an_int8_batch(file: Path) -> None:
    file.write_bytes(python3_pickle(cifar_batch(file.name, data=cifar_batch(file.name)[b"data"].astype(np.int8))))


def a_label_short(file: Path) -> None:
    file.write_bytes(python3_pickle(cifar_batch(file.name, labels=cifar_batch(file.name)[b"labels"][1:])))


def cifar100(file: Path) -> None:
    content = cifar_batch(file.name)
    content[b"fine_labels"] = content.pop(b"labels")
    file.write_bytes(python3_pickle(content))


@pytest.mark.parametrize("name", CIFAR_NAMES)
@pytest.mark.parametrize(
    "spoil",
    [
        cut_short,
        label_10,
        Path.unlink,
        pytest.param(holding(b""), id="empty"),
        pytest.param(holding(b"x"), id="a byte"),
    ],
)
def test_a_spoilt_cifar_binary_is_named(spoil: Callable[[Path], object], name: str, tmp_path: Path) -> None:
    file = cifar_binaries(tmp_path) / f"{name}.bin"
    spoil(file)
    assert str(file) in complaint(cifar(tmp_path))


@pytest.mark.parametrize("name", ["data_batch_1", "test_batch"])
@pytest.mark.parametrize(
    "spoil",
    [
        cut_short,
        Path.unlink,
        an_int8_batch,
        a_label_short,
        cifar100,
        pytest.param(holding(b""), id="empty"),
        pytest.param(holding(b"<html>404</html>"), id="a web page"),
        pytest.param(holding(pickle.dumps([1, 2, 3])), id="a list"),
        pytest.param(holding(pickle.dumps({b"data": 1, b"labels": 2})), id="numbers"),
        pytest.param(holding(pickle.dumps(Path("elsewhere"))), id="a Path"),
    ],
)
def test_a_spoilt_cifar_pickle_is_named(spoil: Callable[[Path], object], name: str, tmp_path: Path) -> None:
    file = cifar_pickles(tmp_path, python3_pickle) / name
    spoil(file)
    assert str(file) in complaint(cifar(tmp_path))


@pytest.mark.parametrize("labels", [1, [0.5, 1], ["cat", "dog"], [[1], [2]], [1, [2]], None], ids=str)
def test_cifar_labels_that_are_no_list_of_whole_numbers_are_refused(labels: Any, tmp_path: Path) -> None:
    file = cifar_pickles(tmp_path, python3_pickle) / "data_batch_1"  # 2 images
    file.write_bytes(python3_pickle(cifar_batch(file.name, labels=labels)))
    assert str(file) in complaint(cifar(tmp_path))


def test_a_cifar_label_is_refused_by_its_own_value(tmp_path: Path) -> None:
    file = cifar_pickles(tmp_path, python3_pickle) / "data_batch_1"
    for wrong in (-1, 10, 99):
        file.write_bytes(python3_pickle(cifar_batch(file.name, labels=[9, wrong])))
        assert f"label {wrong} " in complaint(cifar(tmp_path))


def test_a_cifar_pickle_without_images_is_refused(tmp_path: Path) -> None:
    file = cifar_pickles(tmp_path, python3_pickle) / "test_batch"
    empty = cifar_batch(file.name, labels=[], data=np.zeros((0, 3072), np.uint8), filenames=[])
    file.write_bytes(python2_pickle(empty))
    assert str(file) in complaint(cifar(tmp_path))


@pytest.mark.parametrize("dump", [python2_pickle, python3_pickle])
def test_a_cifar_pickle_cut_anywhere_is_refused(dump: Callable[[dict[bytes, Any]], bytes], tmp_path: Path) -> None:
    whole = dump(cifar_batch("data_batch_1"))
    file = tmp_path / "data_batch_1"
    file.write_bytes(whole)
    image_files.read_cifar_pickle(file)
    for length in [*range(300), *range(300, len(whole) - 300, 97), *range(len(whole) - 300, len(whole))]:
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match="data_batch_1"):
            image_files.read_cifar_pickle(file)


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside a good batch"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(protocol: int, inside: bool, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    file = cifar_pickles(tmp_path, python3_pickle) / "data_batch_2"
    bomb = Bomb(mark)
    armed = pickle.dumps(cifar_batch(file.name, filenames=[bomb]) if inside else bomb, protocol)
    file.write_bytes(armed)
    told = complaint(cifar(tmp_path))
    assert not mark.exists()
    assert str(file) in told
    pickle.loads(armed)
    assert mark.exists(), "the bomb was a dud, so the test has shown nothing"


def test_a_root_without_cifar_is_named(tmp_path: Path) -> None:
    told = complaint(cifar(tmp_path))
    assert f"data.root={tmp_path}" in told
    assert "data.download=true" in told


@pytest.mark.parametrize("name", ["cifar10", "imagefolder"])
def test_a_missing_root_is_named(name: str, tmp_path: Path) -> None:
    assert f"data.root={tmp_path}/gone" in complaint(DataConfig(name=name, root=f"{tmp_path}/gone", image_size=32))
    assert "data.root" in complaint(DataConfig(name=name, image_size=32))


# Some classes of a set ------------------------------------------------------------------------------------------


def test_some_classes_keep_their_images_and_are_relabelled_in_the_order_asked_for() -> None:
    chosen = [7, 0, 3]
    config = DataConfig(classes=[str(label) for label in chosen])
    for part, whole in zip(load_data(config, 8, 0), datasets.digits(), strict=True):
        all_of_it = everything(whole)
        keep = [i for i, label in enumerate(all_of_it.targets.tolist()) if label in chosen]
        mine = everything(part)
        assert torch.equal(mine.inputs, all_of_it.inputs[keep])
        assert mine.targets.tolist() == [chosen.index(all_of_it.targets[i].item()) for i in keep]
        assert torch.equal(part.labels, mine.targets)
        assert (part.classes, len(part)) == (3, len(keep))
    assert image_files.check_data(config) == (3, len(load_data(config, 8, 0)[0]))


def test_some_classes_of_cifar10_and_of_an_image_folder(tmp_path: Path, folder: Path) -> None:
    cifar_binaries(tmp_path / "root")
    of_cifar = DataConfig(name="cifar10", root=str(tmp_path / "root"), image_size=32, classes=["1", "9"])
    labels = [label for name in CIFAR_NAMES[:5] for label in cifar_records()[name][1] if label in (1, 9)]
    assert image_files.check_data(of_cifar) == (2, len(labels))
    train, _ = load_data(of_cifar, 32, 0)
    assert everything(train).targets.tolist() == [(1, 9).index(label) for label in labels]
    folders = DataConfig(name="imagefolder", root=str(folder), classes=["dog", "cat"])
    assert image_files.check_data(folders) == (2, 10)
    train, _ = load_data(folders, 32, 0)
    assert everything(train).targets.tolist() == [1] * 5 + [0] * 5


@pytest.mark.parametrize(
    ("classes", "name", "said"),
    [
        (["3", "11"], "digits", "data.classes=[3,11]: digits has no class 11; allowed are 0, 1, 2"),
        (["3"], "digits", "data.classes=[3]: allowed are two or more"),
        ([], "digits", "two or more classes, each named once"),
        (["3", "4", "3"], "digits", "each named once"),
        (["3", "4"], "synthetic", "labels at random; set data.num_classes=2 instead"),
        (["cat", "fox"], "imagefolder", "imagefolder has no class fox; allowed are cat, dog"),
    ],
)
def test_classes_that_are_not_there_are_refused(classes: list[str], name: str, said: str, folder: Path) -> None:
    with pytest.raises(UserError) as refused:
        image_files.check_data(DataConfig(name=name, classes=classes, root=str(folder)))
    assert said in str(refused.value)


# Download ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A small archive where torchvision believes the published one is."""
    cifar_pickles(tmp_path / "published", python2_pickle)
    with tarfile.open(tmp_path / "archive.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "published" / "cifar-10-batches-py", "cifar-10-batches-py")
    with serving((tmp_path / "archive.tar.gz").read_bytes()) as site:
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{site.server_port}/cifar.tar.gz")
        monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(site.archive or b"").hexdigest())
        monkeypatch.setenv("no_proxy", "*")
        yield site


def test_cifar10_is_downloaded_where_asked_and_only_once(site: Site, tmp_path: Path) -> None:
    root = tmp_path / "not" / "there yet"
    assert image_files.check_data(cifar(root, download=True)) == (10, cifar_size())
    assert site.asked
    site.asked.clear()
    assert image_files.check_data(cifar(root, download=True)) == (10, cifar_size())
    train, test = load_data(cifar(root, download=True), 32, 0)
    assert not site.asked
    records = cifar_records()
    assert everything(train).targets.tolist() == flat(records[name][1] for name in CIFAR_NAMES[:5])
    assert everything(test).inputs.flatten(1).tolist() == records["test_batch"][0].tolist()


def test_nothing_is_downloaded_unless_asked(site: Site, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    complaint(cifar(root))
    assert not site.asked
    assert not list(root.iterdir())


def test_nothing_is_downloaded_where_the_binaries_are(site: Site, tmp_path: Path) -> None:
    cifar_binaries(tmp_path / "root")
    assert image_files.check_data(cifar(tmp_path / "root", download=True)) == (10, cifar_size())
    assert not site.asked


def test_a_download_that_fails_names_the_address_and_can_be_repeated(site: Site, tmp_path: Path) -> None:
    good = site.archive
    assert good is not None
    for bad in (good[:-1], b"<html>Please log in</html>", None):
        site.archive = bad
        told = complaint(cifar(tmp_path / "root", download=True), load=False)
        assert CIFAR10.url in told
        assert "data.download" in told
    site.archive = good
    assert image_files.check_data(cifar(tmp_path / "root", download=True)) == (10, cifar_size())


def test_a_download_from_an_unreachable_address_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # taken, and not listening
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{nobody.getsockname()[1]}/cifar.tar.gz")
        monkeypatch.setenv("no_proxy", "*")
        assert CIFAR10.url in complaint(cifar(tmp_path, download=True), load=False)


# Image folders ----------------------------------------------------------------------------------------------------

SIZES = [(40, 40), (61, 33), (24, 90), (128, 100), (33, 32)]  # width × height


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Smooth colours, so that JPEG keeps them, and another picture for every seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes: JPEG and PNG, many sizes, a grey one, and a PNG called .JPEG as ImageNet has one."""
    seed = 0
    for part, count in (("train", 5), ("val", 3)):
        for name in ("dog", "cat"):
            where = tmp_path / "images" / part / name
            where.mkdir(parents=True)
            for i, size in enumerate(SIZES[:count]):
                seed += 1
                image = picture(*size, seed)
                if i == 0:
                    image.convert("L").save(where / "0.jpg")
                elif i == 1:
                    image.save(where / "1.JPEG", format="PNG")
                elif i == 2:
                    image.save(where / "2.png")
                else:
                    image.save(where / f"{i}.jpeg")
            (where / "notes.txt").write_text("no image")
    return tmp_path / "images"


def imagefolder(root: Path, check_files: int = 10_000) -> DataConfig:
    return DataConfig(name="imagefolder", root=str(root), check_files=check_files)


def test_an_image_folder_has_its_images_labelled_by_sorted_class(folder: Path) -> None:
    assert image_files.check_data(imagefolder(folder)) == (2, 10)
    train, test = load_data(imagefolder(folder), 32, 0)
    assert (len(train), len(test)) == (10, 6)
    assert (train.classes, test.classes) == (2, 2)
    assert everything(train).targets.tolist() == [0] * 5 + [1] * 5
    assert everything(test).targets.tolist() == [0] * 3 + [1] * 3
    assert isinstance(test, ImageFiles)
    assert [os.path.relpath(path, folder / "val") for path in test.paths] == [
        f"{name}/{file}" for name in ("cat", "dog") for file in ("0.jpg", "1.JPEG", "2.png")
    ]


@pytest.mark.parametrize("size", [8, 32, 50])
def test_images_of_any_size_and_kind_become_equal_squares_of_bytes(size: int, folder: Path) -> None:
    train, test = load_data(imagefolder(folder), size, 0)
    cropped = augmented(train, 0)[0, torch.arange(10)]
    for batch, count in ((cropped, 10), (everything(test), 6)):
        assert batch.inputs.dtype == torch.uint8
        assert batch.inputs.shape == (count, 3, size, size)
        assert batch.targets.dtype == torch.int64
        for i, image in enumerate(batch.inputs):
            grey = torch.equal(image[0], image[1]) and torch.equal(image[1], image[2])
            assert grey == (i % (count // 2) == 0), "the first of each class is the grey one"


def test_evaluation_reads_the_same_pixels_every_time(folder: Path) -> None:
    first, second = (load_data(imagefolder(folder), 32, seed)[1] for seed in (0, 1))
    torch.manual_seed(1)
    once = everything(first).inputs
    torch.manual_seed(2)
    assert torch.equal(everything(second).inputs, once)
    one_by_one = [second.fetch(torch.tensor([i]), None)[0][0] for i in reversed(range(6))]
    assert torch.equal(torch.stack(one_by_one[::-1]), once)


def test_evaluation_looks_at_the_centre_224_of_256(tmp_path: Path) -> None:
    """Black but for the square that must be seen: all of it and nothing else, so every pixel is white."""
    for width, height in ((256, 400), (400, 256), (64, 64)):
        side = min(width, height) * 7 // 8
        left, top = (width - side) // 2, (height - side) // 2
        seen = np.zeros((height, width, 3), np.uint8)
        seen[top : top + side, left : left + side] = 255
        for name, pixels in (("seen", seen), ("unseen", 255 - seen)):
            path = tmp_path / f"{width}x{height}" / name / "image.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(pixels).save(path)
        images = everything(ImageFiles(tmp_path / f"{width}x{height}", 32)).inputs
        assert images[0].eq(255).all()
        assert images[1].eq(0).all()


def test_images_are_what_torchvision_makes_of_them_pixel_by_pixel(folder: Path) -> None:
    train, test = load_data(imagefolder(folder), 32, 0)
    draws = sample_uniform(0, 0, torch.arange(10), DRAWS)
    draws[:5, 0] = 1  # as large as can be: crops that are cut off by the border, or are the whole image
    for images, drawn in ((train, draws), (test, None)):
        assert isinstance(images, ImageFiles)
        batch = images.fetch(torch.arange(len(images)), drawn)[0]
        assert batch.is_contiguous(memory_format=torch.channels_last)
        for i, path in enumerate(images.paths):
            image = transforms.decode(path)
            _, height, width = image.shape
            box = (
                transforms.center_crop(height, width)
                if drawn is None
                else transforms.random_crop(height, width, drawn[i].tolist())
            )
            expected = functional.resized_crop(image.contiguous(), *box, [32, 32], antialias=True)
            mirrored = drawn is not None and drawn[i, 4] < 0.5
            assert torch.equal(batch[i], expected.flip(2) if mirrored else expected)


def test_training_crops_are_inceptions() -> None:
    width, height = 128, 100
    boxes = [
        transforms.random_crop(height, width, draw.tolist()) for draw in sample_uniform(0, 0, torch.arange(400), DRAWS)
    ]
    areas, aspects = [], []
    for top, left, h, w in boxes:
        assert 0 <= top <= height - h
        assert 0 <= left <= width - w
        areas.append(h * w / (height * width))
        if h < height and w < width:  # not cut off by the border
            aspects.append(w / h)
    assert 0.07 < min(areas) < 0.12, "8 % of the area, but for rounding to pixels"
    assert 0.8 < max(areas) <= 1
    assert 0.7 < min(aspects) < 0.8
    assert 1.25 < max(aspects) < 1.4
    assert {top == 0 for top, *_ in boxes} == {True, False}
    assert max(left + w for _, left, _, w in boxes) == width


def test_training_mirrors_half_of_the_images(folder: Path) -> None:
    images = ImageFiles(folder / "train", 16)
    draws = sample_uniform(0, 0, torch.arange(200), DRAWS)
    mirrored = 0
    for draw in draws.split(1):
        plain = draw.clone()
        plain[:, 4] = 0.9
        found, unmirrored = (images.fetch(torch.tensor([3]), d)[0][0] for d in (draw, plain))
        assert torch.equal(found, unmirrored) or torch.equal(found, unmirrored.flip(2))
        mirrored += not torch.equal(found, unmirrored)
    assert 70 < mirrored < 130


class Numbered:
    """An image folder whose labels are sample numbers; at module level, so that a worker may be given it."""

    def __init__(self, images: ImageFiles) -> None:
        self.images, self.classes = images, len(images)

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, samples: Tensor, draws: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.images.fetch(samples, draws)[0], samples


def test_training_crops_are_the_same_with_and_without_workers_and_on_any_rank(folder: Path) -> None:
    images = Numbered(ImageFiles(folder / "train", 16))
    reference = by_sample(images, world_size=1, batch_size=2, workers=0)
    assert len(reference) == 20
    assert any(not torch.equal(reference[0, sample], reference[1, sample]) for sample in range(10))
    for world_size, batch_size, workers in ((1, 5, 2), (2, 10, 2), (5, 5, 0)):
        found = by_sample(images, world_size, batch_size, workers)
        assert set(found) == set(reference)
        assert all(torch.equal(found[key], reference[key]) for key in reference)


def test_a_16_bit_png_becomes_bytes_like_any_other_image(folder: Path) -> None:
    where = folder / "val" / "cat" / "3.png"
    Image.fromarray(np.full((40, 40), 128 * 257, np.uint16)).save(where)
    images, _ = load_data(imagefolder(folder), 16, 0)[1].fetch(torch.tensor([3, 0]), None)
    assert images.dtype == torch.uint8
    assert images[0].eq(128).all()


def test_an_animated_gif_is_one_image_or_is_named(folder: Path) -> None:
    where = folder / "val" / "cat" / "0.gif"
    frames = [picture(40, 40, seed) for seed in range(3)]
    frames[0].save(where, save_all=True, append_images=frames[1:])
    images = load_data(imagefolder(folder), 16, 0)[1]
    try:
        outcome = str(tuple(images.fetch(torch.tensor([0]), None)[0].shape))
    except UserError as error:
        outcome = str(error)
    assert outcome == "(1, 3, 16, 16)" or outcome.startswith(f"{where}: ")


def a_class_more(root: Path) -> Path:
    shutil.copytree(root / "val" / "cat", root / "val" / "emu")
    return root


def another_class(root: Path) -> Path:
    """As many classes, but in val/ label 1 is another animal."""
    (root / "val" / "dog").rename(root / "val" / "emu")
    return root


def no_classes(root: Path) -> Path:
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    shutil.copy(root / "val" / "cat" / "0.jpg", root / "train" / "0.jpg")  # a file, not a class
    return root / "train"


def no_images(root: Path) -> Path:
    for file in (root / "val" / "dog").glob("*.*[gG]"):
        file.unlink()
    return root / "val" / "dog"


def no_val(root: Path) -> Path:
    shutil.rmtree(root / "val")
    return root / "val"


def truncated(name: str) -> Callable[[Path], Path]:
    def spoil(root: Path) -> Path:
        cut_short(root / name)
        return root / name

    return spoil


def replaced(name: str, content: bytes) -> Callable[[Path], Path]:
    def spoil(root: Path) -> Path:
        (root / name).write_bytes(content)
        return root / name

    return spoil


def a_dead_link(root: Path) -> Path:
    """Image folders are often farms of links."""
    (root / "train" / "dog" / "0.jpg").unlink()
    (root / "train" / "dog" / "0.jpg").symlink_to(root / "unmounted" / "0.jpg")
    return root / "train" / "dog" / "0.jpg"


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(truncated("train/cat/3.jpeg"), id="truncated JPEG"),
        pytest.param(truncated("train/cat/1.JPEG"), id="truncated PNG called .JPEG"),
        pytest.param(truncated("val/dog/2.png"), id="truncated PNG"),
        pytest.param(replaced("train/cat/0.jpg", b"garbage" * 99), id="garbage"),
        pytest.param(replaced("val/cat/2.png", b"<html>404</html>"), id="garbage in PNG"),
        pytest.param(replaced("val/cat/0.jpg", b""), id="empty file"),
        pytest.param(a_dead_link, id="dead link"),
    ],
)
def test_a_spoilt_image_is_named_before_the_run(spoil: Callable[[Path], Path], folder: Path) -> None:
    image_files.check_data(imagefolder(folder))
    path = spoil(folder)
    assert str(path) in complaint(imagefolder(folder), load=False)
    assert image_files.check_data(imagefolder(folder, check_files=0)) == (2, 10), "no file was to be looked at"


def test_only_as_many_files_are_looked_at_as_asked(folder: Path) -> None:
    path = truncated("train/dog/2.png")(folder)  # the 8th in sorted order
    image_files.check_data(imagefolder(folder, check_files=7))
    assert str(path) in complaint(imagefolder(folder, check_files=8), load=False)


@pytest.mark.parametrize("spoil", [no_images, no_classes, no_val])
def test_a_folder_that_lacks_something_is_named(spoil: Callable[[Path], Path], folder: Path) -> None:
    path = spoil(folder)
    assert complaint(imagefolder(folder)).startswith(f"{path}:")


@pytest.mark.parametrize("spoil", [a_class_more, another_class])
def test_train_and_val_with_different_classes_are_refused(spoil: Callable[[Path], Path], folder: Path) -> None:
    path = spoil(folder)
    assert str(path) in complaint(imagefolder(folder), load=False)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "content",
    [b"\xff\xd8\xff\xe0" + b"garbage" * 99 + b"\xff\xd9", b"\x89PNG\r\n\x1a\n" + b"garbage" * 99 + b"IEND\xaeB`\x82"],
    ids=["JPEG", "PNG"],
)
def test_an_image_that_does_not_decode_is_named_in_one_line(content: bytes, workers: int, folder: Path) -> None:
    path = replaced("val/cat/0.jpg", content)(folder)
    image_files.check_data(imagefolder(folder))  # its first and last bytes are right
    images = load_data(imagefolder(folder), 16, 0)[1]
    batches = build_loader(Samples(images, 0), EvalSampler(6, 2, 0, 1), workers, pin_memory=False)
    with pytest.raises(UserError) as caught:
        next(iter(batches))
    told = str(caught.value)
    # A worker's error holds the loader in a cycle, and one that the cycle collector frees waits 5 s for its worker.
    caught.value.__traceback__ = None
    del caught
    assert told.startswith(f"{path}: ")
    assert len(told.splitlines()) == 1
    assert "Traceback" not in told
    assert "data.root" in told


def animation(path: Path, size: int = 20) -> None:
    frames = [picture(size, size, seed) for seed in (1, 2)]
    frames[0].save(path, format="WEBP", save_all=True, append_images=frames[1:], lossless=True)


def test_an_image_folder_has_the_files_of_torchvision_s(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Links, all its formats whatever their names, bytes after the end, names that are not UTF-8; pixels are Pillow's."""
    cat, dog = folder / "train" / "cat", folder / "train" / "dog"
    elsewhere = folder.parent / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    picture(30, 20, 50).save(elsewhere / "deep" / "linked.png")
    (dog / "more").symlink_to(elsewhere)
    for part in ("train", "val"):
        (folder / part / "fox").symlink_to(folder / part / "cat")
    for suffix, kind in ((".bmp", "BMP"), (".ppm", "PPM"), (".pgm", "PPM"), (".tif", "TIFF"), (".TIFF", "TIFF")):
        picture(24, 16, 60).save(cat / f"format{suffix}", format=kind)
    picture(24, 24, 61).save(cat / "jpeg.png", format="JPEG")
    picture(24, 24, 62).save(cat / "webp.jpg", format="WEBP")
    picture(24, 24, 63).convert("P").save(cat / "gif.jpg", format="GIF")
    picture(24, 24, 64).save(cat / "motion.jpg")
    with (cat / "motion.jpg").open("ab") as stream:
        stream.write(b"\0ftypmp42" * 2000)
    animation(cat / "animated.webp")
    Path(os.fsdecode(bytes(cat) + b"/caf\xe9.png")).write_bytes((cat / "2.png").read_bytes())
    assert image_files.check_data(imagefolder(folder))[0] == 3
    train, _ = load_data(imagefolder(folder), 32, 0)
    theirs = ImageFolder(folder / "train")
    assert isinstance(train, ImageFiles)
    assert list(zip(train.paths, train.labels.tolist(), strict=True)) == [(str(path), y) for path, y in theirs.samples]
    assert train.names == theirs.classes
    assert train.checksum()
    for (image, _), path in zip(theirs, train.paths, strict=True):
        exact = format_of(path) != "JPEG"  # whose decoders round differently
        mine = transforms.decode(path).permute(1, 2, 0).numpy().astype(int)
        assert mine.shape == (image.height, image.width, 3)
        assert abs(mine - np.asarray(image).astype(int)).max() <= (0 if exact else 12), path
    train.draws = 0
    assert train.fetch(torch.arange(len(train)), None)[0].shape == (len(theirs), 3, 32, 32)
    assert "left out: 3 files of other types than images (3 .txt)" in capfd.readouterr().err


def format_of(path: str) -> str | None:
    with Image.open(path) as image:
        return image.format


def test_many_images_are_listed_once_and_again_when_a_folder_has_changed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(image_folder, "KEPT_FROM", 3)
    (folder / "train" / "cat" / "deep").mkdir()
    (folder / "train" / "cat" / "deep" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"")
    scanned: list[str] = []
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (scanned.append(str(path)), scan(path))[1])

    def listed() -> tuple[image_folder.Listing, int]:
        scanned.clear()
        return image_folder.list_image_folder(folder / "train"), len(scanned)

    assert listed()[1] == listed()[1] == 4, "a folder that is still being filled is listed each time"
    for place in (folder / "train", *(folder / "train").glob("**/")):
        os.utime(place, (1e9, 1e9))
    first, scans = listed()
    assert scans == 4, "the process that checks the data"
    assert [listed() for _ in range(3)] == [(first, 0)] * 3, "and its ranks"
    assert len(first.paths) == 11
    assert "2 files of other types than images (2 .txt)" in first.left_out
    (folder / "train" / "cat" / "deep" / "new.png").write_bytes(b"")
    assert len(listed()[0].paths) == 12
    capfd.readouterr()


def test_what_an_image_folder_leaves_out_is_counted_and_named(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "train" / "cat" / "loop").symlink_to(folder / "train" / "cat")
    (folder / "train" / "cat" / "photo.heic").write_bytes(b"heic")
    picture(9, 9, 1).save(folder / "train" / "lonely.png")
    assert image_files.check_data(imagefolder(folder)) == (2, 10)
    (said,) = [line for line in capfd.readouterr().err.splitlines() if "train" in line]
    for part in ("3 files of other types", "1 .heic", "2 .txt", "1 image in no class folder", "lonely.png", "cat/loop"):
        assert part in said


def test_a_spoilt_image_whose_name_is_not_utf_8_is_named(folder: Path) -> None:
    path = Path(os.fsdecode(bytes(folder) + b"/train/cat/caf\xe9.png"))
    path.write_bytes(b"garbage")
    assert r"train/cat/caf\xe9.png: not a readable image" in complaint(imagefolder(folder), load=False)
    with pytest.raises(UserError, match=r"caf\\xe9.png: not a readable image"):
        transforms.decode(str(path))
