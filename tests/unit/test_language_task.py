"""`task=language`: its loss and metrics by hand, its keys, and that a nano GPT learns the digits in a plain loop."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.utils.data import DataLoader

from lockstep.config.check import check_rules
from lockstep.data.tokens import Tokens, TokenWindows, write_tokens
from lockstep.errors import UserError
from lockstep.tasks.language import SHADES, Language, draw_digits, unigram_bits


@pytest.fixture(scope="module")
def digits() -> Language:
    return Language()


# Loss and metrics -----------------------------------------------------------------------------------------------------

PROBABILITIES = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]])


def answers(targets: list[list[int]], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(logits [N, 2, 4] of PROBABILITIES for each sample, targets [N, 2])."""
    return PROBABILITIES.log().to(dtype).expand(len(targets), 2, 4), torch.tensor(targets)


def test_bits_per_token_by_hand(digits: Language) -> None:
    """−log2 of 1/2, 1/4, 1/8 and 1/4; the first target is the likeliest token twice, which of four equal ones is 0."""
    logits, targets = answers([[0, 1], [2, 0]])
    found = digits.metrics(logits, targets)
    assert found.keys() == {"bits_per_token", "token_accuracy"}
    assert [float(value) for value in found["bits_per_token"]] == pytest.approx([1 + 2 + 3 + 2, 4], abs=1e-6)
    assert [float(value) for value in found["token_accuracy"]] == [2, 4]
    assert found["bits_per_token"][0].dtype == torch.float64
    assert digits.loss(logits, targets).item() == pytest.approx(8 / 4 * math.log(2), abs=1e-6)


def test_ignored_targets_count_as_nothing(digits: Language) -> None:
    logits, targets = answers([[0, -100], [2, -100]])
    assert digits.weigh(targets) == 2
    assert digits.weigh(targets).shape == ()
    assert digits.loss(logits, targets).item() == pytest.approx((1 + 3) / 2 * math.log(2), abs=1e-6)
    found = digits.metrics(logits, targets)
    assert [float(value) for value in found["bits_per_token"]] == pytest.approx([4, 2], abs=1e-6)
    assert [float(value) for value in found["token_accuracy"]] == [1, 2]


