"""The same training by Lightning's Trainer, with nothing switched on that costs time (`barebones`)."""

import os
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.contestants import work


class Module(lightning.LightningModule):
    def __init__(self, asked: Any) -> None:
        super().__init__()
        self.asked, self.model = asked, work.build(asked)

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        images, labels = batch
        return cross_entropy(self.model(work.prepared(images, self.asked)), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return work.optimizer(self)


def main() -> None:
    asked = work.arguments()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        strategy="ddp",
        precision="bf16-mixed" if asked.bf16 else "32-true",
        max_steps=asked.steps,
        barebones=True,
    )
    trainer.fit(Module(asked), work.loader(asked))
    os._exit(0)


if __name__ == "__main__":
    main()
