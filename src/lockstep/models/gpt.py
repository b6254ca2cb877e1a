"""A small Llama-style GPT: RMSNorm, rotary positions, grouped-query attention, SwiGLU or a mixture of experts.

Source: https://arxiv.org/abs/2302.13971 (Llama), https://arxiv.org/abs/2305.13245 (grouped-query attention),
https://arxiv.org/abs/2002.05202 (SwiGLU), https://arxiv.org/abs/2104.09864 (rotary positions),
https://arxiv.org/abs/1910.07467 (RMSNorm).

Like every model here it knows one device and nothing of ranks: parallelism is applied from outside.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lockstep.models.experts import Experts, MixtureOfExperts
from lockstep.models.layers import SwiGLU, projection, undrawn


@dataclass(frozen=True)
class GPTConfig:
    """A GPT's shape.

    Attributes:
        layers: number of blocks.
        width: numbers per token between the blocks.
        heads: of the queries; they divide `width`, and width / heads is even.
        kv_heads: of keys and values, each for heads / kv_heads neighbouring heads of the queries.
        hidden: numbers per token inside a block's SwiGLU.
        vocabulary: number of tokens that there are.
        dropout: share of the numbers that is dropped in training, after the embedding and each half of a block.
        rope_base: of the rotary positions' wave lengths.
        experts: in each block, as many SwiGLUs of which a token takes `experts_per_token`; 0: one, which all take.
        capacity: of an expert in each sequence, as a multiple of its equal share; None: all tokens that come.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int = 32_000
    dropout: float = 0.0
    rope_base: float = 10_000.0
    experts: int = 0
    experts_per_token: int = 2
    capacity: float | None = None

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def parameters(self) -> int:
        """Of all weights: those of the embedding and those of the output, which are not tied, counted separately."""
        attention = 2 * self.width * self.width + 2 * self.width * self.kv_heads * self.head_width
        router = self.experts * self.width
        block = attention + router + max(1, self.experts) * 3 * self.width * self.hidden + 2 * self.width
        return 2 * self.vocabulary * self.width + self.layers * block + self.width


# With Llama 2's vocabulary of 32,000 tokens, 124M, 350M and 1B have the parameters that they are called after.
# Depth and width of 124M and 350M are GPT-2's (small, medium), tiny's are those of nanoGPT's smallest example;
# 1B is TinyLlama (https://arxiv.org/abs/2401.02385), parameter for parameter. 8B and 70B have the blocks of Llama 3
# (https://arxiv.org/abs/2407.21783), whose vocabulary of 128,256 tokens makes 8B 8.03e9 parameters.
GPT_SIZES = {
    "nano": GPTConfig(layers=4, width=64, heads=4, kv_heads=2, hidden=192),  # 197,184 + 128 · vocabulary
    "tiny": GPTConfig(layers=6, width=384, heads=6, kv_heads=2, hidden=1024),  # 9,442,176 + 768 · vocabulary
    "124M": GPTConfig(layers=12, width=768, heads=12, kv_heads=4, hidden=2048),  # 124,668,672
    "350M": GPTConfig(layers=24, width=1024, heads=16, kv_heads=4, hidden=3072),  # 354,993,152
    "1B": GPTConfig(layers=22, width=2048, heads=32, kv_heads=4, hidden=5632),  # 1,100,048,384
    "8B": GPTConfig(layers=32, width=4096, heads=32, kv_heads=8, hidden=14336),  # 7,241,732,096
    "70B": GPTConfig(layers=80, width=8192, heads=64, kv_heads=8, hidden=28672),  # 68,976,648,192
}


def gpt_config(size: str, vocabulary: int, dropout: float = 0.0, kv_heads: int | None = None) -> GPTConfig:
    """A size of the table, for so many tokens; `kv_heads`: in place of the size's own."""
    shape = GPT_SIZES[size]
    return replace(shape, vocabulary=vocabulary, dropout=dropout, kv_heads=kv_heads or shape.kv_heads)


