"""What all contestants train alike: the model, the images, the words on the command line. No lockstep in here."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, Sampler, TensorDataset

MEAN, STD = 0.305, 0.376
SMALL = 64  # pixels per side up to which a ResNet has the stem for small images
NOISE = 256, 64  # images of noise, small and large


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny", help="tiny, a ResNet of torchvision's, or timm:NAME")
    parser.add_argument("--size", type=int, default=8, help="pixels per side; 8: scikit-learn's digits, else noise")
    parser.add_argument("--share", type=int, default=32, help="images per rank and step")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--bf16", action="store_true", help="autocast to bf16")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--in-memory", action="store_true", help="no DataLoader: batches cut out of one tensor")
    return parser.parse_args()


def tiny() -> nn.Module:
    """So small that a step is mostly what the loop around it costs."""
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 10))


def build(asked: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    if asked.model == "tiny":
        return tiny()
    if asked.model.startswith("timm:"):
        import timm

        model = timm.create_model(asked.model.removeprefix("timm:"), num_classes=10)
    else:
        from torchvision.models import resnet

        model = getattr(resnet, asked.model)(num_classes=10)
    if asked.size <= SMALL:
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model.to(memory_format=torch.channels_last) if asked.channels_last else model


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)


def data(size: int) -> TensorDataset:
    """uint8 images [N, 3, size, size] with labels."""
    if size == 8:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        grey = (torch.tensor(images[:1437]).view(-1, 1, 8, 8) * (255 / 16)).round().to(torch.uint8)
        return TensorDataset(grey.expand(-1, 3, -1, -1).contiguous(), torch.tensor(labels[:1437]))
    generator = torch.Generator().manual_seed(0)
    count = NOISE[size > SMALL]
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return TensorDataset(images, torch.randint(0, 10, (count,), generator=generator))


def prepared(images: Tensor, asked: argparse.Namespace) -> Tensor:
    """Normalised floats."""
    images = images.float().div_(255).sub_(MEAN).div_(STD)
    return images.contiguous(memory_format=torch.channels_last) if asked.channels_last else images


def loader(asked: argparse.Namespace, sampler: Sampler[int] | None = None) -> DataLoader[tuple[Tensor, Tensor]]:
    """As it is written by hand. Without a sampler it is for a library that brings its own."""
    images = data(asked.size)
    return DataLoader(images, batch_size=asked.share, sampler=sampler, shuffle=sampler is None, drop_last=True)


def by_hand(asked: argparse.Namespace, rank: int, world_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's batches, epoch after epoch, `asked.steps` of them."""
    if asked.in_memory:
        images, labels = data(asked.size).tensors
        for step in range(asked.steps):
            start = (step * world_size + rank) * asked.share % (len(labels) - asked.share)
            yield images[start : start + asked.share], labels[start : start + asked.share]
        return
    sampler: DistributedSampler[int] = DistributedSampler(data(asked.size), world_size, rank)
    yield from endless(loader(asked, sampler), asked.steps, sampler)


def endless(
    batches: Iterable[tuple[Tensor, Tensor]], steps: int, sampler: DistributedSampler[int] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` batches, beginning anew where they end."""
    done = 0
    for epoch in itertools.count():
        if sampler is not None:
            sampler.set_epoch(epoch)
        for batch in batches:
            if done == steps:
                return
            done += 1
            yield batch
