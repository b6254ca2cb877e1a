"""What a task says of its experts is held to its model, and a command that cannot run says why in one line."""

from __future__ import annotations

import pytest
from torch import nn

from lockstep.compare.cases import plan_cases
from lockstep.errors import UserError
from lockstep.launch.validate import validate
from lockstep.parallel.expert_plan import expert_modules
from recipes import compare, ddp, doctor, expert_parallel, verify
from tests.helpers import expert_task
from tests.helpers.harness import compose_config

OWN = f"task={expert_task.__file__}:Affine"


class Saying(expert_task.Affine):
    """The same model and a convolution, and other words."""

    names: tuple[str, ...] = ()

    def build_model(self) -> nn.Module:
        return nn.Sequential(*super().build_model(), nn.Bilinear(3, 4, 5), nn.Identity())

    def expert_parallel_modules(self, model: nn.Module) -> list[str]:
        return list(self.names)


class Mixed(nn.Module):
    """Experts beside what is no expert's."""

    def __init__(self) -> None:
        super().__init__()
        self.maps, self.scale = expert_task.Maps(6), nn.Parameter(expert_task.torch.ones(1, 5))


def test_what_fits_is_found_once() -> None:
    task = Saying(maps=6)
    task.names = ("*.maps", "1.maps")
    assert expert_modules(task, "Saying", task.build_model(), 3) == ["0.maps", "1.maps"]


@pytest.mark.parametrize(
    ("names", "ranks", "said"),
    [
        ((), 2, "names no module, and a dense model has no experts to cut"),
        (("*.map",), 2, r"expert_parallel_modules names \*.map, which fits no module"),
        (("3",), 2, r"names 3, whose parameters are none; allowed are \[E, …\] for all of them"),
        (("*.maps",), 4, r"expert=4: does not divide the 6 experts of 0.maps; allowed are 1, 2, 3, 6"),
    ],
)
def test_what_does_not_fit_is_said(names: tuple[str, ...], ranks: int, said: str) -> None:
    task = Saying(maps=6)
    task.names = names
    with pytest.raises(UserError, match=said):
        expert_modules(task, "Saying", task.build_model(), ranks)


def test_what_is_no_expert_s_is_shown_with_its_shape() -> None:
    task = Saying(maps=6)
    task.names = ("0",)
    with pytest.raises(
        UserError, match=r"names 0, whose parameters are scale \[1, 5\], maps.bias \[6, 5\], maps.inner"
    ):
        expert_modules(task, "Saying", nn.Sequential(Mixed()), 2)


@pytest.mark.parametrize(
    ("words", "ranks", "said"),
    [
        (
            ["task=language", "task.experts=0"],
            2,
            "task.experts=0: a dense model has no experts to cut; set task.experts=8",
        ),
        (["task=language", "expert=3"], 3, r"expert=3: does not divide the 8 experts of .*; allowed are 1, 2, 4, 8"),
        (["task=language"], 3, "expert=2: 3 ranks do not divide by it; allowed are 1, 3"),
        (["task.experts=4", "task.experts_per_token=5"], 2, "there are only task.experts=4; allowed are 1…4"),
        (["compile=true"], 2, "compile=true: is for what a rank computes by itself"),
        (["task=images"], 2, r"task=images: says nothing of experts; give the task expert_parallel_modules\(model\)"),
        (
            [OWN, "expert=1", "balance=bias"],
            2,
            "balance=bias: task=.*Affine routes by means of its own; allowed are models",
        ),
        ([OWN], 2, r"expert=2: does not divide the 3 experts of 0.maps; allowed are 1, 3"),
    ],
)
def test_a_command_that_cannot_run_says_why(words: list[str], ranks: int, said: str) -> None:
    config = compose_config(expert_parallel.train, *words, "global_batch_size=12", "out=nowhere")
    with pytest.raises(UserError, match=said) as error:
        validate(config, expert_parallel.train, ranks)
    assert len(str(error.value).splitlines()) == 1


def test_the_recipe_s_own_number_of_experts_is_for_tasks_that_have_one_and_for_nobody_who_says_another() -> None:
    for words, count in ((["task=language"], 8), ([], 8), (["task=language", "task.experts=2"], 2)):
        assert compose_config(expert_parallel.train, *words).task.experts == count  # type: ignore[attr-defined]
    assert not hasattr(compose_config(expert_parallel.train, OWN).task, "experts")


def test_tools_give_all_recipes_the_same_work() -> None:
    """A tool of several recipes has no experts unless they are asked for; one that looks at one recipe has that one's."""
    names = "recipes=[ddp,expert_parallel,tensor_parallel]"
    for tool, words, count in (
        (verify.train, [names, "task=language"], 0),
        (compare.train, [names, "task=language"], 0),
        (compare.train, [names, "task=language", "task.experts=4"], 4),
        (doctor.train, ["check=memory", "recipes=[expert_parallel]", "task=language"], 8),
    ):
        assert compose_config(tool, *words).task.experts == count, (tool.name, words)  # type: ignore[attr-defined]
    config = compose_config(compare.train, names, "task=language", "nprocs=[2]")
    cases, left_out = plan_cases(config, compare.train, [ddp.train, expert_parallel.train])
    assert [case.recipe for case in cases] == ["ddp"]
    assert len(left_out) == 1
    assert "expert_parallel on 2 ranks: task.experts=0: a dense model has no experts to cut; set task" in left_out[0]
