"""`task=language`: a small Llama-style GPT that predicts the next token, of the digits, of text, or of token files.

    python -m recipes.ddp task=language optim=adamw optim.lr=3e-3 optim.warmup_steps=30 global_batch_size=48
    python -m recipes.ddp task=language task.data=text task.text=my.txt optim=adamw

Expect of the first, with 15 epochs on two CPU cores: about 1.87 bits per token, 1.95 at most, in about a minute. The
baseline is `unigram_bits`, what the frequencies of the tokens alone say of the next one: 2.98.
The loss is a mean over tokens; a target of −100 counts as none. With `task.experts=8` the blocks are mixtures of experts
(lockstep.models.experts), and in training the loss has their balance besides, weighted as the tokens are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lockstep.config.keys import key
from lockstep.data.tokens import (
    DIGIT_BEGIN,
    DIGIT_LENGTH,
    GREYS,
    SIDE,
    Tokens,
    TokenWindows,
    digit_tokens,
    load_tokenizer,
    open_tokens,
    read_text,
    split_tail,
)
from lockstep.errors import UserError
from lockstep.models.generate import generate
from lockstep.models.gpt import GPT, GPT_SIZES, GPTConfig, gpt_config
from lockstep.utils.text import divisors

IGNORED = -100  # a target that is none: cross_entropy's own ignore_index
SHADES = " .,:;-~=+*o%#&8@█"  # of a digit's grey values, from 0 up
PROMPT = 32  # tokens that a sample of text begins with


def window_length(asked: int | None, data: str) -> int:
    """Tokens of a sample, where `task.sequence_length` may leave it to the kind of data."""
    return asked or (DIGIT_LENGTH if data == "digits" else 256)


@dataclass
class Language:
    """A GPT and its tokens. Its fields are the keys `task.*`.

    Attributes:
        train_set, eval_set: TokenWindows: index → (inputs [sequence_length], targets [sequence_length]), int64.
        vocabulary: number of tokens.
        length: tokens of a window, the longest sequence that the model sees.

    Raises:
        UserError: a key contradicts another, or the data is not what its format says.
    """

    size: str = key("nano", "of the model (docstring of lockstep.models.gpt)", tuple(GPT_SIZES))
    kv_heads: int | None = key(
        None, "heads of keys and values; they divide the heads of the queries (null: what the size has)", minimum=1
    )
    experts: int = key(
        0, "SwiGLUs in each block, of which a token goes through some (0: one, for all)", minimum=0, maximum=4096
    )
    experts_per_token: int = key(2, "of the experts, with task.experts", minimum=1)
    capacity: float | None = key(
        None,
        "tokens of a sequence that an expert trains on, as a multiple of an equal share (null: all that come)",
        maximum=10**6,
    )
    balance: float = key(0.01, "weight in the loss of how unevenly the experts are used", minimum=0, maximum=10**6)
    data: str = key(
        "digits", "what is read: 8 × 8 digits as 64 grey values, text, or token files", ("digits", "text", "tokens")
    )
    text: str | None = key(None, "data=text: a text file, or a folder of them", free=True)
    eval_text: str | None = key(None, "data=text: the same, to evaluate on (null: the last eval_share)", free=True)
    tokens: str | None = key(None, "data=tokens: a file of uint16 or uint32 tokens, or a folder of *.bin", free=True)
    eval_tokens: str | None = key(None, "data=tokens: the same, to evaluate on (null: the last eval_share)", free=True)
    eval_share: float = key(0.1, "share at the end of text or tokens that is evaluated on", minimum=0)
    tokenizer: str | None = key(
        None,
        "tokenizer.json of the package tokenizers (null: text is read as bytes, tokens are shown as numbers)",
        free=True,
    )
    token_bits: int = key(16, "data=tokens: width of a token where the file has no header that says it", (16, 32))
    vocabulary_size: int | None = key(
        None,
        "data=tokens: number of tokens (null: the tokenizer's, or what the file's format stands for)",
        minimum=1,
        maximum=2**24,
    )
    sequence_length: int | None = key(None, "tokens of a sample (null: digits 64, else 256)", minimum=1, maximum=2**24)
    dropout: float = key(
        0.0, "share of the numbers dropped in training, after the embedding and each half block", minimum=0
    )
    samples: int = key(
        2, "samples that the trained model writes at the end (0: none)", minimum=0, maximum=1000, free=True
    )
    sample_tokens: int = key(128, "tokens of such a sample of text", minimum=1, maximum=100_000, free=True)
    temperature: float = key(
        1.0, "of the samples: 0 takes the likeliest token, above 1 is more random", minimum=0, maximum=10**6, free=True
    )

    defaults: ClassVar[dict[str, Any]] = {
        "optim": "adamw",
        "optim.lr": 3e-3,
        "optim.warmup_steps": 30,
        "global_batch_size": 48,
    }
    unit: ClassVar[str] = "sequences"
    lower_is_better: ClassVar[tuple[str, ...]] = ("bits_per_token",)
    best: ClassVar[str] = "bits_per_token"

    def __post_init__(self) -> None:
        self._check()
        train, evaluation = self._read()
        self.vocabulary = max(train.vocabulary, evaluation.vocabulary)
        self.tokens_per_sample = self.length = window_length(self.sequence_length, self.data)
        self.train_set, self.eval_set = (
            TokenWindows(replace(tokens, vocabulary=self.vocabulary), self.length) for tokens in (train, evaluation)
        )

    def _read(self) -> tuple[Tokens, Tokens]:
        """The tokens to train on, and those to evaluate on."""
        if self.data == "digits":
            return digit_tokens()
        if self.data == "text":
            train = read_text(str(self.text), self.tokenizer)
            if self.eval_text is not None:
                return train, read_text(self.eval_text, self.tokenizer, "task.eval_text")
        else:
            known = self.vocabulary_size
            if known is None and self.tokenizer is not None:
                known = load_tokenizer(self.tokenizer).get_vocab_size()
            train = open_tokens(str(self.tokens), self.token_bits, known)
            if self.eval_tokens is not None:
                return train, open_tokens(self.eval_tokens, self.token_bits, train.vocabulary, "task.eval_tokens")
        return split_tail(train, self.eval_share)

    def _check(self) -> None:
        """What one key says against another."""
        for name, kind in {"text": "text", "eval_text": "text", "tokens": "tokens", "eval_tokens": "tokens"}.items():
            if getattr(self, name) is not None and self.data != kind:
                raise UserError(
                    f"task.{name}={getattr(self, name)}: is read with task.data={kind}, and not with {self.data}"
                )
        if self.data != "digits" and getattr(self, self.data) is None:
            what = (
                "a text file or a folder of them" if self.data == "text" else "a file of tokens, or a folder of *.bin"
            )
            raise UserError(f"task.data={self.data} needs task.{self.data}: {what}")
        if self.data == "digits" and self.sequence_length not in (None, DIGIT_LENGTH):
            raise UserError(
                f"task.sequence_length={self.sequence_length}: a digit has {DIGIT_LENGTH} tokens; allowed is null"
            )
        if self.data == "digits" and self.tokenizer is not None:
            raise UserError(f"task.tokenizer={self.tokenizer}: reads text; set task.data=text")
        if self.data != "tokens" and self.vocabulary_size is not None:
            raise UserError(f"task.vocabulary_size={self.vocabulary_size}: is asked for with task.data=tokens alone")
        heads = GPT_SIZES[self.size].heads
        if self.kv_heads is not None and heads % self.kv_heads:
            allowed = divisors(heads)
            raise UserError(f"task.kv_heads={self.kv_heads}: does not divide the {heads} heads; allowed are {allowed}")
        self._check_experts()
        if not 0 < self.eval_share < 1:
            raise UserError(f"task.eval_share={self.eval_share}: allowed are numbers above 0 and below 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"task.dropout={self.dropout}: allowed are numbers from 0 up, below 1")

    def _check_experts(self) -> None:
        if self.experts and self.experts_per_token > self.experts:
            raise UserError(
                f"task.experts_per_token={self.experts_per_token}: there are only task.experts={self.experts}; allowed are "
                f"1…{self.experts}"
            )
        if self.capacity is not None and not self.experts:
            raise UserError(f"task.capacity={self.capacity}: is an expert's; set task.experts=8, or leave it out")
        if self.capacity is not None and not self.capacity > 0:
            raise UserError(f"task.capacity={self.capacity}: allowed are null and numbers above 0, such as 1.25")

    def build_model(self) -> nn.Module:
        """Tokens [N, T ≤ length] to logits [N, T, vocabulary]; the weights are drawn from torch's global generator."""
        return GPT(self._shape())

    def _shape(self) -> GPTConfig:
        shape = gpt_config(self.size, self.vocabulary, self.dropout, self.kv_heads)
        per_token = self.experts_per_token
        return replace(shape, experts=self.experts, experts_per_token=per_token, capacity=self.capacity)

    def blocks(self, model: nn.Module) -> list[str]:
        """Names of the modules that the model is made of one after the other, which may be sharded or cut between."""
        return [f"blocks.{number}" for number in range(len(model.get_submodule("blocks")))]  # type: ignore[arg-type]

    def tensor_parallel_plan(self, model: nn.Module) -> dict[str, str]:
        """How ranks share the model's layers: Megatron's columns and rows; lockstep.parallel.tensor_plan has the words."""
        if self.experts:
            raise UserError(
                f"task.experts={self.experts}: its ranks share layers that all tokens go through; use "
                "recipes.expert_parallel, or set task.experts=0"
            )
        attention = {"query": "columns", "key": "columns", "value": "columns", "output": "rows"}
        mlp = {"gate": "columns", "up": "columns", "down": "rows"}
        block = {"attention_norm": "whole", "attention": "gather", "mlp_norm": "whole", "mlp": "gather"}
        block |= {f"attention.{name}": role for name, role in attention.items()}
        block |= {f"mlp.{name}": role for name, role in mlp.items()}
        blocks = {f"blocks.*.{name}": role for name, role in block.items()}
        return {"": "causal", "embedding": "embedding", **blocks, "norm": "whole", "output": "output"}

    def tensor_parallel_counts(self, model: nn.Module) -> dict[str, int]:
        """What each rank must have an equal share of."""
        shape = cast(GPT, model).config
        return {"heads": shape.heads, "kv_heads": shape.kv_heads, "hidden": shape.hidden}

    def context_parallel_modules(self, model: nn.Module) -> list[str]:
        """What looks beyond a position; lockstep.parallel.context_plan says what follows."""
        if self.experts:
            raise UserError(
                f"task.experts={self.experts}: their balance is of whole sequences, of which a rank has some positions "
                "here; use recipes.expert_parallel, or set task.experts=0"
            )
        return ["blocks.*.attention"]

    def expert_parallel_modules(self, model: nn.Module) -> list[str]:
        """What holds experts; lockstep.parallel.expert_plan says what they are like."""
        if not self.experts:
            raise UserError(
                "task.experts=0: a dense model has no experts to cut; set task.experts=8, or use recipes.ddp"
            )
        return ["blocks.*.mlp.experts"]

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of logits [N, T, V] over the targets [N, T] that count; 0 where none does.

        Of (logits, unevenness [N]) the latter is added with `balance` as its weight, as a mean over the same targets:
        each has its sequence's. So it has the loss's own denominator, whatever the batch is cut into.
        """
        logits, uneven = outputs if isinstance(outputs, tuple) else (outputs, None)
        total = token_losses(logits, targets).sum()
        if uneven is not None:
            total = total + self.balance * (uneven * (targets != IGNORED).sum(-1)).sum()
        return total / self.weigh(targets).clamp(min=1)

    def weigh(self, targets: Tensor) -> Tensor:
        """Number of targets that count: what the loss is a mean over."""
        return (targets != IGNORED).sum()

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Cross-entropy in bits, and how often the likeliest token was the right one: sums over tokens, and their number."""
        count = self.weigh(targets)
        bits = token_losses(outputs, targets).double().sum() / math.log(2)
        right = (outputs.argmax(-1) == targets).sum()  # an ignored target is no token's number
        return {"bits_per_token": (bits, count), "token_accuracy": (right, count)}

    def describe(self) -> tuple[str, str]:
        """(the model, the data) in words."""
        where = {"digits": "digits", "text": self.text, "tokens": self.tokens}[self.data]
        model = f"GPT {self.size}"
        if self.experts:
            model += f", {self.experts_per_token} of {self.experts} experts per token"
        return model, f"{where}, {self.length:,} of {self.vocabulary:,} tokens a sequence"

    def show(self, model: nn.Module) -> str:
        """Samples that the model writes, as text: digits drawn in characters, or text after the beginning of a window.

        On all ranks of a sharded model together: every one of them makes the same forwards.
        """
        if self.samples == 0:
            return ""
        if self.data == "digits":
            begin = torch.full((self.samples, 1), DIGIT_BEGIN)
            written = generate(model, begin, DIGIT_LENGTH, self.length, self.temperature)
            return draw_digits(written[:, 1:])
        count = min(self.samples, len(self.eval_set))
        places = [len(self.eval_set) * number // count for number in range(count)]
        prompts = torch.stack([self.eval_set[place][0] for place in places])[:, :PROMPT]
        written = generate(model, prompts, self.sample_tokens, self.length, self.temperature)
        decode = self._decoder()
        return "\n\n".join(
            f"{decode(row[: prompts.shape[1]])} ▸ {decode(row[prompts.shape[1] :])}" for row in written.tolist()
        )

    def _decoder(self) -> Any:
        """Tokens, a list of numbers, → text."""
        if self.tokenizer is not None:
            return load_tokenizer(self.tokenizer).decode
        if self.data == "text":
            return lambda tokens: bytes(tokens).decode("utf-8", errors="replace")
        return lambda tokens: " ".join(map(str, tokens))


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of each token, [N · T]; 0 where the target is ignored. In fp32, or fp64 from fp64."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="none")


def unigram_bits(train_set: TokenWindows, eval_set: TokenWindows) -> float:
    """Bits per token of the evaluation set's targets under the training set's frequencies, each token seen once more.

    It is the trivial baseline: all that can be said of a token without looking at those before it.
    """
    seen = train_set.target_counts() + 1.0
    counts = eval_set.target_counts()
    return float(-(counts * np.log2(seen / seen.sum())).sum() / counts.sum())


def draw_digits(tokens: Tensor) -> str:
    """Digits [N, 64] of 0…16 side by side, a grey value as two characters; what is no grey value as ?."""
    pictures = tokens.view(-1, SIDE, SIDE).tolist()
    lines = (
        "   ".join("".join(2 * SHADES[grey] if grey < GREYS else "??" for grey in picture[row]) for picture in pictures)
        for row in range(SIDE)
    )
    return "\n".join(line.rstrip() for line in lines)
