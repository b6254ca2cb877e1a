"""`optim.*`: what it builds, what it refuses, and the same updates whatever it is called by."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer, RMSprop

from lockstep.config.check import check_values
from lockstep.config.schema import Config, OptimConfig
from lockstep.errors import UserError
from lockstep.training.optim import (
    SchedulerState,
    build_optimizer,
    build_scheduler,
    check_optimizer,
    states_per_weight,
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(24, 6), nn.Linear(6, 3))


def trained(optimizer: Optimizer, model: nn.Module, steps: int = 3) -> list[Tensor]:
    for number in range(steps):
        torch.manual_seed(number)
        model(torch.randn(5, 1, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


BY_HAND: list[tuple[dict[str, Any], type[Any], dict[str, Any]]] = [
    ({}, SGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4}),
    ({"nesterov": True}, SGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}),
    ({"name": "adamw"}, AdamW, {"lr": 0.02, "weight_decay": 5e-4}),
    (
        {"name": "adam", "arguments": {"betas": [0.8, 0.9]}},
        Adam,
        {"lr": 0.02, "weight_decay": 5e-4, "betas": (0.8, 0.9)},
    ),
    (
        {"name": "torch.optim.RMSprop", "arguments": {"momentum": 0.5}},
        RMSprop,
        {"lr": 0.02, "weight_decay": 5e-4, "momentum": 0.5},
    ),
]


@pytest.mark.parametrize(("words", "cls", "arguments"), BY_HAND, ids=lambda value: getattr(value, "__name__", ""))
def test_it_is_torch_s_own_with_these_arguments(
    words: dict[str, Any], cls: type[Any], arguments: dict[str, Any]
) -> None:
    model, theirs = network(), network()
    optimizer = build_optimizer(OptimConfig(**words), model)
    assert type(optimizer) is cls
    assert len(optimizer.param_groups) == 1
    expected = trained(cls(theirs.parameters(), **arguments), theirs)
    assert all(map(torch.equal, trained(optimizer, model), expected))


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"name": "rmsprop"},
        r"optim.name=rmsprop: allowed are sgd, adamw, adam, lion, muon, and the classes of torch.opt",
    ),
    ({"name": "torch.optim.RMSProp"}, r"optim.name=torch.optim.RMSProp: allowed of torch \S+ optimizers are .*RMSprop"),
    ({"name": "torch.optim.Optimizer"}, "allowed of torch"),
    ({"name": "torch.optim.LBFGS"}, "allowed of torch"),
    ({"arguments": {"beta": 1}}, r"optim.arguments.beta=1: allowed for sgd are dampening, maximize, foreach, .*fused"),
    ({"arguments": {"lr": 1}}, r"optim.arguments.lr=1: allowed for sgd are .*; set optim.lr"),
    ({"name": "adamw", "nesterov": True}, "optim.nesterov=true: optim.name=adamw does not take it; sgd does"),
    ({"nesterov": True, "momentum": 0.0}, "optim.name=sgd: Nesterov momentum requires a momentum"),
    ({"name": "adamw", "arguments": {"betas": [2, 3]}}, "optim.name=adamw: Invalid beta parameter at index 0: 2"),
]


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=str)
def test_what_no_optimizer_takes_is_refused_in_a_line(words: dict[str, Any], said: str) -> None:
    config = Config(optim=OptimConfig(**words))
    with pytest.raises(UserError, match=said) as caught:  # noqa: PT012
        check_values(config)
        check_optimizer(config.optim)
    assert "\n" not in str(caught.value)


def test_norms_and_biases_may_be_left_without_weight_decay() -> None:
    model = network()
    optimizer = build_optimizer(OptimConfig(decay_norms_and_biases=False, weight_decay=0.1), model)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    names = {name: decay[id(parameter)] for name, parameter in model.named_parameters()}
    assert names == {name: 0.1 if name in ("0.weight", "3.weight", "4.weight") else 0.0 for name in names}


def test_groups_and_several_modules_are_taken_as_they_are() -> None:
    first, second = nn.Linear(2, 3), nn.Linear(3, 1)
    assert len(build_optimizer(OptimConfig(), [first, second]).param_groups[0]["params"]) == 4
    groups = [{"params": first.parameters()}, {"params": second.parameters(), "lr": 0.5}]
    optimizer = build_optimizer(OptimConfig(decay_norms_and_biases=False), groups)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.02, 0.5, 0.5]
    scheduler = build_scheduler(OptimConfig(warmup_steps=2), optimizer, 10)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.01, 0.25, 0.25]
    for _ in range(6):
        optimizer.step()
        scheduler.step()
    rates = scheduler.get_last_lr()
    assert rates == pytest.approx([0.01, 0.01, 0.25, 0.25])
    scheduler.set_step(1)
    scheduler.set_step(6)
    assert [group["lr"] for group in optimizer.param_groups] == scheduler.get_last_lr() == rates


def test_muon_takes_matrices_and_adamw_the_rest() -> None:
    """The same updates as two optimizers side by side, also after its state was saved and restored."""
    config = OptimConfig(name="muon", lr=0.01, weight_decay=0.1)
    model, theirs = network(), network()
    matrices = [parameter for parameter in theirs.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in theirs.parameters() if parameter.dim() != 2]
    both = (
        Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        AdamW(others, lr=0.01, weight_decay=0.1),
    )
    mine = build_optimizer(config, model)
    trained(mine, model)
    buffer = io.BytesIO()
    torch.save(mine.state_dict(), buffer)
    buffer.seek(0)
    mine = build_optimizer(config, model)
    mine.load_state_dict(torch.load(buffer, weights_only=True))
    found = trained(mine, model)
    for _ in range(2):
        for number in range(3):
            torch.manual_seed(number)
            theirs(torch.randn(5, 1, 8)).square().mean().backward()
            for each in both:
                each.step()
                each.zero_grad()
    assert all(map(torch.equal, found, theirs.parameters()))


def test_what_an_optimizer_keeps_is_measured() -> None:
    kept = {name: states_per_weight(OptimConfig(name=name)) for name in ("sgd", "adamw", "adam", "muon")}
    assert kept == {"sgd": (1, 0), "adamw": (2, 1), "adam": (2, 1), "muon": (1, 0)}
    assert states_per_weight(OptimConfig(momentum=0)) == (0, 0)


def test_a_scheduler_that_no_checkpoint_could_keep_is_refused() -> None:
    class Odd(torch.optim.lr_scheduler.StepLR):
        def state_dict(self) -> dict[str, Any]:
            return super().state_dict() | {"thing": OptimConfig()}

    optimizer = build_optimizer(OptimConfig(), network())
    with pytest.raises(UserError, match="scheduler: the state of Odd holds more than plain values"):
        SchedulerState(Odd(optimizer, 3), optimizer)
