"""A GPT that is no plain stack of trained layers: tied weights, a part that is used twice, frozen parts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lockstep.tasks.language import Language


@dataclass
class Unusual(Language):
    """Attributes:
    tied: the output's weight is the embedding's.
    twice: all blocks have the first one's MLP.
    frozen: the embedding and the first block's attention are not trained.
    """

    tied: bool = False
    twice: bool = False
    frozen: bool = False

    def build_model(self) -> nn.Module:
        model = super().build_model()
        if self.tied:
            model.output.weight = model.embedding.weight
        if self.twice:
            for block in model.blocks:
                block.mlp = model.blocks[0].mlp
        if self.frozen:
            for part in (model.embedding, model.blocks[0].attention):
                part.requires_grad_(False)
        return model
