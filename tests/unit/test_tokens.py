"""Windows of tokens: they cover what is there, read no more than they need, and say what is wrong with a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, models, pre_tokenizers

from lockstep.data.tokens import (
    DIGIT_BEGIN,
    Tokens,
    TokenWindows,
    digit_tokens,
    open_tokens,
    read_text,
    split_tail,
    write_tokens,
)
from lockstep.errors import UserError

TEXT = "one two three two one. " * 40


def held(sizes: list[int], vocabulary: int = 10_000) -> Tokens:
    """Pieces of 0, 1, 2, … counted through."""
    starts = np.cumsum([0, *sizes[:-1]])
    pieces = [np.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    return Tokens(pieces, vocabulary, "task.text=x")


# Windows --------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(1, 9))
def test_windows_cover_each_piece_once_and_span_none(sizes: list[int], length: int) -> None:
    tokens = held(sizes)
    if all(size <= length for size in sizes):
        with pytest.raises(UserError, match="fill no window"):
            TokenWindows(tokens, length)
        return
    windows = TokenWindows(tokens, length)
    found = [windows[index] for index in range(len(windows))]
    assert all(torch.equal(inputs + 1, targets) for inputs, targets in found), "the number after each"
    order = torch.arange(len(windows)).flip(0)
    for at_once, each in zip(windows.fetch(order), zip(*found[::-1], strict=True), strict=True):
        assert torch.equal(at_once, torch.stack(each))
    assert all(inputs.dtype == targets.dtype == torch.int64 for inputs, targets in found)
    expected = [piece[1 : 1 + (len(piece) - 1) // length * length] for piece in tokens.pieces]
    assert torch.cat([targets for _, targets in found]).tolist() == np.concatenate(expected).tolist()
    assert len(windows.target_counts()) == 10_000, "those that are never seen included"
    assert windows.target_counts().sum() == len(windows) * length
    assert windows.target_counts().nonzero()[0].tolist() == np.concatenate(expected).tolist()


@pytest.mark.parametrize("index", [-1, 3])
def test_there_is_no_window_beyond_the_last(index: int) -> None:
    windows = TokenWindows(held([13]), 4)
    assert len(windows) == 3
    with pytest.raises(IndexError):
        windows[index]
    assert len(list(windows)) == 3, "a for loop ends"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.floats(0.01, 0.99))
def test_a_tail_is_split_off_without_losing_a_token(sizes: list[int], share: float) -> None:
    head, tail = split_tail(held(sizes), share)
    both = [piece for tokens in (head, tail) for piece in tokens.pieces]
    assert np.concatenate(both).tolist() == list(range(sum(sizes)))
    assert abs(tail.count - share * sum(sizes)) <= 0.5
    assert all(len(piece) for piece in both)


# Text -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    words = {word: number for number, word in enumerate(["?", "one", "two", "three", "."])}
    made = Tokenizer(models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


def test_a_text_is_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT + "ü")
    tokens = read_text(str(tmp_path / "text"), None)
    assert (tokens.vocabulary, len(tokens.pieces)) == (256, 1)
    assert bytes(tokens.pieces[0]).decode() == TEXT + "ü"


def test_a_folder_is_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "deep" / ".git").mkdir(parents=True)
    for name, text in {"b": "second", "a": "first ", "deep/c": " third", ".hidden": "x", "deep/.git/d": "x"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "aa").touch()
    assert bytes(read_text(str(tmp_path), None).pieces[0]) == b"first second third"


def test_a_tokenizer_makes_words_of_it(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "text").write_text(TEXT)
    tokens = read_text(str(tmp_path / "text"), tokenizer)
    assert tokens.pieces[0].tolist() == [1, 2, 3, 2, 1, 4] * 40
    assert tokens.vocabulary == 5


# Token files ----------------------------------------------------------------------------------------------------------


def llm_c(path: Path, tokens: np.ndarray, magic: int, version: int, bits: int, count: int | None = None) -> Path:
    """A file as llm.c's data_common.py writes it."""
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + tokens.astype(f"<u{bits // 8}").tobytes())
    return path


@pytest.mark.parametrize("bits", [16, 32])
def test_a_token_file_without_a_header(tmp_path: Path, bits: int) -> None:
    numbers = np.array([0, 1, 2**bits - 1, 7, 5])
    write_tokens(tmp_path / "x.bin", numbers, bits)
    assert (tmp_path / "x.bin").stat().st_size == 5 * bits // 8
    tokens = open_tokens(str(tmp_path / "x.bin"), bits, 2**bits)
    assert tokens.pieces[0].tolist() == numbers.tolist()
    inputs, targets = TokenWindows(tokens, 4)[0]
    assert (inputs.tolist(), targets.tolist()) == (numbers[:4].tolist(), numbers[1:].tolist())
    with pytest.raises(ValueError, match="do not fit"):
        write_tokens(tmp_path / "y.bin", np.array([2**bits]), bits)


@pytest.mark.parametrize(
    ("magic", "version", "bits", "vocabulary"), [(20240520, 1, 16, 50_257), (20240801, 7, 32, 128_256)]
)
def test_llm_c_s_header_says_width_and_vocabulary(
    tmp_path: Path, magic: int, version: int, bits: int, vocabulary: int
) -> None:
    path = llm_c(tmp_path / "x.bin", np.array([5, 50_256, 3]), magic, version, bits)
    for asked in (16, 32):
        tokens = open_tokens(str(path), asked)
        assert tokens.pieces[0].tolist() == [5, 50_256, 3]
        assert tokens.vocabulary == vocabulary


