"""What recipes that shard with fully_shard do to a model besides."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lockstep.parallel.fully_sharded import sum_embeddings_in_fp32


def gradient_of(model: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = model(tokens)
    (outputs * 1.25).sum().backward()
    gradient = next(model.parameters()).grad
    assert gradient is not None
    return outputs, gradient.double()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_an_embedding_in_16_bits_loses_nothing_of_a_token_that_comes_often(precision: str) -> None:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    tokens = torch.zeros(9000, dtype=torch.int64)
    tokens[::9] = 1
    models = [nn.Sequential(nn.Embedding(3, 4).to(dtype)) for _ in range(2)]
    models[0].load_state_dict(models[1].state_dict())
    sum_embeddings_in_fp32(models[0], precision, torch.device("cpu"))
    (mine, gradient), (plain, lost) = (gradient_of(model, tokens) for model in models)
    assert torch.equal(mine, plain)
    exact = torch.tensor([8000.0, 1000.0, 0.0], dtype=torch.float64)[:, None].expand(3, 4) * 1.25
    assert (gradient - exact).norm() <= 4e-3 * exact.norm()
    assert (lost - exact).norm() > 0.05 * exact.norm(), "torch adds up well now: the class is not needed any more"


def test_full_precision_and_gpus_are_left_alone() -> None:
    for precision, device in (("fp32", "cpu"), ("bf16", "cuda")):
        model = nn.Sequential(nn.Embedding(3, 4))
        sum_embeddings_in_fp32(model, precision, torch.device(device))
        assert type(model[0]) is nn.Embedding