def test_a_batch_without_targets_has_no_loss_and_no_gradient(digits: Language) -> None:
    """A micro-batch may be all padding: a 0 / 0 would make the whole step's gradients not finite."""
    logits, targets = answers([[-100, -100]])
    logits = logits.clone().requires_grad_()
    loss = digits.loss(logits, targets)
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_weighed_losses_of_ragged_parts_add_up_to_the_whole_s(digits: Language) -> None:
    logits = torch.randn(4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(6, (4, 5), generator=torch.Generator().manual_seed(1))
    for row, length in enumerate((5, 2, 3, 1)):
        targets[row, length:] = -100
    parts = [(logits[start:stop], targets[start:stop]) for start, stop in ((0, 1), (1, 4))]
    weighed = sum(digits.loss(*part) * digits.weigh(part[1]) for part in parts) / digits.weigh(targets)
    assert torch.allclose(torch.as_tensor(weighed), digits.loss(logits, targets), atol=1e-14)
    counted = targets.flatten() != -100
    plain = F.cross_entropy(logits.flatten(0, 1)[counted], targets.flatten()[counted])
    assert torch.allclose(digits.loss(logits, targets), plain, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_short_logits_have_a_loss_in_fp32(digits: Language, dtype: torch.dtype) -> None:
    assert digits.loss(*answers([[0, 1]], dtype)).dtype == torch.float32


def test_the_unigram_baseline_by_hand() -> None:
    """Training targets 1, 1, 2 of 4 tokens, each seen once more: 1/7, 3/7, 2/7, 1/7; evaluated on 1, 2, 3."""
    train, evaluation = (
        TokenWindows(Tokens([np.array(numbers)], 4, "task.text=x"), 3) for numbers in ([0, 1, 1, 2], [0, 1, 2, 3])
    )
    expected = -(math.log2(3 / 7) + math.log2(2 / 7) + math.log2(1 / 7)) / 3
    assert unigram_bits(train, evaluation) == pytest.approx(expected)


# The model ------------------------------------------------------------------------------------------------------------


def test_the_model_fits_its_data(digits: Language) -> None:
    torch.manual_seed(0)
    model = digits.build_model()
    assert digits.describe() == ("GPT nano", "digits, 64 of 18 tokens a sequence")
    inputs, targets = digits.eval_set.fetch(torch.arange(100))
    logits = model(inputs)
    assert logits.shape == (100, 64, 18)
    assert digits.loss(logits, targets).item() == pytest.approx(math.log(18) + 0.5, abs=0.5), (
        "it begins knowing nothing"
    )
    names = digits.blocks(model)
    assert names == ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]
    assert all(isinstance(model.get_submodule(name), nn.Module) for name in names)


@pytest.mark.slow
def test_a_nano_gpt_learns_the_digits(digits: Language) -> None:
    """Two epochs of a plain loop get from the unigram baseline's 2.98 bits to 2.6 or less; 15 to 1.9."""
    torch.manual_seed(0)
    model, steps = digits.build_model(), 58
    optimizer = AdamW(model.parameters(), lr=3e-3)
    order = torch.Generator().manual_seed(0)
    seen = 0
    for _ in range(2):
        for inputs, targets in DataLoader(digits.train_set, 48, shuffle=True, drop_last=True, generator=order):
            seen += 1
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * min(seen / 15, (steps - seen + 1) / (steps - 15))
            digits.loss(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        batches = [(model(inputs), targets) for inputs, targets in DataLoader(digits.eval_set, 120)]
    sums = [digits.metrics(*batch)["bits_per_token"] for batch in batches]
    bits = float(sum(total for total, _ in sums) / sum(count for _, count in sums))
    baseline = unigram_bits(digits.train_set, digits.eval_set)
    assert baseline == pytest.approx(2.978, abs=1e-3)
    assert bits < baseline - 0.35, bits


# Samples --------------------------------------------------------------------------------------------------------------


class Reciter(nn.Module):
    """After token t comes the one that follows it in a text where no token occurs twice."""

    def __init__(self, following: dict[int, int], vocabulary: int) -> None:
        super().__init__()
        table = torch.zeros(vocabulary, vocabulary)
        for token, after in following.items():
            table[token, after] = 100
        self.table = nn.Parameter(table)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.table)


def test_digits_are_drawn_in_characters() -> None:
    assert len(set(SHADES)) == 17
    picture = torch.zeros(2, 64, dtype=torch.int64)
    picture[0, 0], picture[0, 9], picture[1, 63], picture[1, 0] = 16, 1, 5, 17
    lines = draw_digits(picture).split("\n")
    assert len(lines) == 8
    assert lines[0] == "██" + " " * 14 + "   " + "??"
    assert lines[1] == "  .."
    assert lines[7] == " " * 33 + 2 * SHADES[5]


def test_it_shows_digits(digits: Language) -> None:
    following = {17: 0} | {grey: min(16, grey + 1) for grey in range(17)}
    assert digits.show(Reciter(following, 18)) == draw_digits(torch.arange(64).clamp(max=16).expand(2, 64))
    assert Language(samples=0).show(nn.Identity()) == ""


def test_it_shows_text_after_the_beginning_of_a_window(tmp_path: Path) -> None:
    letters = "".join(map(chr, range(32, 127)))
    (tmp_path / "text").write_text(letters * 10)
    task = Language(data="text", text=str(tmp_path / "text"), sequence_length=40, samples=2, sample_tokens=5)
    following = {ord(a): ord(b) for a, b in zip(letters, letters[1:] + letters[:1], strict=True)}
    said = task.show(Reciter(following, 256)).split("\n\n")
    assert len(said) == 2
    for sample in said:
        prompt, written = sample.split(" ▸ ")
        assert len(prompt) == 32
        assert prompt + written in letters * 3
        assert len(written) == 5


def test_it_shows_tokens_as_numbers_or_by_their_tokenizer(tmp_path: Path) -> None:
    made = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    write_tokens(tmp_path / "x.bin", np.arange(300) % 3)
    keys = {"data": "tokens", "tokens": str(tmp_path / "x.bin"), "sequence_length": 3, "samples": 1, "sample_tokens": 2}
    for more, shown in (
        ({"vocabulary_size": 3}, "0 1 2 ▸ 0 1"),
        ({"tokenizer": str(tmp_path / "tokenizer.json")}, "a b c ▸ a b"),
    ):
        task = Language(**keys, **more)  # type: ignore[arg-type]
        assert task.vocabulary == 3
        assert task.show(Reciter({0: 1, 1: 2, 2: 0}, 3)) == shown


# Keys -----------------------------------------------------------------------------------------------------------------


def test_every_field_is_a_key_with_one_line_of_help(digits: Language) -> None:
    for entry in fields(digits):
        assert entry.metadata["help"], entry.name
        assert "\n" not in entry.metadata["help"]
    check_rules(digits)


def test_the_end_of_a_text_is_evaluated_on_or_a_text_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(200)) * 10)
    (tmp_path / "b").write_bytes(b"b" * 101)
    split = Language(data="text", text=str(tmp_path / "a"), sequence_length=10, eval_share=0.25)
    assert (len(split.train_set), len(split.eval_set)) == (149, 49)
    assert split.eval_set[0][0][0] == 1500 % 200
    own = Language(data="text", text=str(tmp_path / "a"), eval_text=str(tmp_path / "b"), sequence_length=10)
    assert (len(own.train_set), len(own.eval_set)) == (199, 10)
    assert own.eval_set[0][0].tolist() == [ord("b")] * 10


