"""A small vision transformer on your own pictures: a folder of class folders, cropped, turned and lit at random.

The transforms are torchvision's own. Whatever they draw from, torch's, NumPy's or Python's random numbers, a picture is
seen the same in any worker, on any rank and after any resume: every sample has generators of its own.

    python -m recipes.ddp task=examples/vit_folder.py:Vit task.folder=PICTURES optim=adamw optim.lr=0.001

PICTURES/train/cat/1.jpg is a cat to train on, PICTURES/val/dog/2.jpg a dog to evaluate on. To try it without pictures
of your own, have scikit-learn's handwritten digits written as JPEGs first:

    python examples/vit_folder.py PICTURES

Expect: an accuracy of about 0.5 on those digits after 6 epochs (`epochs=6`), where chance is 0.1, in a minute on two CPU
cores; a transformer wants more pictures, or more epochs.
Source: https://arxiv.org/abs/2010.11929 (the model), https://docs.pytorch.org/vision/stable/transforms.html
"""

import sys
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
        crop = [v2.RandomResizedCrop(self.size, scale=(0.7, 1.0)), v2.RandomRotation(10), v2.ColorJitter(0.2, 0.2)]
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

    def mistakes(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(place in the batch, label, prediction) of each picture; of those that are right, the place is -1."""
        predicted = outputs.argmax(1)
        places = torch.arange(len(targets), device=targets.device)
        return torch.stack([torch.where(predicted == targets, -1, places), targets, predicted], 1)

    def pictures(self, samples: list[int]) -> Tensor:
        """What misclassified.png shows of them: uint8 [N, 3, size, size]."""
        show = v2.Compose([v2.PILToTensor(), v2.Resize((self.size, self.size))])
        return torch.stack([show(self.eval_set.loader(self.eval_set.samples[sample][0])) for sample in samples])


def write_digits(folder: Path) -> None:
    """1,437 pictures of 32 × 32 pixels to train on, and 360 to evaluate on, in a folder per digit."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        file = folder / ("val" if number % 5 == 0 else "train") / str(label) / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9).astype("uint8")).resize((32, 32), Image.Resampling.BICUBIC).save(file)


if __name__ == "__main__":
    write_digits(Path(sys.argv[1]))