class GPT(nn.Module):
    """Tokens [N, T], int64, to logits [N, T, vocabulary]; the logits at t depend on the tokens up to t alone.

    T may be anything: positions are angles, which no parameter depends on.
    Embedding and output are not tied: they lie at the two ends of a model that may be cut anywhere between its blocks.
    There are no buffers. The forward is plain: torch.fx traces it with the blocks as leaf modules.
    With experts it gives (logits, unevenness [N]) in training: the sum over the blocks of lockstep.models.experts' balance.

    The weights are drawn from torch's global generator. After building on the meta device and `to_empty`, call
    `init_weights`, or load a state_dict.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = undrawn(nn.Embedding(config.vocabulary, config.width, device="meta"))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.output = projection(config.width, config.vocabulary)
        self.outcome = InTraining()
        self.init_weights()

    def init_weights(self) -> None:
        """Draw all weights, in the order of the modules: normal, with these standard deviations.

        The embedding's is GPT-2's 0.02 (https://github.com/openai/gpt-2/blob/master/src/model.py). A matrix's is
        1 / √inputs, as in PaLM (https://arxiv.org/abs/2204.02311, section 5): GPT-2's 0.02 is about that at a width of
        2,048, and far too little at 64. What adds to the residual stream, two matrices in each block, begins smaller by
        √(2 · layers): GPT-2, section 2.3 of "Language Models are Unsupervised Multitask Learners". Norms are 1.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Linear):
                addends = 2 * self.config.layers if name.endswith(("attention.output", "mlp.down")) else 1
                nn.init.normal_(module.weight, std=(module.in_features * addends) ** -0.5)
            elif isinstance(module, Experts):
                module.init_weights(2 * self.config.layers)

    def forward(self, tokens: Tensor) -> Any:
        x = self.dropout(self.embedding(tokens))
        if not self.config.experts:
            for block in self.blocks:
                x = block(x)
            return self.output(self.norm(x))
        every = 0.0
        for block in self.blocks:
            x, uneven = block(x)
            every = uneven + every
        return self.outcome(self.output(self.norm(x)), every)


class InTraining(nn.Module):
    """Two tensors in training, and the first alone in evaluation: a module, so that a traced forward asks each time."""

    def forward(self, first: Tensor, second: Tensor) -> Any:
        return (first, second) if self.training else first


class Block(nn.Module):
    """One layer, [N, T, width] to [N, T, width]: attention, then SwiGLU, each on the normalised input and added to it.

    With experts it gives how unevenly they are used besides, [N].
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.mlp: nn.Module = SwiGLU(config.width, config.hidden)
        if config.experts:
            self.mlp = MixtureOfExperts(
                config.width, config.hidden, config.experts, config.experts_per_token, config.capacity
            )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Any:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        outputs = self.mlp(self.mlp_norm(x))
        if isinstance(outputs, tuple):
            return x + self.dropout(outputs[0]), outputs[1]
        return x + self.dropout(outputs)


class Attention(nn.Module):
    """Causal self-attention, [N, T, width] to [N, T, width], with rotary positions and grouped queries.

    The number of heads is read off the projections' outputs, so that they may be sharded by heads.

    Attributes:
        positions: of the tokens in their sequence, int64 [T]; None: 0 … T − 1.
    """

    positions: Tensor | None = None

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_width, self.rope_base = config.head_width, config.rope_base
        self.grouped = config.kv_heads < config.heads
        self.query = projection(config.width, config.heads * config.head_width)
        self.key = projection(config.width, config.kv_heads * config.head_width)
        self.value = projection(config.width, config.kv_heads * config.head_width)
        self.output = projection(config.heads * config.head_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            project(x).unflatten(2, (-1, self.head_width)).transpose(1, 2)  # [N, heads, T, head_width]
            for project in (self.query, self.key, self.value)
        )
        positions = torch.arange(x.shape[1], device=x.device) if self.positions is None else self.positions
        cos, sin = rotation(positions, self.head_width, self.rope_base, x)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=self.grouped)
        return self.output(mixed.transpose(1, 2).flatten(2))


def rotation(positions: Tensor, head_width: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine, [T, head_width] each, of the angles position · base^(−2i / head_width), for `rotate`.

    They are computed where they are used: a buffer would be empty after `to_empty`, and would have to move between
    devices. In fp32, or in fp64 where `like`, on the positions' device, is fp64: bf16 cannot count beyond 256.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, head_width, 2, device=like.device, dtype=dtype) / head_width
    angles = positions.to(dtype)[:, None] * base**-exponents
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + head_width / 2) of x [N, heads, T, head_width] by their angles, in fp32 or more.

    Rolled by half, every number meets its partner: two products over the whole, and not four over halves.
    """
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)
