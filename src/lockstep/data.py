"""Data whose order is a pure function of (seed, epoch), cut into global batches, sliced by rank.

Step k of an epoch takes global batch k of the epoch's order and rank r takes the r-th equal slice of that batch. So
what the optimizer sees does not depend on the number of ranks, and one integer (steps done) says where to go on.
Images stay uint8 until they are on the device: a quarter of the bytes to copy.
"""

from __future__ import annotations

import importlib.util
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from lockstep.errors import UserError
from lockstep.preemption import ignore_signals
from lockstep.schema import DataConfig

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif"}
DIGITS = [str(number) for number in range(10)]  # the classes of digits, and CIFAR-10's by its labels
CIFAR_RECORD = 1 + 3 * 32 * 32  # a label, then 3 planes of 32 × 32
CIFAR_PICKLES = "cifar-10-batches-py"
CIFAR_BINARIES = "cifar-10-batches-bin"


class Batch(NamedTuple):
    """images: [N, 3, H, W], uint8 from a loader, normalised floats from `Run.steps`; labels: [N], int64."""

    images: Tensor
    labels: Tensor


# The order --------------------------------------------------------------------------------------------------------


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch's samples: a permutation of 0…size−1 that depends on (seed, epoch) alone."""
    state = np.random.SeedSequence(seed, spawn_key=(epoch,)).generate_state(1)  # (seed, epoch) pairs never collide
    return torch.randperm(size, generator=torch.Generator().manual_seed(int(state[0])))


def rank_slice(order: Tensor, step: int, batch_size: int, rank: int, world_size: int) -> Tensor:
    """Rank `rank`'s samples of global batch `step` of an epoch's order: [batch_size / world_size]."""
    share = batch_size // world_size
    start = step * batch_size + rank * share
    return order[start : start + share]


