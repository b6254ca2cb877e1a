"""How much of a core it takes to read images: our loaders beside what most loops use, and beside the model they feed.

    python -m benchmarks.input [--rounds N] [--images N] [--steps N]

JPEGs of ImageNet's size (500 × 375, quality 90) are written into a folder first. Then all take turns, one process with
one thread each, from the files to normalised floats: ours (channels_last, as the model takes it); torchvision's
ImageFolder with PIL and transforms v1, as in pytorch/examples; torchvision.io with transforms v2. For images in memory:
ours against one sample at a time through PIL, as torchvision's CIFAR10 goes. What is compared is CPU time, that of
workers included, which other work on the machine changes little; the wall clock with one worker is there as well.

The last rows train: the CPU time of reading an image by that of training on it, for two models, and images/s of
recipes.ddp from the folder with 0, 1 and 2 workers a rank.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from torchvision import models
from torchvision import transforms as v1
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from benchmarks import common
from lockstep.data.datasets import DRAWS, ImageDataset, ImageFiles, InMemoryImages
from lockstep.data.loader import Samples, build_loader
from lockstep.data.sampler import EvalSampler, StepSampler
from lockstep.data.transforms import Normalise

BATCH, SIZE = 32, 224
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class Spent(NamedTuple):
    """Seconds an image."""

    cpu: float
    wall: float


def clocked(batches: Callable[[], Iterable[Tensor]]) -> Spent:
    """Take all batches of a loader that is made for it, so that its workers end within."""

    def cpu() -> float:
        each = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(spent.ru_utime + spent.ru_stime for spent in each)

    before, started, count = cpu(), time.perf_counter(), 0
    for images in batches():
        count += len(images)
    return Spent((cpu() - before) / count, (time.perf_counter() - started) / count)


def write_images(folder: Path, count: int) -> None:
    """Pictures with large shapes and fine grain, whose files are about as large as ImageNet's."""
    random = np.random.default_rng(0)
    for i in range(count):
        shapes = Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((500, 375))
        grain = random.normal(0, 12, (375, 500, 1)) + random.normal(0, 4, (375, 500, 3))
        pixels = (np.asarray(shapes) + grain).clip(0, 255).astype(np.uint8)
        for part in ("train", "val"):
            file = folder / part / str(i % 10) / f"{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file, quality=90)


