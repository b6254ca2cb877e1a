"""Data sets of token windows: text as bytes or through a tokenizer, token files on disk, and the digits' grey values.

A token file is what nanoGPT and llm.c write: tokens one after another, uint16 or uint32, little-endian.
nanoGPT's (https://github.com/karpathy/nanoGPT, data/*/prepare.py) hold nothing else; llm.c's
(https://github.com/karpathy/llm.c, dev/data/data_common.py) begin with 256 int32: a magic number, a version, the number
of tokens. A file is mapped into memory: a window reads its own bytes from the disk and nothing else, whatever the size.

What opens data works in NumPy: ranks may be forked from a process that has opened it, which must not have started
torch's threads.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lockstep.config.packages import require
from lockstep.data.image_files import read_digits
from lockstep.errors import UserError

CHECKED = 2**22  # tokens at each end of a file that are held to the vocabulary when it is opened
COUNTED = 2**24  # tokens that are counted at a time

HEADER = 256  # int32 at the beginning of llm.c's files
# Its magic numbers: (version, type of a token, size of the vocabulary), of GPT-2's tokens and of Llama 3's.
LLM_C: dict[int, tuple[int, np.dtype[Any], int]] = {
    20240520: (1, np.dtype("<u2"), 50_257),
    20240801: (7, np.dtype("<u4"), 128_256),
}

GREYS, SIDE = 17, 8  # of scikit-learn's digits
DIGIT_LENGTH = SIDE * SIDE
DIGIT_BEGIN = GREYS  # the token before each picture


@dataclass(frozen=True)
class Tokens:
    """Tokens as they were read: pieces that no window may span, and how many different tokens there may be."""

    pieces: list[np.ndarray]
    vocabulary: int
    source: str  # the key and its value that they come from, for messages

    @property
    def count(self) -> int:
        return sum(map(len, self.pieces))


class TokenWindows(Dataset[tuple[Tensor, Tensor]]):
    """Consecutive windows of `length` tokens: index → (inputs [length], targets [length]), int64.

    The targets are the inputs shifted by one: a piece's window i has tokens[s : s + length] and
    tokens[s + 1 : s + length + 1] with s = i · length. So each token but a piece's first is a target once, except the
    last few, which fill no window.

    Attributes:
        draws: random numbers that a window takes: none.

    Raises:
        UserError: the tokens fill no window; when a window is read: it holds a token beyond the vocabulary.
    """

    draws = 0

    def __init__(self, tokens: Tokens, length: int) -> None:
        self.tokens, self.length = tokens, length
        self._ends = list(accumulate(max(0, len(piece) - 1) // length for piece in tokens.pieces))
        if len(self) == 0:
            raise UserError(
                f"{tokens.source}: {tokens.count:,} tokens fill no window of {length:,} and the token after it; set "
                "task.sequence_length to less, or give more data"
            )

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        inputs, targets = self.fetch(torch.tensor([index]))
        return inputs[0], targets[0]

    def fetch(self, samples: Tensor, draws: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A batch at once: windows [N] to (inputs [N, length], targets [N, length]); nothing is drawn at random."""
        both = np.empty((len(samples), self.length + 1), np.int64)
        for row, index in enumerate(samples.tolist()):
            number = bisect_right(self._ends, index)
            start = (index - (self._ends[number - 1] if number else 0)) * self.length
            both[row] = self.tokens.pieces[number][start : start + self.length + 1]
        if both.size and both.max() >= self.tokens.vocabulary:
            raise beyond_vocabulary(self.tokens.source, self.tokens.vocabulary, int(both.max()))
        windows = torch.from_numpy(both)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def target_counts(self) -> np.ndarray:
        """How often each token is a target: int64 [vocabulary]. It reads all there is, a part of it at a time."""
        counts = np.zeros(self.tokens.vocabulary, np.int64)
        for piece in self.tokens.pieces:
            stop = 1 + max(0, len(piece) - 1) // self.length * self.length
            for start in range(1, stop, COUNTED):
                found = np.bincount(piece[start : min(start + COUNTED, stop)], minlength=len(counts))
                if len(found) > len(counts):
                    raise beyond_vocabulary(self.tokens.source, len(counts), len(found) - 1)
                counts += found
        return counts