class StepSampler(Sampler[tuple[int, Tensor]]):
    """Yields (epoch, this rank's sample numbers) for every step from `start` to `stop`, over all the epochs they span.

    The last size % batch_size samples of an epoch's order are dropped, which are different ones each epoch.
    One sampler spans all epochs: DataLoader workers then go on working across the end of an epoch.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, rank: int, world_size: int, start: int, stop: int
    ) -> None:
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.start, self.stop = start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        steps_per_epoch = self.size // self.batch_size
        epoch, order = -1, torch.empty(0)
        for done in range(self.start, self.stop):
            now, step = divmod(done, steps_per_epoch)
            if now != epoch:
                epoch, order = now, epoch_order(self.size, self.seed, now)
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


def uniform(seed: int, epoch: int, samples: Tensor, draws: int) -> Tensor:
    """Random numbers in [0, 1) that belong to a sample: [len(samples), draws], float64.

    A counter-based generator: no state that a worker, a rank or a resume could get out of step. SplitMix64
    (https://doi.org/10.1145/2660193.2660195) over the key (seed, epoch), the sample and the draw.
    """
    base = np.random.SeedSequence(seed, spawn_key=(epoch,)).generate_state(1, np.uint64)[0]
    counter = samples.numpy().astype(np.uint64)[:, None] * np.uint64(draws) + np.arange(1, draws + 1, dtype=np.uint64)
    z = base + counter * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return torch.from_numpy((z >> np.uint64(11)).astype(np.float64) * 2.0**-53)


# The images -------------------------------------------------------------------------------------------------------


class Images(Protocol):
    """A labelled set of images. `draws` holds each sample's random numbers where the set is to be augmented."""

    classes: int
    labels: Tensor

    def __len__(self) -> int: ...

    def fetch(self, samples: Tensor, draws: Tensor | None) -> Batch: ...


class First:
    """The first samples of a set."""

    def __init__(self, images: Images, size: int) -> None:
        self._images, self._size, self.classes = images, min(size, len(images)), images.classes
        self.labels = images.labels[: self._size]

    def __len__(self) -> int:
        return self._size

    def fetch(self, samples: Tensor, draws: Tensor | None) -> Batch:
        return self._images.fetch(samples, draws)


DRAWS = 5  # random numbers a sample may use: area, aspect, two positions, flip


class InMemory:
    """Images held as one uint8 tensor [N, 3, H, W]; a batch is one gather, an augmentation one more.

    Augmentation shifts by up to `shift` pixels, the border filled with black, and mirrors where `flip`.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: int, shift: int, flip: bool) -> None:
        self.images, self.labels, self.classes = images, labels, classes
        self.shift, self.flip = shift, flip

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, samples: Tensor, draws: Tensor | None) -> Batch:
        images = self.images[samples]
        if draws is not None:
            images = self._augment(images, draws)
        return Batch(images, self.labels[samples])

    def _augment(self, images: Tensor, draws: Tensor) -> Tensor:
        count, _, height, width = images.shape
        span = 2 * self.shift + 1
        top, left = (draws[:, 2:4] * span).long().unbind(1)
        rows = top[:, None] + torch.arange(height)
        columns = left[:, None] + torch.arange(width)
        if self.flip:
            columns = torch.where(draws[:, 4:5] < 0.5, columns.flip(1), columns)
        padded = F.pad(images, [self.shift] * 4)
        # Advanced indices on both sides of a slice put the sample and pixel dims first: [N, H, W, 3].
        picked = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return picked.permute(0, 3, 1, 2).contiguous()


class ImageFolder:
    """`root/<class>/*.jpg`, the ImageNet layout: decoded when fetched, cropped to size × size.

    For training, Inception's crop (https://arxiv.org/abs/1409.4842: 8 to 100 % of the area, sides 3:4 to 4:3) and
    a mirror image every other time; for evaluation the centre crop of the image resized to size · 256 / 224.
    """

    def __init__(self, root: Path, size: int) -> None:
        self.size = size
        self.paths, labels, names = list_folder(root)
        self.classes = len(names)
        self.labels = torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.paths)

    def fetch(self, samples: Tensor, draws: Tensor | None) -> Batch:
        images = [
            self._load(self.paths[sample], None if draws is None else draws[i].tolist())
            for i, sample in enumerate(samples.tolist())
        ]
        return Batch(torch.stack(images), self.labels[samples])

    def _load(self, path: Path, draws: list[float] | None) -> Tensor:
        from torchvision.io import ImageReadMode, decode_image
        from torchvision.transforms.v2 import functional as transforms

        try:
            image = decode_image(str(path), ImageReadMode.RGB)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{path}: not a readable image ({str(error).splitlines()[0]}); replace it or take it out of data.root"
            ) from None
        image = image[0] if image.ndim == 4 else image  # of an animation, the first frame
        image = transforms.to_dtype(image, torch.uint8, scale=True)  # a PNG may have 16 bits
        _, height, width = image.shape
        if draws is None:
            side = round(min(height, width) * 224 / 256)
            top, left = (height - side) // 2, (width - side) // 2
            return transforms.resized_crop(image, top, left, side, side, [self.size, self.size], antialias=True)
        area = height * width * (0.08 + 0.92 * draws[0])
        aspect = math.exp(math.log(3 / 4) + draws[1] * math.log(16 / 9))
        crop_height = min(height, max(1, round(math.sqrt(area / aspect))))
        crop_width = min(width, max(1, round(math.sqrt(area * aspect))))
        top = int(draws[2] * (height - crop_height + 1))
        left = int(draws[3] * (width - crop_width + 1))
        image = transforms.resized_crop(
            image, top, left, crop_height, crop_width, [self.size, self.size], antialias=True
        )
        return image.flip(2) if draws[4] < 0.5 else image


class SomeClasses:
    """The samples of some classes of a set, relabelled 0…n − 1 in the order in which `chosen` has the old labels."""

    def __init__(self, images: Images, chosen: list[int]) -> None:
        self.images, self.classes = images, len(chosen)
        self._new = torch.full((images.classes,), -1)
        self._new[chosen] = torch.arange(len(chosen))
        everyone = self._new[images.labels]
        self._samples = (everyone >= 0).nonzero().squeeze(1)
        self.labels = everyone[self._samples]

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, samples: Tensor, draws: Tensor | None) -> Batch:
        batch = self.images.fetch(self._samples[samples], draws)
        return Batch(batch.images, self._new[batch.labels])


class Samples(Dataset[Batch]):
    """What a DataLoader reads: a sampler's (epoch, sample numbers) in, a whole Batch out."""

    def __init__(self, images: Images, seed: int, augment: bool) -> None:
        self.images, self.seed, self.augment = images, seed, augment

    def __getitem__(self, key: tuple[int, Tensor]) -> Batch:
        epoch, samples = key
        draws = uniform(self.seed, epoch, samples, DRAWS) if self.augment else None
        return self.images.fetch(samples, draws)


def loader(samples: Samples, sampler: Sampler[tuple[int, Tensor]], workers: int, pin_memory: bool) -> DataLoader[Batch]:
    """A DataLoader that asks the dataset for whole batches (`batch_size=None`: nothing to collate).

    `workers` processes fetch ahead, two batches each; 0 fetches in the training process, which is faster for images in
    memory. Pinned memory lets the copy to a GPU run beside the computation.
    """
    return DataLoader(
        samples,
        sampler=sampler,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=2 if workers else None,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # or it would draw its base seed from training's random numbers
    )


# The data sets ----------------------------------------------------------------------------------------------------


def load(config: DataConfig, image_size: int, seed: int) -> tuple[Images, Images]:
    """(training set, evaluation set) of `config.name`; imagefolder decodes to image_size × image_size.

    Raises:
        UserError: a folder or a file is not what its format says.
    """
    if config.name == "digits":
        sets = digits()
    elif config.name == "synthetic":
        sets = synthetic(config, seed)
    elif config.name == "cifar10":
        sets = cifar10(_root(config))
    else:
        sets = ImageFolder(_root(config) / "train", image_size), ImageFolder(_root(config) / "val", image_size)
    if config.classes is None:
        return sets
    names = list_folder(_root(config) / "train")[2] if config.name == "imagefolder" else DIGITS
    chosen = chosen_classes(config, names)
    return SomeClasses(sets[0], chosen), SomeClasses(sets[1], chosen)


def chosen_classes(config: DataConfig, names: list[str]) -> list[int]:
    """The labels of the classes that data.classes names.

    Raises:
        UserError: the data set has no such class, or one is named twice.
    """
    classes = config.classes or []
    text = f"data.classes=[{','.join(classes)}]"
    if config.name == "synthetic":
        raise UserError(f"{text}: synthetic images have labels at random; set data.num_classes={len(classes)} instead")
    wrong = [name for name in classes if name not in names]
    if wrong:
        allowed = ", ".join(names) if len(names) <= 20 else f"{', '.join(names[:20])}, … ({len(names)} in all)"
        raise UserError(f"{text}: {config.name} has no class {wrong[0]}; allowed are {allowed}")
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise UserError(f"{text}: allowed are two or more classes, each named once")
    return [names.index(name) for name in classes]


def digits() -> tuple[Images, Images]:
    """scikit-learn's digits: 1,797 scans of 8 × 8 pixels, 10 classes; 1,437 to train on, 360 to evaluate."""

    def hold(grey: np.ndarray, labels: np.ndarray) -> InMemory:
        images = torch.from_numpy(grey)[:, None].repeat(1, 3, 1, 1)  # a ResNet takes 3 channels
        return InMemory(images, torch.from_numpy(labels), 10, shift=1, flip=False)  # a mirrored 2 is no digit

    train, test = read_digits()
    return hold(*train), hold(*test)


def synthetic(config: DataConfig, seed: int) -> tuple[Images, Images]:
    """`data.size` images of noise with random labels, a quarter as many to evaluate: for measuring, not learning."""
    classes = config.num_classes or 10
    generator = torch.Generator().manual_seed(seed)

    def make(count: int) -> InMemory:
        shape = (count, 3, config.image_size, config.image_size)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, classes, (count,), generator=generator)
        return InMemory(images, labels, classes, shift=4, flip=True)

    return make(config.size), make(max(1, config.size // 4))


def cifar10(root: Path) -> tuple[Images, Images]:
    """CIFAR-10 from its published files, binary or Python, whichever folder is in `root`.

    Source and format: https://www.cs.toronto.edu/~kriz/cifar.html. Augmented as in He et al.: 4 pixels, mirrored.
    """
    train_files, test_files = cifar10_files(root)

    def read(files: list[Path]) -> InMemory:
        parts = [read_cifar(file) for file in files]
        images, labels = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True))
        return InMemory(images.view(-1, 3, 32, 32), labels.long(), 10, shift=4, flip=True)

    return read(train_files), read(test_files)


