"""Sequences that a language model writes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def generate(
    model: nn.Module, prompts: Tensor, count: int, max_length: int, temperature: float = 1.0, seed: int = 0
) -> Tensor:
    """Continue each prompt by `count` tokens: [N, t] to [N, t + count], int64, on the CPU.

    Every token takes one forward over the last `max_length` tokens. It is drawn on the CPU by a generator of its own, so
    that all ranks of a sharded model draw the same, and nothing changes for those who use torch's generator.

    Args:
        model: tokens [N, T] to logits [N, T, V]. It is put into evaluation mode, and then back.
        temperature: what the logits are divided by; 0: the most likely token is taken.
    """
    training, device = model.training, next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    tokens = prompts.cpu()
    model.eval()
    for _ in range(count):
        logits = model(tokens[:, -max_length:].to(device))[:, -1].double().cpu()
        if temperature > 0:
            following = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            following = logits.argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, following], dim=1)
    model.train(training)
    return tokens