def beyond_vocabulary(source: str, vocabulary: int, token: int) -> UserError:
    return UserError(
        f"{source}: holds token {token:,}, allowed are 0…{vocabulary - 1:,}; set task.vocabulary_size, or "
        "task.token_bits if its tokens have another width"
    )


def split_tail(tokens: Tokens, share: float) -> tuple[Tokens, Tokens]:
    """All tokens but the last share of them, and that share."""
    left = tokens.count - round(tokens.count * share)
    heads: list[np.ndarray] = []
    tails: list[np.ndarray] = []
    for piece in tokens.pieces:
        cut = min(left, len(piece))
        left -= cut
        heads += [piece[:cut]] if cut else []
        tails += [piece[cut:]] if cut < len(piece) else []
    return (
        Tokens(heads, tokens.vocabulary, f"{tokens.source}, without the last {100 * share:g} %"),
        Tokens(tails, tokens.vocabulary, f"{tokens.source}, the last {100 * share:g} % for evaluation"),
    )


# Text ---------------------------------------------------------------------------------------------------------------


def read_text(path: str, tokenizer: str | None, name: str = "task.text") -> Tokens:
    """A text file, or all files of a folder and of those below it, in the order of their names, hidden ones left out.

    Without a tokenizer the tokens are the bytes, 256 of them. A folder's texts are put together as they are.

    Args:
        tokenizer: a file of the `tokenizers` package (tokenizer.json). It reads a file at a time, into memory; what is
            larger than some 100 MB is better made a token file once (`write_tokens`).
        name: the key that `path` is the value of.

    Raises:
        UserError: no such file, no text in it, no UTF-8 where a tokenizer is to read it.
    """
    source = f"{name}={path}"
    files = text_files(Path(path).expanduser(), source)
    if tokenizer is None:
        pieces = [np.memmap(file, np.uint8, "r").view(np.ndarray) for file in files if file.stat().st_size]
        vocabulary = 256
    else:
        coder = load_tokenizer(tokenizer)
        pieces = [np.array(coder.encode(decoded(file), add_special_tokens=False).ids, np.uint32) for file in files]
        vocabulary = max([coder.get_vocab_size(), *(int(piece.max()) + 1 for piece in pieces if len(piece))])
    if not sum(map(len, pieces)):
        raise UserError(f"{source}: holds no text; {name} takes a text file, or a folder of them")
    return Tokens([np.concatenate(pieces)] if len(pieces) > 1 else pieces, vocabulary, source)


