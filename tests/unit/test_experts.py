"""A mixture of experts by hand: who goes where, with which weight, how balance is counted, and how it adds up."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lockstep.errors import UserError
from lockstep.memory.predict import predict_memory
from lockstep.models.experts import MixtureOfExperts
from lockstep.models.gpt import GPT, gpt_config
from lockstep.tasks.language import Language
from recipes import single
from tests.helpers.harness import compose_config

WIDTH, HIDDEN, EXPERTS = 6, 5, 4


def mixture(per_token: int = 2, capacity: float | None = None) -> MixtureOfExperts:
    torch.manual_seed(0)
    made = MixtureOfExperts(WIDTH, HIDDEN, EXPERTS, per_token, capacity).double()
    torch.nn.init.normal_(made.router.weight)
    made.experts.init_weights(1)
    return made


def by_hand(made: MixtureOfExperts, x: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token, choice by choice, with nothing sorted."""
    outputs, uneven = torch.zeros_like(x), []
    room = math.inf
    if made.capacity is not None and made.training:
        room = math.ceil(made.capacity * made.per_token * x.shape[1] / EXPERTS)
    for row, sequence in enumerate(x):
        shares = F.softmax(sequence @ made.router.weight.T, -1)
        asked, taken = [0] * EXPERTS, [0] * EXPERTS
        for place, token in enumerate(sequence):
            best = sorted(range(EXPERTS), key=lambda e: -shares[place, e].item())[: made.per_token]
            whole = shares[place, best].sum() if made.per_token > 1 else 1.0
            for expert in best:
                asked[expert] += 1
                if taken[expert] == room:
                    continue
                taken[expert] += 1
                gate, up, down = (getattr(made.experts, name)[expert] for name in ("gate", "up", "down"))
                outputs[row, place] += shares[place, expert] / whole * (down @ (F.silu(gate @ token) * (up @ token)))
        used = torch.tensor(asked, dtype=x.dtype) / sum(asked)
        uneven.append(EXPERTS * (used * shares.mean(0)).sum())
    return outputs, torch.stack(uneven)


@pytest.mark.parametrize(("per_token", "capacity"), [(1, None), (2, None), (4, None), (2, 0.6), (1, 1.0)])
def test_it_is_what_one_computes_by_hand_forward_and_backward(per_token: int, capacity: float | None) -> None:
    made = mixture(per_token, capacity)
    x = torch.randn(3, 7, WIDTH, dtype=torch.float64, requires_grad=True)
    found = []
    for compute in (made, lambda each: by_hand(made, each)):
        outputs, uneven = compute(x)
        loss = (outputs * torch.arange(WIDTH)).sum() + uneven @ torch.arange(1.0, 4.0, dtype=torch.float64)
        found.append((outputs, uneven, *torch.autograd.grad(loss, [x, *made.parameters()])))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    if capacity is not None:
        assert not torch.allclose(made(x)[0], made.eval()(x)[0]), "in evaluation nothing is dropped"
        torch.testing.assert_close(made(x)[0], by_hand(made, x)[0], rtol=1e-12, atol=1e-12)


def test_balance_is_one_where_all_are_used_alike_and_as_large_as_their_number_where_one_is() -> None:
    made = mixture(per_token=1)
    with torch.no_grad():
        made.router.weight.zero_()
        made.router.weight[:, :EXPERTS] = 50 * torch.eye(EXPERTS)
    even = F.one_hot(torch.arange(8) % EXPERTS, WIDTH).double()
    one = F.one_hot(torch.zeros(8, dtype=torch.int64), WIDTH).double()
    assert made(torch.stack([even, one]))[1].tolist() == pytest.approx([1.0, EXPERTS])


