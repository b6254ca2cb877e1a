"""A plan by which ranks share layers is held to the model: one line says what does not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace

import pytest
from torch import nn

from lockstep.errors import UserError
from lockstep.launch.validate import validate
from lockstep.models.gpt import GPTConfig
from lockstep.parallel.tensor_plan import tensor_parallel_plan
from lockstep.tasks.language import Language
from recipes import tensor_parallel
from tests.helpers.harness import compose_config


class Mixer(nn.Module):
    def __init__(self, tied: bool = False, p: float = 0.0) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(7, 8), nn.LayerNorm(8)
        self.mlp = nn.ModuleDict({"up": nn.Linear(8, 12), "drop": nn.Dropout(p), "down": nn.Linear(12, 8)})
        self.head = nn.Linear(8, 7, bias=False)
        if tied:
            self.head.weight = self.table.weight


WHOLE = {"table": "embedding", "norm": "whole", "mlp": "gather", "mlp.up": "columns", "mlp.down": "rows"}
WHOLE |= {"head": "output"}
Plan = Mapping[str, str] | None


def planned(
    plan: Plan, tensor: int = 2, sequence: bool = False, model: nn.Module | None = None, **counts: int
) -> dict[str, str]:
    method: Callable[[nn.Module], Plan] | None = None if plan is None else lambda _: plan
    task = SimpleNamespace(tensor_parallel_plan=method, tensor_parallel_counts=lambda _: counts)
    return tensor_parallel_plan(task, "Mine", model or Mixer(), tensor, sequence)


def test_names_may_have_stars() -> None:
    starred = {"*": "whole"} | {name.replace("mlp.", "m*."): word for name, word in WHOLE.items() if name != "norm"}
    assert planned(starred | {"": "causal"}, sequence=True) == WHOLE | {"": "causal"}
    assert planned(WHOLE, 4) == WHOLE, "7 tokens on 4 ranks"


NOT_THERE = {name: word for name, word in WHOLE.items() if name != "norm"}
FAULTS = {
    "no plan": (lambda: planned(None), "task=Mine: says nothing of how ranks could share .*; give the task tensor_p"),
    "no such module": (lambda: planned(WHOLE | {"mlp.left": "rows"}), "names mlp.left, which fits no module"),
    "no such word": (lambda: planned(WHOLE | {"norm": "hole"}), "says hole of norm; allowed are embedding, gather,"),
    "another layer": (lambda: planned(WHOLE | {"norm": "rows"}), "says rows of norm, a LayerNorm; allowed .* Linear"),
    "left out": (lambda: planned(NOT_THERE), "leaves out norm, which has norm.weight; say embedding, columns"),
    "tied": (lambda: planned(WHOLE, model=Mixer(tied=True)), "table.weight and head.weight are one tensor"),
    "dropout": (lambda: planned(WHOLE, model=Mixer(p=0.1)), "mlp.drop drops activations .*; set its p to 0"),
    "features": (lambda: planned(WHOLE, 5), "tensor=5: does not divide mlp.up=12; allowed .* are 1, 2, 3, 4$"),
    "heads": (
        lambda: planned(WHOLE, 4, heads=6),
        "tensor=4: does not divide heads=6; allowed for this model are 1, 2, 3$",
    ),
    "vocabulary": (
        lambda: planned(WHOLE, 6),
        "tensor=6: leaves a rank without any of the 7 tokens; allowed .* 1, 2, 3, 4$",
    ),
    "no end": (lambda: planned(WHOLE | {"head": "whole"}, sequence=True), "sequence_parallel=true: needs .* an output"),
    "not gathered": (
        lambda: planned({name: word for name, word in WHOLE.items() if name != "mlp"}, sequence=True),
        "sequence_parallel=true: mlp.up needs the whole sequence; name the module around it",
    ),
}


def test_ranks_that_share_a_model_have_no_samples_of_their_own() -> None:
    task = SimpleNamespace(tensor_parallel_plan=lambda _: WHOLE, stream_per_rank=True)
    assert tensor_parallel_plan(task, "Mine", Mixer(), 1, False) == WHOLE
    with pytest.raises(
        UserError, match="task=Mine: stream_per_rank gives each rank samples of its own, and the 2 ranks"
    ):
        tensor_parallel_plan(task, "Mine", Mixer(), 2, False)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_said(fault: str) -> None:
    call, words = FAULTS[fault]
    with pytest.raises(UserError, match=words) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_the_built_in_task_has_one() -> None:
    task = Language(kv_heads=4)
    model = task.build_model()
    config: GPTConfig = model.config  # type: ignore[assignment]
    assert config.kv_heads == 4
    plan = tensor_parallel_plan(task, "language", model, 4, sequence=True)
    assert list(plan.values()).count("rows") == 2 * config.layers
    with pytest.raises(UserError, match=r"task.kv_heads=3: does not divide the 4 heads; allowed are 1, 2, 4"):
        Language(kv_heads=3)


@pytest.mark.parametrize(
    ("ranks", "words", "said"),
    [
        (2, "task=images", "task=images: says nothing of how ranks could share its model's layers; give the task"),
        (4, "tensor=4", "tensor=4: does not divide kv_heads=2; allowed for this model are 1, 2$"),
        (
            3,
            "",
            "tensor=2: 2 ranks share a copy of the model, and 3 ranks cannot be divided into such copies; set nproc",
        ),
        (2, "compile=true", "compile=true: is for layers that a rank computes by itself"),
        (
            6,
            "global_batch_size=16",
            "global_batch_size=16: the global batch must divide by 3 copies; nearest .* 15, 18$",
        ),
    ],
)
def test_a_command_that_cannot_be_is_refused_in_one_line(ranks: int, words: str, said: str) -> None:
    config = compose_config(tensor_parallel.train, "global_batch_size=48", *words.split())
    with pytest.raises(UserError, match=f"^{said}") as raised:
        validate(config, tensor_parallel.train, ranks)
    assert "\n" not in str(raised.value)
