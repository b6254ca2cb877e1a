"""A small task whose ranks have unequally many tokens: what a bug in weighing them needs to be seen."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LONGEST, TOKENS = 8, 11


class Ragged:
    """Sequences of 1 to 8 tokens, filled up; each token's successor is drawn at random."""

    def __init__(self) -> None:
        drawn = torch.Generator().manual_seed(0)
        tokens = torch.randint(TOKENS, (160, LONGEST + 1), generator=drawn)
        counted = torch.arange(LONGEST) < torch.randint(1, LONGEST + 1, (160, 1), generator=drawn)
        samples = list(zip(tokens[:, :-1], tokens[:, 1:].where(counted, -100), strict=True))
        self.train_set, self.eval_set = samples[:140], samples[140:]

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Embedding(TOKENS, 16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, TOKENS))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    def weigh(self, targets: Tensor) -> Tensor:
        return (targets != -100).sum()