def test_a_folder_of_token_files_is_pieces(tmp_path: Path) -> None:
    for number in range(3):
        write_tokens(tmp_path / f"shard_{number}.bin", np.arange(10) + 10 * number)
    windows = TokenWindows(open_tokens(str(tmp_path), 16), 4)
    assert len(windows) == 6
    assert [inputs[0].item() for inputs, _ in windows] == [0, 4, 10, 14, 20, 24]  # type: ignore[attr-defined]


def test_a_file_larger_than_the_memory_is_not_read(tmp_path: Path) -> None:
    """A terabyte of zeros that takes no room on the disk, with three tokens in its middle."""
    path, place = tmp_path / "huge.bin", 2**38
    with path.open("wb") as stream:
        stream.truncate(2**40)
        stream.seek(2 * place)
        stream.write(np.array([7, 8, 9], "<u2").tobytes())
    tokens = open_tokens(str(path), 16)
    train, evaluation = (TokenWindows(part, 1024) for part in split_tail(tokens, 0.1))
    assert len(train) + len(evaluation) == pytest.approx(2**39 / 1024, abs=2)
    inputs, targets = train[place // 1024]
    assert inputs[:4].tolist() == [7, 8, 9, 0]
    assert targets[:3].tolist() == [8, 9, 0]
    assert evaluation[len(evaluation) - 1][0].sum() == 0


def test_a_token_beyond_the_vocabulary_is_named_where_it_is_read(tmp_path: Path) -> None:
    numbers = np.zeros(3 * 2**22, np.int64)
    numbers[3 * 2**21 + 2] = 60_000  # beyond what is looked at when a file is opened
    write_tokens(tmp_path / "x.bin", numbers)
    windows = TokenWindows(open_tokens(str(tmp_path / "x.bin"), 16), 8)
    assert windows[0][0].sum() == 0
    for read in (lambda: windows[3 * 2**21 // 8], windows.target_counts):
        with pytest.raises(
            UserError, match=r"x.bin: holds token 60,000, allowed are 0…50,256; set task.vocabulary_size"
        ):
            read()


# Digits ---------------------------------------------------------------------------------------------------------------


def test_the_digits_are_scikit_learn_s_row_by_row() -> None:
    train, test = digit_tokens()
    assert (len(TokenWindows(train, 64)), len(TokenWindows(test, 64))) == (1437, 360)
    inputs, targets = TokenWindows(train, 64)[7]
    assert inputs[0] == DIGIT_BEGIN
    assert torch.equal(inputs[1:], targets[:-1])
    pictures = sorted(tuple(piece[1:].tolist()) for piece in train.pieces + test.pieces)
    assert pictures == sorted(tuple(int(value) for value in row) for row in load_digits().data)


# Bad input ------------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no such text": (lambda at: read_text(f"{at}/no", None), ["task.text=", "no such file or folder"]),
    "an empty text": (lambda at: read_text(f"{at}/empty", None), ["task.text=", "holds no text"]),
    "an empty folder": (lambda at: read_text(f"{at}/folder", None), ["task.text=", "a folder without files"]),
    "no such tokenizer": (lambda at: read_text(f"{at}/text", f"{at}/no"), ["task.tokenizer=", "no such file"]),
    "not a tokenizer": (
        lambda at: read_text(f"{at}/text", f"{at}/odd.json"),
        ["task.tokenizer=", "no file of the package tokenizers"],
    ),
    "no UTF-8": (
        lambda at: read_text(f"{at}/bytes", f"{at}/tokenizer.json"),
        ["bytes: no UTF-8 text (byte 3)", "task.tokenizer=null"],
    ),
    "no such tokens": (lambda at: open_tokens(f"{at}/no.bin", 16), ["task.tokens=", "no such file or folder"]),
    "no tokens": (lambda at: open_tokens(f"{at}/empty", 16), ["an empty token file"]),
    "a folder without tokens": (lambda at: open_tokens(f"{at}/folder", 16), ["a folder without .bin files"]),
    "half a token": (
        lambda at: open_tokens(f"{at}/odd.bin", 16),
        ["5 bytes are no tokens of 16 bits", "task.token_bits"],
    ),
    "no vocabulary": (lambda at: open_tokens(f"{at}/wide.bin", 32), ["32-bit tokens", "set task.vocabulary_size"]),
    "a token too many": (lambda at: open_tokens(f"{at}/wide.bin", 32, 9), ["holds token 9, allowed are 0…8"]),
    "another width": (lambda at: open_tokens(f"{at}/wide.bin", 16, 9), ["holds token 9", "task.token_bits"]),
    "a truncated file": (lambda at: open_tokens(f"{at}/cut.bin", 16), ["7 tokens by its header, 3 in the file"]),
    "another version": (lambda at: open_tokens(f"{at}/new.bin", 16), ["version 2 of llm.c's", "allowed is 1"]),
    "too short": (lambda at: TokenWindows(read_text(f"{at}/text", None), 99), ["5 tokens fill no window of 99"]),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line_that_names_it(tmp_path: Path, tokenizer: str, what: str) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "odd.json").write_text(json.dumps({"no": "tokenizer"}))
    (tmp_path / "bytes").write_bytes(b"abc\xff")
    (tmp_path / "odd.bin").write_bytes(b"12345")
    write_tokens(tmp_path / "wide.bin", np.array([9, 9]), 32)
    llm_c(tmp_path / "cut.bin", np.arange(3), 20240520, 1, 16, count=7)
    llm_c(tmp_path / "new.bin", np.arange(3), 20240520, 2, 16)
    call, parts = BAD[what]
    with pytest.raises(UserError) as caught:
        call(tmp_path)
    said = str(caught.value)
    assert all(part in said for part in parts), said
    assert "\n" not in said