BAD = {
    "data=text": ["task.data=text needs task.text", "a text file or a folder"],
    "data=tokens": ["task.data=tokens needs task.tokens", "*.bin"],
    "text=x": ["task.text=x", "task.data=text"],
    "eval_tokens=x": ["task.eval_tokens=x", "task.data=tokens"],
    "tokenizer=x": ["task.tokenizer=x", "task.data=text"],
    "sequence_length=32": ["task.sequence_length=32", "a digit has 64 tokens"],
    "vocabulary_size=9": ["task.vocabulary_size=9", "task.data=tokens"],
    "eval_share=1.0": ["task.eval_share=1.0", "above 0 and below 1"],
    "dropout=1.0": ["task.dropout=1.0", "from 0 up, below 1"],
    "data=text text=/no/such": ["task.text=/no/such", "no such file or folder"],
    "data=text text={} eval_text=/no/such": ["task.eval_text=/no/such", "no such file or folder"],
    "data=text text={} sequence_length=5000": [
        "without the last 10 %",
        "fill no window of 5,000",
        "task.sequence_length",
    ],
    "data=text text={} eval_share=0.001": ["the last 0.1 % for evaluation", "fill no window of 256"],
}


@pytest.mark.parametrize("typed", BAD)
def test_bad_input_is_one_line_with_the_key_to_change(tmp_path: Path, typed: str) -> None:
    (tmp_path / "text").write_text("x" * 5000)
    values: dict[str, object] = dict(part.split("=", 1) for part in typed.format(tmp_path / "text").split())
    for name, kind in {"sequence_length": int, "vocabulary_size": int, "eval_share": float, "dropout": float}.items():
        if name in values:
            values[name] = kind(values[name])  # type: ignore[arg-type]
    with pytest.raises(UserError) as caught:
        Language(**values)  # type: ignore[arg-type]
    said = str(caught.value)
    assert all(part in said for part in BAD[typed]), said
    assert "\n" not in said
