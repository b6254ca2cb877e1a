r"""A GPT on your own text file: every line is a sample, so samples are of unequal length.

What that takes stands in three methods: `collate` fills lines up to the longest of the batch, `weigh` says how many
characters of a batch count, and `loss` is their mean. Each character then weighs the same, however lines are dealt out
to ranks and micro-batches.

    python -m recipes.ddp task=examples/text_gpt.py:TextGpt task.file=README.md global_batch_size=16 \
        optim=adamw optim.lr=0.003

and the same for recipes.fsdp, or cut in two by recipes.pipeline_parallel.

Expect: about 4.0 bits per byte of the README after 6 epochs (`epochs=6`), in less than a minute on two CPU cores; a byte
by itself has 8.
Source: https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf (GPT-2)
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lockstep import UserError

IGNORED = -100  # a target that does not count
END = 0  # the byte that ends a line; no text holds it


@dataclass
class TextGpt:
    file: str  # task.file=PATH
    width: int = 64
    depth: int = 3
    heads: int = 4
    length: int = 128  # of the longest sample, in bytes: a longer line becomes several

    lower_is_better = ("bits_per_byte",)
    best = "bits_per_byte"
    unit = "lines"

    def __post_init__(self) -> None:
        path = Path(self.file).expanduser()
        if not path.is_file():
            raise UserError(f"task.file={self.file}: no such file")
        most = self.length - 1
        lines = [
            line[begin : begin + most]
            for line in map(bytes.strip, path.read_bytes().splitlines())
            for begin in range(0, len(line), most)
        ]
        self.train_set = [line for number, line in enumerate(lines) if number % 10]
        self.eval_set = lines[::10]

    def build_model(self) -> nn.Module:
        return Gpt(self.width, self.depth, self.heads, self.length)

    def collate(self, lines: list[bytes]) -> tuple[Tensor, Tensor]:
        """Inputs [N, T] and targets [N, T]: each byte's target is the next one; T is the longest line's length + 1."""
        rows = [torch.tensor([END, *line, END]) for line in lines]
        inputs = nn.utils.rnn.pad_sequence([row[:-1] for row in rows], batch_first=True, padding_value=END)
        targets = nn.utils.rnn.pad_sequence([row[1:] for row in rows], batch_first=True, padding_value=IGNORED)
        return inputs, targets

    def weigh(self, targets: Tensor) -> Tensor:
        return (targets != IGNORED).sum()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        count = self.weigh(targets)
        return {"bits_per_byte": (self.loss(outputs, targets) * count / math.log(2), count)}


class Gpt(nn.Module):
    """Bytes [N, T] to logits [N, T, 256] of the byte that comes next."""

    def __init__(self, width: int, depth: int, heads: int, length: int) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.output = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.bytes(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.output(self.norm(x))


class Block(nn.Module):
    """Attention to all bytes before, then a perceptron of each byte's own: [N, T, width] to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.query_key_value(self.before(x)).unflatten(2, (3, self.heads, -1)).unbind(2)
        heads = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True
        )
        x = x + self.mix(heads.transpose(1, 2).flatten(2))
        return x + self.mlp(self.after(x))
