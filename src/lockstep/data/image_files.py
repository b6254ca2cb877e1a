"""Data sets on disk: what is there, and whether it is what its format says, in NumPy and plain lists.

A command checks its data with `check_data` before anything starts, in the process that ranks may be forked from.
Counting with tensors would start torch's threads there, and a process that has threads is not forked.

CIFAR-10 is not read by torchvision.datasets: that runs whatever code a pickle holds, and knows no binary files.
"""

from __future__ import annotations

import importlib.util
import itertools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lockstep.config.schema import DataConfig
from lockstep.data.image_folder import check_image, list_image_folder, say_what_is_left_out
from lockstep.errors import UserError
from lockstep.utils.downloads import answers_awaited

DIGIT_CLASSES = [str(number) for number in range(10)]  # the classes of digits, and CIFAR-10's by its labels
CIFAR_RECORD = 1 + 3 * 32 * 32  # a label, then 3 planes of 32 × 32
CIFAR_PICKLES = "cifar-10-batches-py"
CIFAR_BINARIES = "cifar-10-batches-bin"


def check_data(config: DataConfig) -> tuple[int, int]:
    """Check a data set before anything starts: (classes, training images).

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
    names = DIGIT_CLASSES
    if config.name == "digits":
        if config.classes is None:
            return 10, 1437
        labels = read_digits()[0][1]
    elif config.name == "cifar10":
        root = data_root(config)
        if config.download and not any((root / folder).is_dir() for folder in (CIFAR_BINARIES, CIFAR_PICKLES)):
            download_cifar10(root)
        train_files, test_files = cifar10_files(root)
        read = [read_cifar(file)[1] for file in train_files + test_files]
        labels = np.concatenate(read[: len(train_files)])
    else:
        root = data_root(config)
        train, val = (list_image_folder(root / part) for part in ("train", "val"))
        names = train.names
        if names != val.names:
            odd = ", ".join(sorted(set(names) ^ set(val.names)))
            raise UserError(
                f"{root}: train/ has {len(names)} classes, val/ {len(val.names)}, and they differ in {odd}; "
                "data.root needs the same in both"
            )
        for path in itertools.islice(itertools.chain(train.paths, val.paths), config.check_files):
            check_image(path)
        say_what_is_left_out(root / "train", train.left_out)
        say_what_is_left_out(root / "val", val.left_out)
        labels = np.array(train.labels)
    if config.classes is None:
        return len(names), len(labels)
    chosen = chosen_classes(config, names)
    return len(chosen), int(np.isin(labels, chosen).sum())


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


def download_cifar10(root: Path) -> None:
    """Fetch and unpack the archive that torchvision names, checked against its MD5."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import download_and_extract_archive

    try:
        with answers_awaited():
            download_and_extract_archive(CIFAR10.url, str(root), filename=CIFAR10.filename, md5=CIFAR10.tgz_md5)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"data.download=true: {CIFAR10.url} could not be fetched ({error}); unpack it into {root} yourself"
        ) from None


def data_root(config: DataConfig) -> Path:
    if config.root is None:
        raise UserError(f"data={config.name} needs data.root: the folder that holds it")
    root = Path(config.root).expanduser()
    if not root.is_dir() and not config.download:
        raise UserError(f"data.root={root}: no such folder; set data.root to the one that holds {config.name}")
    return root