def read_digits() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(images [N, 8, 8] uint8, labels [N] int64) to train on, and the same to evaluate.

    Source: https://archive.ics.uci.edu/dataset/80. The split is a fixed shuffle, so it is the same for every seed.
    """
    # The file that scikit-learn's load_digits reads. To import scikit-learn would take every rank seconds.
    package = importlib.util.find_spec("sklearn")
    assert package is not None, "a dependency of lockstep"
    table = np.loadtxt(Path(str(package.origin)).parent / "datasets/data/digits.csv.gz", delimiter=",")
    grey = (table[:, :64].reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)  # the file counts 0…16
    labels = table[:, 64].astype(np.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).numpy()
    train, test = order[:-360], order[-360:]
    return (grey[train], labels[train]), (grey[test], labels[test])


def cifar10_files(root: Path) -> tuple[list[Path], list[Path]]:
    """(training files, test files) below `root`, binary preferred; raises UserError where any is missing."""
    folders = {CIFAR_BINARIES: ".bin", CIFAR_PICKLES: ""}
    for folder, suffix in folders.items():
        if (root / folder).is_dir():
            train = [root / folder / f"data_batch_{i}{suffix}" for i in range(1, 6)]
            test = [root / folder / f"test_batch{suffix}"]
            for file in train + test:
                if not file.is_file():
                    raise UserError(f"{file}: missing; unpack the CIFAR-10 archive into data.root={root} again")
            return train, test
    raise UserError(
        f"data.root={root}: holds neither {CIFAR_BINARIES}/ nor {CIFAR_PICKLES}/; "
        "unpack CIFAR-10 there, or set data.download=true"
    )


def read_cifar(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """(images [N, 3072] uint8, labels [N] uint8) of a batch in either form."""
    return read_cifar_binary(file) if file.suffix == ".bin" else read_cifar_pickle(file)


def read_cifar_binary(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """(images [N, 3072] uint8, labels [N] uint8) of a binary batch: records of 1 + 3,072 bytes."""
    content = np.fromfile(file, np.uint8)
    if len(content) == 0 or len(content) % CIFAR_RECORD:
        raise UserError(
            f"{file}: {len(content)} bytes is not a multiple of {CIFAR_RECORD}: truncated, or no CIFAR-10 batch; "
            "fetch it again into data.root"
        )
    records = content.reshape(-1, CIFAR_RECORD)
    _check_cifar_labels(file, records[:, 0])
    return records[:, 1:], records[:, 0]


def read_cifar_pickle(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """(images [N, 3072] uint8, labels [N] uint8) of a Python batch, read without running code from the file."""
    try:
        with file.open("rb") as stream:
            content = _ArrayUnpickler(stream, encoding="bytes").load()
        images, labels = np.asarray(content[b"data"]), np.asarray(content[b"labels"])
    except Exception as error:
        raise UserError(
            f"{file}: not a CIFAR-10 batch ({type(error).__name__}: {error}); fetch it again into data.root"
        ) from None
    whole = labels.dtype.kind in "iu" and labels.ndim == 1 and labels.size > 0
    if not whole or images.dtype != np.uint8 or images.shape != (labels.size, CIFAR_RECORD - 1):
        raise UserError(
            f"{file}: labels {labels.dtype} {labels.shape} with data {images.dtype} {images.shape} is no CIFAR-10 "
            f"batch (uint8, N × {CIFAR_RECORD - 1}); fetch it again into data.root"
        )
    _check_cifar_labels(file, labels)
    return images, labels.astype(np.uint8)


def _check_cifar_labels(file: Path, labels: np.ndarray) -> None:
    wrong = labels[(labels < 0) | (labels > 9)]
    if wrong.size:
        raise UserError(f"{file}: label {wrong[0]} where CIFAR-10 has 0…9; this is another file, check data.root")


class _ArrayUnpickler(pickle.Unpickler):
    """A pickle can run any code; this reads only what NumPy arrays are made of."""

    def find_class(self, module: str, name: str) -> Any:
        if name in ("_reconstruct", "ndarray", "dtype", "scalar") and module.partition(".")[0] == "numpy":
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it wants to run {module}.{name}")


def list_folder(root: Path) -> tuple[list[Path], list[int], list[str]]:
    """(image paths, their labels, the classes' names) of `root/<class>/`; classes and files in sorted order."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; data.root must hold train/<class>/ and val/<class>/ with images")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    if not classes:
        raise UserError(f"{root}: holds no class folders; expected {root}/<class>/ with images")
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(p for p in (root / name).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            allowed = ", ".join(sorted(IMAGE_SUFFIXES))
            raise UserError(
                f"{root / name}: class folder without images ({allowed}); fill it or take it out of data.root"
            )
        paths += found
        labels += [label] * len(found)
    return paths, labels, classes


def check(config: DataConfig) -> tuple[int, int]:
    """Look a data set over before anything starts: (classes, training images).

    Raises:
        UserError: data.root is missing or does not hold the format.
    """
    if config.name == "synthetic":
        if config.classes is not None:
            chosen_classes(config, [])
        return config.num_classes or 10, config.size
    native = {"digits": 8, "cifar10": 32}.get(config.name, config.image_size)
    if config.image_size != native:
        raise UserError(
            f"data.image_size={config.image_size}: {config.name} has images of {native} × {native}; "
            "set model.image_size to have them resized"
        )
    names = DIGITS
    if config.name == "digits":
        if config.classes is None:
            return 10, 1437
        labels = read_digits()[0][1]
    elif config.name == "cifar10":
        root = _root(config)
        if config.download and not any((root / folder).is_dir() for folder in (CIFAR_BINARIES, CIFAR_PICKLES)):
            download_cifar10(root)
        train_files, test_files = cifar10_files(root)
        read = [read_cifar(file)[1] for file in train_files + test_files]
        labels = np.concatenate(read[: len(train_files)])
    else:
        root = _root(config)
        paths, listed, names = list_folder(root / "train")
        val_paths, _, val_names = list_folder(root / "val")
        if names != val_names:
            odd = ", ".join(sorted(set(names) ^ set(val_names)))
            raise UserError(
                f"{root}: train/ has {len(names)} classes, val/ {len(val_names)}, and they differ in {odd}; "
                "data.root needs the same in both"
            )
        for path in (paths + val_paths)[: config.check_files]:
            _check_ends(path)
        labels = np.array(listed)
    if config.classes is None:
        return len(names), len(labels)
    chosen = chosen_classes(config, names)
    return len(chosen), int(np.isin(labels, chosen).sum())


def download_cifar10(root: Path) -> None:
    """Fetch and unpack the archive that torchvision names, checked against its MD5."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import download_and_extract_archive

    try:
        download_and_extract_archive(CIFAR10.url, str(root), filename=CIFAR10.filename, md5=CIFAR10.tgz_md5)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"data.download=true: {CIFAR10.url} could not be fetched ({error}); unpack it into {root} yourself"
        ) from None


def _root(config: DataConfig) -> Path:
    if config.root is None:
        raise UserError(f"data={config.name} needs data.root: the folder that holds it")
    root = Path(config.root).expanduser()
    if not root.is_dir() and not config.download:
        raise UserError(f"data.root={root}: no such folder; set data.root to the one that holds {config.name}")
    return root


def _check_ends(path: Path) -> None:
    """Tell a truncated or mistaken JPEG or PNG by its first and last bytes: cheap, where decoding all is not.

    The name does not decide: ImageNet itself has a PNG that is called .JPEG, and files with bytes after the end mark.
    """
    ends = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND\xaeB`\x82"}
    try:
        with path.open("rb") as stream:
            head = stream.read(2)
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - 4096))
            tail = stream.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); replace it or take it out of data.root") from None
    known = path.suffix.lower() in (".jpg", ".jpeg", ".png")
    if known and (head not in ends or ends[head] not in tail):
        raise UserError(
            f"{path}: not a readable image (truncated, or another format); replace it or take it out of data.root"
        )
