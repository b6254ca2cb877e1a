"""A small vision transformer on your own pictures: a folder of class folders, cropped and flipped at random.

The transforms are torchvision's own. Whatever they draw from, torch's, NumPy's or Python's random numbers, a picture is
seen the same in any worker, on any rank and after any resume: every sample has generators of its own.

    python -m recipes.ddp task=examples/vit_folder.py:Vit task.folder=PICTURES optim=adamw optim.lr=0.001

PICTURES/train/cat/1.jpg is a cat to train on, PICTURES/val/dog/2.jpg a dog to evaluate on.

Expect: EXPECT
Source: https://arxiv.org/abs/2010.11929 (the model), https://docs.pytorch.org/vision/stable/transforms.html
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets import ImageFolder
from torchvision.models import VisionTransformer
from torchvision.transforms import v2

from lockstep import UserError


@dataclass
class Vit:
    folder: str  # task.folder=PATH
    size: int = 32  # side of a picture, in pixels
    patch: int = 8  # side of what becomes one token
    width: int = 64
    depth: int = 4
    heads: int = 4

    best = "accuracy"
    unit = "pictures"
    decodes = True  # reading takes time: by default a worker process reads ahead

    def __post_init__(self) -> None:
        folder = Path(self.folder).expanduser()
        for part in ("train", "val"):
            if not (folder / part).is_dir():
                raise UserError(f"task.folder={self.folder}: has no folder {part}; it needs train/CLASS and val/CLASS")
        crop = [v2.RandomResizedCrop(self.size, scale=(0.5, 1.0)), v2.RandomHorizontalFlip(), v2.ColorJitter(0.2, 0.2)]
        self.train_set = ImageFolder(folder / "train", self.transform(crop))
        self.eval_set = ImageFolder(folder / "val", self.transform([v2.Resize((self.size, self.size))]))

    def transform(self, steps: list[nn.Module]) -> v2.Compose:
        """PIL images to float32 [3, size, size]."""
        normalise = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        return v2.Compose([v2.ToImage(), *steps, v2.ToDtype(torch.float32, scale=True), normalise])

    def build_model(self) -> nn.Module:
        return VisionTransformer(
            self.size,
            self.patch,
            self.depth,
            self.heads,
            self.width,
            4 * self.width,
            num_classes=len(self.train_set.classes),
        )

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, tuple[Tensor, int]]:
        return {"accuracy": ((outputs.argmax(1) == targets).sum(), len(targets))}
