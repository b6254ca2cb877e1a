"""Where two trainings part is named by layer and operation: by `recipes.diff`, and of the museum by verify's trace."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lockstep.errors import UserError
from lockstep.launch.validate import validate
from lockstep.models.gpt import GPT_SIZES, GPTConfig
from lockstep.recipe import Recipe
from lockstep.registry import get_recipe
from recipes import ddp, diff, single, verify
from tests.helpers.harness import assert_equal, compose_config, execute, train, verify_rows

pytestmark = pytest.mark.usefixtures("narrow")

GROUP = ("model.norm=group", "precision=fp64")
OF_IMAGES, OF_GPT = "layer2.1.conv1", "blocks.1.mlp.up"


@pytest.fixture(autouse=True)
def _narrow_gpt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GPT_SIZES, "nano", GPTConfig(layers=2, width=32, heads=4, kv_heads=2, hidden=32))


class Wrong(torch.autograd.Function):
    """The identity, but that forward or backward is a little too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.factor = backward
        return x * forward

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * ctx.factor, None, None


def with_bug(recipe: Recipe, layer: str, forward: float = 1.0, backward: float = 1.0) -> Recipe:
    """The same recipe, in whose model one layer computes something else."""

    def wrong(run: Any) -> None:
        build = run.task.build_model

        def build_model() -> Any:
            model = build()
            model.get_submodule(layer).register_forward_hook(lambda m, x, y: Wrong.apply(y, forward, backward))
            return model

        run.task.build_model = build_model
        recipe.train(run)

    return replace(recipe, train=wrong)


def parting(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "diff.json").read_text()))


CASES = {
    "ddp": (OF_IMAGES, ("model.norm=group",)),
    "fsdp": (OF_IMAGES, ("model.norm=group",)),
    "pipeline_parallel": (OF_IMAGES, ("model.norm=group",)),
    "tensor_parallel": (OF_GPT, ()),
    "context_parallel": (OF_GPT, ("by=ulysses",)),
}


@pytest.mark.slow_except("ddp-forward")
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("name", CASES)
def test_a_bug_in_one_layer_is_named_exactly(
    name: str, where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    layer, words = CASES[name]
    broken = with_bug(get_recipe(name), layer, **{where: 1.001})
    monkeypatch.setattr(diff, "get_recipe", lambda each: broken if each == name else get_recipe(each))
    with pytest.raises(AssertionError, match=f"{name} and single part in step 1, in its {where}: {layer}, "):
        execute(diff.train, tmp_path / "run", 2, f"runs=[{name},single]", "precision=fp64", "record_tensors=1", *words)
    found = parting(tmp_path / "run")
    first = found["first"]
    kind = "Linear" if layer == OF_GPT else "Conv2d"
    assert (first["layer"], first["phase"], found["kind"]) == (layer, where, kind)
    assert found["operation"] == (f"{kind}.forward" if where == "forward" else f"backward of {kind}")
    assert first["tensor"] == ("its output" if where == "forward" else "gradient of its input")
    assert first["off"] == pytest.approx(1e-3, rel=1e-3) or name == "context_parallel"
    assert first["factor"] == pytest.approx(1.001)
    assert "aten.mul at test_first_difference.py:" in found["inside"] or where == "backward"
    assert "aten.mul at WrongBackward" in found["inside"] or where == "forward"
    assert not list((tmp_path / "run").glob("*/tensors")), "what was recorded is not kept"


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, "expert_parallel"])
def test_what_is_equal_is_said_to_be(name: str, tmp_path: Path) -> None:
    words = CASES[name][1] if name in CASES else ("task.experts=4",)
    execute(diff.train, tmp_path / "run", 2, f"runs=[{name},single]", "precision=fp64", *words)
    found = parting(tmp_path / "run")
    assert found["first"] is None
    assert found["steps"] == 2
    assert found["compared"] > 200
    assert 0 < found["largest"][0]["off"] <= 1e-10


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, narrow: None) -> dict[str, Path]:
    """Folders of runs that have recorded their first step, and of one that has not."""
    out = tmp_path_factory.mktemp("recorded")
    short = ("max_steps=2", "global_batch_size=28", "eval_every=0", *GROUP)
    train(ddp.train, out / "ddp", 2, *short, "record_tensors=1")
    train(single.train, out / "single", 1, *short, "record_tensors=1")
    train(ddp.train, out / "off", 2, *short)
    train(ddp.train, out / "seed", 2, *short, "record_tensors=1", "seed=1")
    train(single.train, out / "batch", 1, *short, "record_tensors=1", "global_batch_size=14")
    train(single.train, out / "gpt", 1, "task=language", "max_steps=1", "global_batch_size=28", "record_tensors=1")
    return {path.name: path for path in out.iterdir()}