def text_files(path: Path, source: str) -> list[Path]:
    """The file itself, or a folder's files; raises UserError where there is none."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        if not files:
            raise UserError(
                f"{source}: a folder without files; {source.partition('=')[0]} takes a text file or a folder"
            )
        return files
    if not path.is_file():
        raise UserError(f"{source}: no such file or folder")
    return [path]


def decoded(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: no UTF-8 text (byte {error.start:,}); take it out, or set task.tokenizer=null to train on bytes"
        ) from None


def load_tokenizer(path: str) -> Any:
    """A tokenizers.Tokenizer.

    Raises:
        UserError: the package is not installed, or the file is not one of its own.
    """
    if not Path(path).expanduser().is_file():
        raise UserError(f"task.tokenizer={path}: no such file; it takes a tokenizer.json of the package tokenizers")
    require("tokenizers", f"task.tokenizer={path}")
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(Path(path).expanduser()))
    except Exception as error:  # the package raises Exception itself
        raise UserError(f"task.tokenizer={path}: no file of the package tokenizers ({str(error)[:120]})") from None


# Token files --------------------------------------------------------------------------------------------------------


def open_tokens(path: str, bits: int, vocabulary: int | None = None, name: str = "task.tokens") -> Tokens:
    """A token file, or a folder's *.bin in the order of their names, mapped and not read.

    Args:
        bits: of a token, 16 or 32, where a file has no header that says it.
        vocabulary: number of tokens; None: what the header stands for, or GPT-2's 50,257 for 16 bits.
        name: the key that `path` is the value of.

    Raises:
        UserError: no such file, an empty or truncated one, files of several kinds, or at its ends a token beyond the
            vocabulary.
    """
    source = f"{name}={path}"
    where = Path(path).expanduser()
    files = sorted(where.glob("*.bin")) if where.is_dir() else [where]
    if not files:
        raise UserError(f"{source}: a folder without .bin files")
    if not where.exists():
        raise UserError(f"{source}: no such file or folder")
    pieces, known = [], set()
    for file in files:
        piece, size = map_tokens(file, bits)
        pieces.append(piece)
        known.add(size)
    if vocabulary is None:
        if len(known) > 1:
            raise UserError(f"{source}: files of several kinds; set task.vocabulary_size to the number of all tokens")
        (vocabulary,) = known
        if vocabulary is None:
            raise UserError(f"{source}: 32-bit tokens without a header say no vocabulary; set task.vocabulary_size")
    for file, piece in zip(files, pieces, strict=True):
        largest = max(int(piece[:CHECKED].max()), int(piece[-CHECKED:].max()))
        if largest >= vocabulary:
            raise beyond_vocabulary(f"{name}={file}", vocabulary, largest)
    return Tokens(pieces, vocabulary, source)


def map_tokens(file: Path, bits: int) -> tuple[np.ndarray, int | None]:
    """(a file's tokens, mapped; the size of the vocabulary that its format stands for)."""
    size = file.stat().st_size
    if size == 0:
        raise UserError(f"{file}: an empty token file")
    dtype, vocabulary, offset = np.dtype(f"<u{bits // 8}"), 50_257 if bits == 16 else None, 0
    header = np.fromfile(file, "<i4", HEADER)
    if len(header) == HEADER and int(header[0]) in LLM_C:
        version, dtype, vocabulary = LLM_C[int(header[0])]
        offset = header.nbytes
        found = (size - offset) / dtype.itemsize
        if header[1] != version:
            raise UserError(
                f"{file}: version {header[1]} of llm.c's token files, which is not known; allowed is {version}"
            )
        if header[2] != found:
            raise UserError(
                f"{file}: {header[2]:,} tokens by its header, {found:,g} in the file: truncated, write it again"
            )
    if size == offset or (size - offset) % dtype.itemsize:
        raise UserError(
            f"{file}: {size - offset:,} bytes are no tokens of {8 * dtype.itemsize} bits each; set task.token_bits, or "
            "write it again"
        )
    return np.memmap(file, dtype, "r", offset).view(np.ndarray), vocabulary


def write_tokens(path: Path, tokens: np.ndarray, bits: int = 16) -> None:
    """Write a token file without a header: little-endian, `bits` (16 or 32) each."""
    if tokens.min() < 0 or int(tokens.max()) >= 2**bits:
        raise ValueError(f"tokens {tokens.min()}…{tokens.max()} do not fit into {bits} bits")
    tokens.astype(f"<u{bits // 8}").tofile(path)


# Digits -------------------------------------------------------------------------------------------------------------


def digit_tokens() -> tuple[Tokens, Tokens]:
    """scikit-learn's digits, row by row, as 64 tokens of 17 grey values: 1,437 to train on, 360 to evaluate.

    Before each picture stands DIGIT_BEGIN, so that its first pixel is predicted as well: 65 tokens a picture.
    """

    def flatten(images: np.ndarray) -> Tokens:
        greys = np.rint(images.reshape(-1, DIGIT_LENGTH) * ((GREYS - 1) / 255)).astype(np.uint8)
        return Tokens(list(np.insert(greys, 0, DIGIT_BEGIN, axis=1)), GREYS + 1, "task.data=digits")

    (train, _), (test, _) = read_digits()
    return flatten(train), flatten(test)
