"""A task of one's own with sequences of unequal length: learned positions, attention of its own, targets that are padding."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LENGTH, VOCABULARY, WIDTH = 16, 11, 16


class Positions(nn.Module):
    positions: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(LENGTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device) if self.positions is None else self.positions
        return x + self.table(positions)


class Attention(nn.Module):
    positions: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, scale=0.2)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class PaddedSequences:
    """So short that of four ranks some have nothing but padding, of which this plain loss is nan."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(VOCABULARY, (32, LENGTH + 1), generator=generator)
        lengths = torch.randint(1, 5, (32, 1), generator=generator)
        targets = tokens[:, 1:].where(torch.arange(LENGTH) < lengths, -100)
        samples = list(zip(tokens[:, :-1], targets, strict=True))
        self.train_set, self.eval_set = samples[:24], samples[24:]

    def build_model(self) -> nn.Module:
        embedding, output = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        return nn.Sequential(embedding, Positions(), Attention(), nn.Dropout(0.1), output)

    def context_parallel_modules(self, model: nn.Module) -> list[str]:
        return ["1", "2"]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    def weigh(self, targets: Tensor) -> Tensor:
        return (targets != -100).sum()
