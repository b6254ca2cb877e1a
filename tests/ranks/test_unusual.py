"""Trainings that are no plain stack of trained layers on a power of two of ranks: `recipes.verify` holds each technique to
one process there too, or the technique refuses; and a mistake in each of them is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lockstep.models.gpt import GPT_SIZES, GPTConfig
from recipes import verify
from tests.helpers import unusual_task
from tests.helpers.changed_recipe import put_changed_recipe
from tests.helpers.harness import execute, verify_rows

TASK = f"task={unusual_task.__file__}:Unusual"
TEXT = "the quick brown fox jumps over the lazy dog, and over it again. " * 16  # of 29 different characters
SHARED = "are one tensor"
WITHIN = "which are one parameter, would be in parts 0 and 1"
COPIES = (
    "ddp zero1 grad_accumulation activation_checkpointing comm_hooks local_sgd lora expert_parallel context_parallel"
)
CUT = "fsdp tensor_parallel parallel_mesh model_parallel pipeline_parallel"
# By what is unusual: the words that ask for it, ranks, recipes that are equal, and {recipe: why it is not run}.
CASES: dict[str, tuple[tuple[str, ...], int, str, dict[str, str]]] = {
    "frozen, where models are cut": (("task.frozen=true",), 2, CUT, {}),
    "frozen": (("task.frozen=true",), 2, COPIES, {}),
    "tied": (
        ("task.tied=true",),
        2,
        COPIES,
        dict.fromkeys(("fsdp", "tensor_parallel"), SHARED)
        | dict.fromkeys(("model_parallel", "pipeline_parallel"), WITHIN),
    ),
    "used twice": (
        ("task.twice=true",),
        2,
        COPIES,
        dict.fromkeys(("fsdp", "tensor_parallel", "parallel_mesh"), SHARED)
        | dict.fromkeys(("model_parallel", "pipeline_parallel"), WITHIN),
    ),
    "dropout": (
        ("task.dropout=0.2",),
        2,
        f"{COPIES} fsdp tensor_parallel parallel_mesh model_parallel lightning_fabric",
        {"pipeline_parallel": "dropout: a stage after the first does not see the samples"},
    ),
    "accumulated": (("accumulate=2",), 2, f"{COPIES} fsdp tensor_parallel", {}),
    "two optimizers": (("optim=muon",), 2, "ddp zero1 fsdp parallel_mesh", {}),
    "3 ranks": ((), 3, "ddp fsdp zero1 lightning_fabric", {"expert_parallel": "expert=2"}),
    "3 ranks share": (("task.sequence_length=18",), 3, "context_parallel", {"tensor_parallel": "tensor=3"}),
    "5 ranks": ((), 5, "ddp fsdp zero1 local_sgd", {}),
}
OWN = {"3 ranks share": ("context=3", "tensor=3")}
QUICK = "frozen, where models are cut"


@pytest.fixture(autouse=True)
def _narrow_gpt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GPT_SIZES, "nano", GPTConfig(layers=2, width=32, heads=4, kv_heads=2, hidden=30))


def verified(folder: Path, case: str, recipes: list[str], *more: str) -> list[dict[str, Any]]:
    words, ranks, _, _ = CASES[case]
    (folder / "text.txt").write_text(TEXT)
    common = (TASK, "task.data=text", f"task.text={folder}/text.txt", "task.samples=0", "task.kv_heads=2", "threads=1")
    common += ("precision=fp64", "max_steps=2", f"global_batch_size={12 if ranks < 5 else 15}")
    common += ("task.sequence_length=16",) if not any("length" in word for word in words) else ()
    execute(
        verify.train,
        folder / "run",
        ranks,
        *common,
        *words,
        *OWN.get(case, ()),
        f"recipes=[{','.join(recipes)}]",
        *more,
        timeout=300,
    )
    return verify_rows(folder / "run")


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.soak] * (case != QUICK)) for case in CASES])
def test_they_are_equal_to_one_process_or_refused(case: str, tmp_path: Path) -> None:
    _, _, equal, refused = CASES[case]
    rows = verified(tmp_path, case, [*equal.split(), *refused])
    found = {name: {row["verdict"] for row in rows if row["recipe"] == name} for name in [*equal.split(), *refused]}
    for name in equal.split():
        assert "equal" in found[name], (name, found[name])
        assert not any(verdict.startswith("OFF") for verdict in found[name]), (name, found[name])
    for name, why in refused.items():
        assert all(verdict.startswith("not run") and why in verdict for verdict in found[name]), (name, found[name])


# By what does not divide by the ranks: the model, ranks, words, recipes that are equal, {recipe and variant: why not}.
UNEVEN: dict[str, tuple[GPTConfig | None, int, str, str, dict[str, str]]] = {
    "11 classes": (
        None,
        4,
        "data=synthetic data.size=64 data.image_size=8 model.num_classes=11 model.norm=group global_batch_size=16",
        "ddp fsdp zero1 local_sgd model_parallel pipeline_parallel lora data_parallel transfer_learning",
        {},
    ),
    "vocabulary": (
        GPTConfig(layers=3, width=36, heads=6, kv_heads=3, hidden=30),
        3,
        "task=language task.sequence_length=18 task.kv_heads=3 tensor=3 context=3",
        "ddp fsdp zero1 lora tensor_parallel context_parallel",
        {},
    ),
    "heads": (
        GPTConfig(layers=2, width=40, heads=5, kv_heads=5, hidden=30),
        2,
        "task=language task.sequence_length=16 task.kv_heads=5",
        "fsdp parallel_mesh context_parallel",
        {
            "tensor_parallel": "tensor=2: does not divide heads=5; allowed for this model are 1, 5",
            "parallel_mesh": "tensor=2: does not divide heads=5; allowed for this model are 1, 5",
            "context_parallel by=ulysses": "context=2: by=ulysses gives each rank equally many heads, and the 5 heads do not "
            "divide; allowed for this model are 1, 5; or set by=ring",
        },
    ),
    "experts": (
        GPTConfig(layers=2, width=36, heads=3, kv_heads=3, hidden=30),
        3,
        "task=language task.sequence_length=16 task.kv_heads=3 expert=3",
        "",
        {"expert_parallel": "expert=3: does not divide the 4 experts of blocks.0.mlp.experts; allowed are 1, 2, 4"},
    ),
}


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.soak] * (case != "experts")) for case in UNEVEN]
)
def test_what_does_not_divide_by_the_ranks_is_equal_or_refused(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ranks, words, equal, refused = UNEVEN[case]
    common = ["precision=fp64", "max_steps=2", "threads=1", *words.split()]
    if model:
        monkeypatch.setitem(GPT_SIZES, "nano", model)
        (tmp_path / "text.txt").write_text(TEXT)
        common += ["task.data=text", f"task.text={tmp_path}/text.txt", "task.samples=0", "global_batch_size=12"]
    names = dict.fromkeys([*equal.split(), *(each.split()[0] for each in refused)])
    execute(verify.train, tmp_path / "run", ranks, *common, f"recipes=[{','.join(names)}]", timeout=300)
    rows = verify_rows(tmp_path / "run")
    for row in rows:
        whys = [why for label, why in refused.items() if label in (row["recipe"], f"{row['recipe']} {row['variant']}")]
        assert row["verdict"] == "equal" or any(f"not run: {why}" in row["verdict"] for why in whys), row
    assert {row["recipe"] for row in rows if row["verdict"] == "equal"} == set(equal.split())
    assert {row["recipe"] for row in rows if row["verdict"] != "equal"} == {each.split()[0] for each in refused}


WRAPS = "    model = DistributedDataParallel(model, device_ids"
BREAKS = {  # by what is unusual: the recipe, a line of it, and what stands before it in a broken copy
    "frozen": ("ddp", WRAPS, "    model.requires_grad_(True)\n"),
    "tied": (
        "ddp",
        WRAPS,
        "    model.output.weight = type(model.output.weight)(model.output.weight.detach().clone())\n",
    ),
    "used twice": ("ddp", WRAPS, "    model.blocks[1].mlp = __import__('copy').deepcopy(model.blocks[1].mlp)\n"),
    "dropout": ("ddp", "        for micro in micro_batches", "        model.module.dropout.p = 0.1\n"),
    "two optimizers": ("fsdp", "    scheduler = build", "    optimizer.param_groups[-1]['lr'] *= 1.001\n"),
    "3 ranks": ("fsdp", "        scaler.step(optimizer)", "        model.blocks[0].mlp.gate.weight.grad.mul_(1.001)\n"),
    "5 ranks": ("fsdp", "        scaler.step(optimizer)", "        model.blocks[0].mlp.gate.weight.grad.mul_(1.001)\n"),
}


@pytest.mark.soak
@pytest.mark.parametrize("case", BREAKS)
def test_a_mistake_in_one_is_named(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, line, mistake = BREAKS[case]
    put_changed_recipe(monkeypatch, name, line, mistake + line, count=1)
    with pytest.raises(AssertionError, match=f"not the training that recipes.single computes: {name} in fp64"):
        verified(tmp_path, case, [name])