def test_recording_changes_no_bit(recorded: dict[str, Path]) -> None:
    weights = [torch.load(recorded[name] / "model.pt", weights_only=True) for name in ("ddp", "off")]
    assert_equal(*weights)


def test_folders_of_two_runs_are_compared(recorded: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    said = {}
    for name, code in (("single", 0), ("seed", 1)):
        assert diff.train.alone(compose_config(diff.train, str(recorded["ddp"]), str(recorded[name]))) == code
        said[name] = capsys.readouterr().out.splitlines()
        assert all(len(line) <= 80 for line in said[name][2:]), "but for the folders' names"
    assert any(line.startswith("equal: A and B by ") for line in said["single"])
    assert "A and B part in step 1, before its forward" in said["seed"]
    assert "  layer      conv1 (Conv2d)" in said["seed"]


@pytest.mark.parametrize(
    ("names", "wrong"),
    [
        (("ddp", "off"), "its run has recorded no tensors; train it with record_tensors=2"),
        (("ddp", "nowhere"), "nowhere: no such folder, and no recipe"),
        (("ddp", "batch"), "global_batch_size=28 in .*, 14 in "),
        (("ddp", "gpt"), "has conv1, and the other model has no such layer"),
        (("ddp",), "name two: python -m recipes.diff A B"),
    ],
)
def test_what_cannot_be_compared_is_refused(names: tuple[str, ...], wrong: str, recorded: dict[str, Path]) -> None:
    words = [str(recorded.get(name, name)) for name in names]
    with pytest.raises(UserError, match=wrong):
        diff.train.alone(compose_config(diff.train, *words))


def test_a_recipe_and_a_folder_are_refused(recorded: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="ddp is a recipe, and the other is not; name two of one kind"):
        diff.train.alone(compose_config(diff.train, "ddp", str(recorded["single"])))


def test_ranks_started_by_hand_do_not_read_folders() -> None:
    with pytest.raises(UserError, match="runs=here: folders are read by one process"):
        validate(compose_config(diff.train, "here", "there"), diff.train, 2)


def test_a_missing_or_damaged_rank_is_named(recorded: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    (copy / "tensors").mkdir(parents=True)
    for path in ("config.yaml", "tensors/step-1-rank-0.pt"):
        (copy / path).write_bytes((recorded["ddp"] / path).read_bytes())
    words = (str(copy), str(recorded["single"]))
    with pytest.raises(UserError, match="of step 1 the files of 1 rank are missing"):
        diff.train.alone(compose_config(diff.train, *words))
    (copy / "tensors" / "step-1-rank-0.pt").write_bytes(b"half a file")
    with pytest.raises(UserError, match="step 1 in tensors/ cannot be read"):
        diff.train.alone(compose_config(diff.train, *words))


@pytest.mark.parametrize("words", [("record_tensors=1",), ("trace=true",)])
def test_compiled_layers_are_not_looked_at(words: tuple[str, ...]) -> None:
    tool = verify.train if "trace=true" in words else ddp.train
    with pytest.raises(UserError, match="compile=true melts them; leave one out"):
        validate(compose_config(tool, "compile=true", *words), tool, 2)


MUSEUM = {
    # bug: (phase, layer, a part of the operation)
    "recomputed-dropout-is-another": ("backward", "blocks.1.dropout", "backward of Dropout"),
    "positions-from-0-on-every-rank": ("forward", "blocks.0.attention.output", "Attention.forward, in front of it"),
    "divided-by-the-ranks-twice": ("backward", "", "backward of the loss"),
    "experts-gradients-doubled": ("gradients", "blocks.1.mlp.experts", "what is done to gradients after backward"),
    "norms-gradients-not-added-up": ("gradients", "norm", "what is done to gradients after backward"),
    "stages-clipped-by-their-own-norm": ("weights", "conv1", "the update: clipping"),
    "ranks-start-apart": ("start", "embedding", "the weights before training"),
}


INSIDE = {
    "recomputed-dropout-is-another": "aten.mul at MulBackward0, 1 of 1, off by ",
    "divided-by-the-ranks-twice": "aten.nll_loss_backward at NllLossBackward0, ",
    "positions-from-0-on-every-rank": "aten._to_copy at gpt.py:",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUSEUM)
def test_verify_names_the_operation_of_a_museum_s_bug(name: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=f"museum={name}: is found in"):
        execute(verify.train, tmp_path / "run", 2, f"museum={name}", "trace=true")
    (row,) = verify_rows(tmp_path / "run")
    phase, layer, operation = MUSEUM[name]
    first = row["parting"]["first"]
    assert (first["step"], first["phase"], first["layer"]) == (1, phase, layer)
    assert operation in row["parting"]["operation"]
    assert row["parting"]["inside"].startswith(INSIDE.get(name, ""))