def test_no_token_depends_on_later_ones_though_experts_fill_up() -> None:
    made, x = mixture(capacity=0.7), torch.randn(2, 12, WIDTH, dtype=torch.float64)
    other = x.clone()
    other[:, 8:] = torch.randn(2, 4, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(made(x)[0][:, :8], made(other)[0][:, :8], rtol=0, atol=1e-13)


def test_a_batch_s_loss_is_the_weighted_mean_of_its_parts_ignored_targets_included() -> None:
    """The denominator of balance is the loss's own, whoever has which sequences, and however many of their tokens count."""
    task = Language(experts=EXPERTS, balance=0.3)
    logits, uneven = torch.randn(4, 5, task.vocabulary).double(), torch.rand(4).double() + 1
    targets = torch.randint(0, task.vocabulary, (4, 5))
    targets[0, 1:], targets[2] = -100, -100
    whole = task.loss((logits, uneven), targets)
    total = sum(
        task.loss((logits[a:b], uneven[a:b]), targets[a:b]) * task.weigh(targets[a:b])
        for a, b in ((0, 1), (1, 3), (3, 4))
    )
    torch.testing.assert_close(whole, total / task.weigh(targets), rtol=1e-13, atol=0)
    alone = task.loss(logits, targets)
    torch.testing.assert_close(whole - alone, 0.3 * (uneven @ torch.tensor([1.0, 5, 0, 5]).double()) / 11)


def test_a_gpt_counts_its_parameters_and_gives_logits_alone_in_evaluation() -> None:
    shape = replace(gpt_config("nano", 18), experts=EXPERTS)
    model = GPT(shape)
    assert sum(each.numel() for each in model.parameters()) == shape.parameters
    logits, uneven = model(torch.zeros(3, 9, dtype=torch.int64))
    assert (logits.shape, uneven.shape) == ((3, 9, 18), (3,))
    assert model.eval()(torch.zeros(3, 9, dtype=torch.int64)).shape == (3, 9, 18)
    dense = GPT(replace(shape, experts=0))
    assert dense(torch.zeros(3, 9, dtype=torch.int64)).shape == (3, 9, 18)


@pytest.mark.slow
def test_memory_of_a_step_is_foretold_though_nobody_knows_who_goes_where() -> None:
    words = ("task=language", f"task.experts={EXPERTS}", "task.capacity=1.0", "optim=adamw")
    found = predict_memory(compose_config(single.train, *words), 4)
    weights = 4 * replace(gpt_config("nano", 18), experts=EXPERTS).parameters
    assert found.sums()["parameters"] == weights
    assert found.sums()["activations"] > 4 * 64 * 64 * 4  # more than one block's input


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"experts": 4, "experts_per_token": 5},
            r"experts_per_token=5: there are only task.experts=4; allowed are 1…4",
        ),
        ({"capacity": 1.25}, "task.capacity=1.25: is an expert's; set task.experts=8"),
        ({"experts": 4, "capacity": 0.0}, "task.capacity=0.0: allowed are null and numbers above 0"),
    ],
)
def test_keys_that_contradict_each_other(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Language(**keys)


def test_a_bias_chooses_and_weighs_nothing() -> None:
    made = mixture()
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    plain, _ = made(x)
    made.balance_by_bias()
    assert torch.equal(made(x)[0], plain), "they are 0 at first"
    assert made.chosen.sum() == 3 * 5 * 2
    assert made.bias is not None
    made.bias[3] = 2.0  # above any share: each token's first choice
    shares = made.route(x)
    other = shares[..., :3].argmax(-1)
    biased, _ = made(x)
    for n, t in ((0, 0), (2, 4)):
        own, second = shares[n, t, 3], shares[n, t, other[n, t]]
        expected = own * swiglu(made, x[n, t], 3) + second * swiglu(made, x[n, t], int(other[n, t]))
        assert torch.allclose(biased[n, t], expected / (own + second), rtol=1e-12)
    before = made.chosen.clone()
    made.eval()(x)
    assert torch.equal(made.chosen, before), "evaluation is not counted"
    assert set(made.state_dict()) == {"router.weight", "experts.gate", "experts.up", "experts.down", "bias"}


def swiglu(made: MixtureOfExperts, x: Tensor, expert: int) -> Tensor:
    """An expert's output of one token."""
    gate, up, down = (getattr(made.experts, name)[expert] for name in ("gate", "up", "down"))
    found: Tensor = down @ (F.silu(gate @ x) * (up @ x))
    return found


@pytest.mark.parametrize("method", ["tensor_parallel_plan", "context_parallel_modules"])
def test_recipes_that_cannot_share_experts_say_which_one_can(method: str) -> None:
    task = Language(experts=EXPERTS)
    with pytest.raises(UserError, match=r"task.experts=4: .*recipes.expert_parallel, or set task.experts=0"):
        getattr(task, method)(task.build_model())