def ours(images: ImageDataset, train: bool, workers: int = 0) -> Iterator[Tensor]:
    """As Run.steps does it."""
    count = len(images)
    sampler = StepSampler(count, BATCH, 0, 0, 1, 0, count // BATCH) if train else EvalSampler(count, BATCH, 0, 1)
    normalise = Normalise(MEAN, STD)
    for batch in build_loader(Samples(images, 0, fixed=not train), sampler, workers, pin_memory=False):
        yield normalise(batch.inputs, torch.float32)


def theirs(dataset: Dataset[Any], train: bool, workers: int = 0) -> Iterator[Tensor]:
    """As in most loops: one sample at a time, collated."""
    for images, _ in DataLoader(dataset, BATCH, shuffle=train, drop_last=train, num_workers=workers):
        yield images


def with_pil(folder: Path, train: bool) -> ImageFolder:
    place = [v1.RandomResizedCrop(SIZE), v1.RandomHorizontalFlip()] if train else [v1.Resize(256), v1.CenterCrop(SIZE)]
    return ImageFolder(str(folder), v1.Compose([*place, v1.ToTensor(), v1.Normalize(MEAN, STD)]))


def with_tensors(folder: Path, train: bool) -> ImageFolder:
    place = [v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip()] if train else [v2.Resize(256), v2.CenterCrop(SIZE)]
    change = v2.Compose([*place, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    return ImageFolder(str(folder), change, loader=lambda path: decode_image(path, ImageReadMode.RGB))


class OneByOne(Dataset[tuple[Tensor, int]]):
    """Images in memory as torchvision's CIFAR10 has them: an array, each made a PIL image and changed alone."""

    def __init__(self, images: Tensor) -> None:
        self.pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.change = v1.Compose(
            [v1.RandomCrop(32, padding=4), v1.RandomHorizontalFlip(), v1.ToTensor(), v1.Normalize(MEAN, STD)]
        )

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, sample: int) -> tuple[Tensor, int]:
        return self.change(Image.fromarray(self.pixels[sample])), 0


def training(name: str) -> Callable[[int], Spent]:
    """The CPU time of training on an image of 224 × 224: bf16, channels_last, 8 at once."""
    model = getattr(models, name)().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(8, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)

    def step(_: int) -> Spent:
        def batches() -> Iterator[Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                loss = cross_entropy(model(images), torch.zeros(8, dtype=torch.int64))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield images

        return clocked(batches)

    return step


def speed(folder: Path, out: Path, workers: int, steps: int) -> float:
    """images/s of recipes.ddp from the folder."""
    where = out / f"{workers}-{time.time_ns()}"
    words = [
        *(
            "-m",
            "recipes.ddp",
            "data=imagefolder",
            f"data.root={folder}",
            f"data.workers={workers}",
            "global_batch_size=16",
        ),
        *(f"max_steps={steps}", "nproc=2", f"model.image_size={SIZE}", "eval_every=0", "epochs=1000", f"out={where}"),
    ]
    common.run(words)
    return float(json.loads((where / "result.json").read_text())["images_per_second"])


def rows(arguments: argparse.Namespace) -> list[common.Row]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=os.getcwd()) as scratch:
        folder = Path(scratch, "images")
        write_images(folder, max(arguments.images, BATCH))
        found = reading(folder, arguments.rounds)
        if arguments.steps:
            tried = {workers: [] for workers in (0, 1, 2)}  # type: dict[int, list[float]]
            for name, speeds in common.in_turn(
                {str(n): lambda _, n=n: speed(folder, Path(scratch), n, arguments.steps) for n in tried},  # type: ignore[misc]
                arguments.rounds,
            ).items():
                tried[int(name)] = speeds
            for workers in (1, 2):
                note = f"{statistics.median(tried[workers]):.0f} and {statistics.median(tried[0]):.0f} images/s"
                name = f"images/s of recipes.ddp: data.workers={workers} / 0"
                found.append(common.Row(name, common.ratios(tried[workers], tried[0]), note=note))
    return found


def reading(folder: Path, rounds: int) -> list[common.Row]:
    """All that is measured in this process."""
    memory = InMemoryImages(
        torch.randint(0, 256, (8192, 3, 32, 32), dtype=torch.uint8), torch.zeros(8192, dtype=torch.int64), 10, 4, True
    )
    kinds = {"train": True, "val": False}
    sets = {part: ImageFiles(folder / part, SIZE) for part in kinds}
    memory.draws = sets["train"].draws = DRAWS  # to augment by
    contestants: dict[str, Callable[[int], Spent]] = {}

    def enter(name: str, batches: Callable[[], Iterable[Tensor]]) -> None:
        contestants[name] = lambda _: clocked(batches)

    for part, train in kinds.items():
        enter(f"{part} ours", lambda part=part, train=train: ours(sets[part], train))  # type: ignore[misc]
        pil, tensors = with_pil(folder / part, train), with_tensors(folder / part, train)
        enter(f"{part} PIL", lambda pil=pil, train=train: theirs(pil, train))  # type: ignore[misc]
        enter(f"{part} v2", lambda tensors=tensors, train=train: theirs(tensors, train))  # type: ignore[misc]
    enter("worker ours", lambda: ours(sets["train"], True, 1))
    pil = with_pil(folder / "train", True)
    enter("worker PIL", lambda: theirs(pil, True, 1))
    one_by_one = OneByOne(memory.images)
    enter("memory ours", lambda: ours(memory, True))
    enter("memory PIL", lambda: theirs(one_by_one, True))
    for name in ("resnet18", "resnet50"):
        contestants[name] = training(name)
    spent = common.in_turn(contestants, rounds, warm=1)

    def row(name: str, ours: str, theirs: str, of: str = "cpu", target: float | None = None) -> common.Row:
        mine, other = ([getattr(one, of) for one in spent[each]] for each in (ours, theirs))
        note = f"{1 / statistics.median(mine):,.0f} and {1 / statistics.median(other):,.0f} images/s"
        return common.Row(name, common.ratios(other, mine), target, note=note)

    def share(model: str) -> common.Row:
        mine, other = ([one.cpu for one in spent[each]] for each in ("train ours", model))
        note = f"{1000 * statistics.median(mine):.1f} and {1000 * statistics.median(other):.0f} ms an image"
        return common.Row(f"CPU time: reading / training {model}", common.ratios(mine, other), note=note)

    return [
        row("images a CPU second, training: ours / PIL", "train ours", "train PIL", target=1),
        row("images a CPU second, training: ours / torchvision v2", "train ours", "train v2", target=1),
        row("images a CPU second, evaluation: ours / PIL", "val ours", "val PIL", target=1),
        row("images a CPU second, evaluation: ours / torchvision v2", "val ours", "val v2", target=1),
        row("images a CPU second with a worker: ours / PIL", "worker ours", "worker PIL", target=1),
        row("images a second with a worker: ours / PIL", "worker ours", "worker PIL", "wall"),
        row("images a CPU second, 32 × 32 in memory: ours / PIL", "memory ours", "memory PIL", target=1),
        share("resnet18"),
        share("resnet50"),
    ]


if __name__ == "__main__":
    common.main(
        __doc__,
        rows,
        images={"type": int, "default": 256, "help": "JPEGs to write and read (256)"},
        steps={"type": int, "default": 16, "help": "steps of recipes.ddp with 0, 1 and 2 workers a rank; 0: none (16)"},
    )
