"""Parameters that get no gradient are named after the first step, whatever wraps the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from lockstep.config.run_directory import freeze
from lockstep.distributed.process_group import World
from lockstep.errors import UserError
from lockstep.launch.validate import validate
from lockstep.recipe import Recipe
from lockstep.run import Run
from lockstep.utils.text import some_of
from recipes import ddp
from tests.helpers.harness import compose_config, result, run_ranks

SHORT = ("data=synthetic", "data.size=48", "data.image_size=8", "global_batch_size=12", "max_steps=3", "log_every=1")


class Spare(nn.Module):
    """A classifier with layers that its forward never comes to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.spare = nn.Linear(192, 8), nn.Linear(8, 10), nn.Linear(8, 8)
        self.register_parameter("scale", nn.Parameter(Tensor([1.0])))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.first(images.flatten(1)))
        return logits


def begin(world: World, kind: str, config: Any, out: str) -> str:
    run = Run("ddp", config, world, Path(out))
    model: nn.Module = Spare()
    if kind == "frozen":
        model.get_submodule("spare").requires_grad_(False)
        model.get_parameter("scale").requires_grad_(False)
    if kind != "plain":
        model = DistributedDataParallel(model, find_unused_parameters=kind == "find_unused")
    if kind == "frozen too late":
        model.module.get_submodule("first").requires_grad_(False)

    def train(run: Run) -> None:
        from torch.optim import SGD

        optimizer = SGD(model.parameters(), lr=0.1)
        for batch in run.steps(model=model, optimizer=optimizer):
            loss = cross_entropy(model(batch.inputs), batch.targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.record(loss=loss)

    try:
        Recipe(train, "recipes.ddp")(run)
    except UserError as error:
        return f"step {run.step}: {error}"
    return "trained"


def start(tmp_path: Path, kind: str) -> list[str]:
    config = compose_config(ddp.train, *SHORT, f"out={tmp_path / 'run'}")
    validate(config, ddp.train, 2)
    return run_ranks(begin, 2, kind, config, str(freeze(config, "ddp")))


@pytest.mark.parametrize("kind", ["plain", "find_unused"])
def test_parameters_that_are_not_used_are_named_once(kind: str, tmp_path: Path) -> None:
    assert start(tmp_path, kind) == ["trained"] * 2
    log = (tmp_path / "run" / "ranks" / "0.log").read_text()
    line = "warning: no gradient in the first step for scale, spare.weight, spare.bias: not trained"
    assert log.count("warning:") == log.count(line) == 1
    assert result(tmp_path / "run")["parameters_without_gradient"] == ["scale", "spare.weight", "spare.bias"]


def test_ddp_without_find_unused_ends_before_torch_s_own_error(tmp_path: Path) -> None:
    said = start(tmp_path, "ddp")
    assert all(
        text.startswith("step 1: no gradient in the first step for scale, spare.weight, spare.bias: Distr")
        for text in said
    ), said


def test_what_is_frozen_before_the_wrap_is_not_asked_for(tmp_path: Path) -> None:
    assert start(tmp_path, "frozen") == ["trained"] * 2
    assert "parameters_without_gradient" not in result(tmp_path / "run")


@pytest.mark.slow
def test_freezing_after_the_wrap_is_refused(tmp_path: Path) -> None:
    said = start(tmp_path, "frozen too late")
    assert all(text.startswith("step 0: 7 tensors were to be trained when Distr") for text in said), said


def test_a_long_list_is_cut() -> None:
    assert some_of(list("abcdefgh")) == "a, b, c, d, e and 3 more"
