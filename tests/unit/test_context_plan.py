"""Which modules see beyond a position is held to the model, and sizes to the ranks: one line says what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lockstep.data.batch import Batch
from lockstep.errors import UserError
from lockstep.launch.validate import validate
from lockstep.parallel.context import ContextShare
from lockstep.parallel.context_plan import check_attention, context_modules
from lockstep.tasks.language import Language
from lockstep.training.accumulate import micro_batches
from recipes import context_parallel
from tests.helpers.harness import compose_config


class Looks(nn.Module):
    positions: Tensor | None = None

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(2, (6, -1)).transpose(1, 2)
        how = {name: value(x) if callable(value) else value for name, value in self.how.items()}
        return F.scaled_dot_product_attention(heads, heads, heads, **how).transpose(1, 2).flatten(2)


class Model(nn.Sequential):
    def __init__(self, *inner: nn.Module) -> None:
        super().__init__(nn.Embedding(7, 12), *inner)


def checked(
    model: nn.Module, names: list[str] | None, context: int = 2, by: str = "ring", length: int = 12, **task: Any
) -> list[str]:
    method = None if names is None else lambda _: names
    found = context_modules(SimpleNamespace(context_parallel_modules=method, **task), "Mine", model, context)
    check_attention("Mine", model, found, torch.zeros(1, length, dtype=torch.int64), context, by)
    return found


def mask(x: Tensor) -> Tensor:
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)


FAULTS: dict[str, tuple[Callable[[], Any], str]] = {
    "nothing said": (
        lambda: checked(Model(Looks()), None),
        "task=Mine: says nothing of how ranks .*; give the task conte",
    ),
    "no such module": (
        lambda: checked(Model(Looks()), ["2"]),
        "task=Mine: context_parallel_modules names 2, which fits no",
    ),
    "no positions": (
        lambda: checked(Model(nn.Identity()), ["1"]),
        "names 1, a Identity without the attribute positions;",
    ),
    "left out": (
        lambda: checked(Model(Looks(), Looks()), ["1"]),
        "leaves out a module that calls F.scaled_dot.* names 1$",
    ),
    "no attention": (
        lambda: checked(Model(Positioned()), ["1"]),
        "none of its context_parallel_modules calls torch.nn",
    ),
    "mask": (
        lambda: checked(Model(Looks(attn_mask=mask)), ["1"]),
        "task=Mine: 1: F.scaled_dot_.* with attn_mask cannot",
    ),
    "dropout": (
        lambda: checked(Model(Looks(dropout_p=0.5)), ["1"]),
        "task=Mine: 1: .* with dropout_p=0.5 cannot be shared",
    ),
    "heads": (
        lambda: checked(Model(Looks()), ["1"], 4, "ulysses"),
        r"context=4: by=ulysses gives each rank .* the 6 heads do not divide; allowed for this model are 1, 2, 3, 6; or set",
    ),
    "length under ring": (
        lambda: checked(Model(Looks()), ["1"], 4),
        "context=4: 12 tokens do not divide by the 8 equal chunks .* by=ring .*; allowed for this length are 1, 2, 3, 6, or",
    ),
    "length under ulysses": (
        lambda: checked(Model(Looks()), ["1"], 5, "ulysses"),
        "context=5: 12 tokens do not divide by the 5 equal chunks .*; allowed for this length are 1, 2, 3, 4, 6, 12, or for",
    ),
    "streams": (
        lambda: checked(Model(Looks()), ["1"], stream_per_rank=True),
        "task=Mine: stream_per_rank gives each rank samples of its own, and the 2 ranks that share",
    ),
}


class Positioned(nn.Module):
    positions: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_said(fault: str) -> None:
    call, words = FAULTS[fault]
    with pytest.raises(UserError, match=words) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_names_may_have_stars_and_a_model_that_has_none_of_this_passes() -> None:
    assert checked(Model(Looks(), nn.Identity(), Looks(is_causal=True, scale=0.5)), ["1", "[3-9]"], 3) == ["1", "3"]
    task = Language(kv_heads=1)
    with torch.device("meta"):
        model = task.build_model()
    found = context_modules(task, "language", model, 2)
    assert found == [f"blocks.{number}.attention" for number in range(4)]
    check_attention("language", model, found, torch.zeros(1, 64, dtype=torch.int64), 32, "ring")
    with pytest.raises(
        UserError, match=r"the 1 heads of keys and values do not divide; allowed .* are 1; or set by=ring"
    ):
        check_attention("language", model, found, torch.zeros(1, 64, dtype=torch.int64), 2, "ulysses")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("ranks", "words", "said"),
    [
        (
            2,
            "task=images",
            "task=images: says nothing of how ranks could share a sequence; give the task context_parallel_",
        ),
        (
            4,
            "context=4 by=ulysses",
            "context=4: by=ulysses .* 2 heads of keys and values do not divide; allowed .* 1, 2;",
        ),
        (
            3,
            "context=3",
            "context=3: 64 tokens do not divide by the 6 equal chunks .*; allowed .* 1, 2, 4, 8, 16, 32, or",
        ),
        (
            3,
            "",
            "context=2: 2 ranks share each sequence, and 3 ranks cannot be divided into such copies; set nproc",
        ),
        (2, "compile=true", "compile=true: is for what a rank computes by itself, and attention is shared here"),
        (
            6,
            "global_batch_size=16",
            "global_batch_size=16: the global batch must divide by 3 copies; nearest .* 15, 18$",
        ),
        (2, "by=star", "by=star: allowed are ring, ulysses"),
        (2, "context=0", "context=0: allowed are numbers from 1 up"),
    ],
)
def test_a_command_that_cannot_be_is_refused_in_one_line(ranks: int, words: str, said: str) -> None:
    def command() -> None:
        validate(
            compose_config(context_parallel.train, "global_batch_size=48", *words.split()),
            context_parallel.train,
            ranks,
        )

    with pytest.raises(UserError, match=f"^{said}") as raised:
        command()
    assert "\n" not in str(raised.value)


class Share(ContextShare):
    """Of ranks that are not there."""

    def __init__(self, place: int, size: int, by: str, weigh: Any = None) -> None:
        self.by, self._weigh, self.place, self.size, self.slices = by, weigh, place, size, 1


@pytest.mark.parametrize("by", ["ring", "ulysses"])
def test_the_parts_of_a_batch_weigh_what_it_weighs(by: str) -> None:
    """Mean over the ranks of loss · weight: the loss over all tokens, however they are dealt out."""
    torch.manual_seed(0)
    values = torch.rand(5, 8, dtype=torch.float64)
    counts = torch.rand(5, 8) < 0.3
    counts[:, :4] = False  # nothing counts for one of ulysses's ranks

    def loss(taken: Tensor, counted: Tensor) -> Tensor:
        return (taken * counted).sum() / counted.sum().clamp(min=1)

    def weigh(targets: dict[str, Tensor]) -> Tensor:
        return targets["counted"].sum()

    targets, one = {"values": values, "counted": counts}, torch.ones((), dtype=torch.float64)
    batch = Batch(values, targets, 5, one, weigh(targets).double(), weigh)
    found = torch.zeros((), dtype=torch.float64)
    for place in range(2):
        share = Share(place, 2, by, weigh)
        for micro in map(share.part, micro_batches(batch, 3, nn.Identity())):
            assert micro.inputs.shape[1] == 8
            assert micro.targets["values"].shape[1] == 4
            found += loss(*micro.targets.values()) * micro.weight / 2
    assert float(found) == pytest.approx(float(loss(values, counts)), rel=1e-12)


def test_only_where_attention_is_causal_a_sequence_is_filled_up() -> None:
    share = Share(0, 2, "ring")
    share.chunks, share.filled = 4, True
    with pytest.raises(
        UserError, match=r"context=2: the evaluation's sequences do not divide by 4, and only where attention"
    ):
        share.attend(*torch.zeros(3, 1, 2, 2, 4), is_causal=False)


def test_targets_that_have_no_positions_are_refused() -> None:
    micro = next(micro_batches(Batch(torch.zeros(3, 8), torch.zeros(3), 3), 1, nn.Identity()))
    with pytest.raises(
        UserError, match=r"context=2: of sequences of 8 each rank has some positions, and the targets float"
    ):
        Share(0, 2, "ring").part(micro)
    micro = next(micro_batches(Batch(torch.zeros(3), torch.zeros(3), 3), 1, nn.Identity()))
    with pytest.raises(UserError, match=r"the inputs float32 \[3\] are no sequences"):
        Share(0, 2, "ring").part(micro)
