"""The digits with Lightning's Trainer, which starts its ranks itself.

python with_lightning.py                  one process
python with_lightning.py --devices 2      two, with the same global batch
"""

import argparse
import logging
from typing import Any

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lockstep.verify

GLOBAL_BATCH = 64


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        inputs, targets = batch
        return nn.functional.cross_entropy(self.net(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.002)
        lockstep.verify.watch(self, optimizer)
        return optimizer

    def train_dataloader(self) -> Any:
        """Lightning would put in a DistributedSampler where there are several ranks, and one process has another order."""
        digits = load_digits()
        data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
        ranks = self.trainer.world_size
        sampler: Any = DistributedSampler(data, ranks, self.trainer.global_rank, seed=0)
        return DataLoader(data, GLOBAL_BATCH // ranks, sampler=sampler, drop_last=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=1)
    devices = parser.parse_args().devices
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    lightning.seed_everything(0, verbose=False)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        use_distributed_sampler=False,
        gradient_clip_val=1.0,
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Digits())
