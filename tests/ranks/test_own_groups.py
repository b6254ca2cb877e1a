"""Parameter groups and a schedule of one's own: a run that was killed and resumed has the bits of the one that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lockstep.recipe import Recipe
from lockstep.training.optim import SchedulerState
from recipes import lightning_trainer
from tests.helpers import fuzz_tasks, own_recipe
from tests.helpers.examples import kill_a_rank
from tests.helpers.harness import assert_equal, lines, result, train
from tests.helpers.own_recipe import own_optimizer, own_schedule

TASK = f"{fuzz_tasks.__file__}:Ragged"
STEPS, LR = 11, 0.01
WORDS = (f"task={TASK}", "global_batch_size=36", f"max_steps={STEPS}", "log_every=1", "checkpoint.every=4")
WORDS += (f"optim.lr={LR}",)
CASES: dict[str, tuple[Recipe, int, tuple[str, ...]]] = {
    "single": (own_recipe.train, 1, ("wrap=none",)),
    "ddp": (own_recipe.train, 2, ("wrap=ddp", "accumulate=2")),
    "ddp of 3": (own_recipe.train, 3, ("wrap=ddp",)),
    "fsdp": (own_recipe.train, 2, ("wrap=fsdp",)),
    "lightning_trainer": (lightning_trainer.train, 2, ()),
}


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's recipe with the groups and the schedule of `own_recipe`; ranks are forked, and inherit it."""
    monkeypatch.setattr(lightning_trainer, "build_optimizer", lambda config, model: own_optimizer(model, config.lr))
    monkeypatch.setattr(lightning_trainer, "build_scheduler", lambda config, optimizer, steps: own_schedule(optimizer))


def rates() -> list[float]:
    """Those of the first group, by torch alone."""
    optimizer = own_optimizer(nn.Linear(2, 2), LR)
    scheduler, found = own_schedule(optimizer), []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.usefixtures("lightning")
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_killed_and_resumed_it_has_the_same_bits(name: str, tmp_path: Path) -> None:
    """Killed in step 7, after StepLR has halved the rates twice, and resumed from step 4, after once."""
    recipe, ranks, words = CASES[name]
    whole = train(recipe, tmp_path / "whole", ranks, *WORDS, *words)
    kill_a_rank(recipe, TASK, tmp_path / "parts", ranks, 7, 4, *WORDS, *words)
    parts = train(recipe, tmp_path / "parts", ranks, *WORDS, *words)
    assert result(tmp_path / "parts")["resumed_from"] == "checkpoints/step-00000004"
    assert_equal(parts, whole)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert [line["lr"] for line in lines(tmp_path / "parts") if "loss" in line] == rates()


@pytest.mark.slow
def test_every_way_to_share_the_work_trains_the_same(tmp_path: Path) -> None:
    words = (*WORDS, "precision=fp64", "task.dropout=0")
    alone = train(own_recipe.train, tmp_path / "single", 1, *words, "wrap=none")
    for wrap, ranks in (("ddp", 3), ("fsdp", 2)):
        found = train(own_recipe.train, tmp_path / wrap, ranks, *words, f"wrap={wrap}")
        assert all(torch.allclose(found[name], tensor, rtol=0, atol=1e-10) for name, tensor in alone.items()), wrap


def test_a_resume_that_forgets_the_groups_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    restore = SchedulerState.load_state_dict

    def forgets(self: SchedulerState, state: Any) -> None:
        mine = self._optimizer.param_groups[1]
        kept = dict(mine)
        restore(self, state)
        mine.update(kept)

    words = (*WORDS, "wrap=none")
    whole = train(own_recipe.train, tmp_path / "whole", 1, *words)
    kill_a_rank(own_recipe.train, TASK, tmp_path / "parts", 1, 7, 4, *words)
    monkeypatch.setattr(SchedulerState, "load_state_dict", forgets)
    parts = train(own_recipe.train, tmp_path / "parts", 1, *words)
    assert not all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
