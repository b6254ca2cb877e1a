"""Weights that people have: taken under whatever name the model has in the file, or one line says which to name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor

from lockstep.checkpoint.prefixes import Fit
from lockstep.checkpoint.weights import load_weights
from lockstep.errors import UserError
from lockstep.tasks.build import sketch
from recipes import ddp, transfer_learning
from tests.helpers.command_line import assert_one_line, run_main
from tests.helpers.harness import compose_config, execute, result

pytestmark = pytest.mark.usefixtures("narrow")

Weights = dict[str, Tensor]


def wanted() -> Weights:
    """The names and shapes of the narrow ResNet-18 for digits."""
    return sketch(compose_config(ddp.train, "model.num_classes=10", "model.image_size=8")).state_dict()


@pytest.fixture(scope="module")
def mine(narrow: None) -> Weights:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(like.shape, generator=generator) if like.is_floating_point() else torch.tensor(7)
        for name, like in wanted().items()
    }


def under(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


def of_fsdp(weights: Weights) -> Weights:
    """As with use_orig_params, and a wrapper for each layer."""
    inner = {name.replace("layer1.", "layer1._fsdp_wrapped_module."): each for name, each in weights.items()}
    return under("_fsdp_wrapped_module.", inner)


FILES = {  # what people have in a file: (made of the weights, what is said of it)
    "plain": (lambda it: it, ""),
    "torch.compile": (lambda it: under("_orig_mod.", it), "; stripped from their names: _orig_mod."),
    "DDP": (lambda it: under("module.", it), "; stripped from their names: module."),
    "compiled in DDP": (lambda it: under("module._orig_mod.", it), "names: module., _orig_mod."),
    "DDP compiled": (lambda it: under("_orig_mod.module.", it), "names: module., _orig_mod."),
    "a script's": (
        lambda it: {"model": it, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "args": argparse.Namespace()},
        "; stripped from their names: model.",
    ),
    "Lightning's": (
        lambda it: {"state_dict": under("model.", it) | {"criterion.weight": torch.ones(10)}, "epoch": 3},
        "names: state_dict.model.; left out beside them: 1 tensor (state_dict.criterion.weight)",
    ),
    "a module's own name": (lambda it: {"state_dict": under("net.", it)}, "names: state_dict.net."),
    "DeepSpeed's": (lambda it: {"module": it, "ds_version": "0.1", "buffer_names": []}, "names: module."),
    "an average's": (
        lambda it: under("module.", it) | {"n_averaged": torch.tensor(3)},
        "left out beside them: 1 tensor (n_averaged)",
    ),
    "a copy within": (lambda it: it | under("ema.", it), "tensors (ema.conv1.weight, …)"),
    "FSDP's": (of_fsdp, "; stripped from their names: _fsdp_wrapped_module."),
}
REFUSED: dict[str, tuple[Any, list[str]]] = {
    "averages beside": (
        lambda it: {"model": it, "model_ema": it},
        ["holds 2 sets of weights that fit, under model., model_ema.", "resume_prefix=model."],
    ),
    "two submodules": (
        lambda it: {"state_dict": under("student.", it) | under("teacher.", it)},
        ["under state_dict.student., state_dict.teacher.", "resume_prefix=state_dict.student."],
    ),
    "flat shards": (
        lambda it: {"_flat_param": torch.ones(9)},
        ["one rank's part of what FSDP", "full_state_dict=True"],
    ),
    "stage 3": (
        lambda it: {"module": {name: torch.empty(0) for name in it}},
        ["conv1.weight is empty", "zero_to_fp32"],
    ),
    "other names": (
        lambda it: {name.replace("conv", "convolution"): tensor for name, tensor in it.items()},
        ["convolution1.weight and the like", "the model has conv1.weight", "rename them"],
    ),
    "no head": (
        lambda it: {"state_dict": {f"model.{name}": it[name] for name in it if "fc" not in name}},
        ["holds no state_dict.model.fc.weight"],
    ),
}
RIGHT_MODEL = set(REFUSED) - {"no head"}


def saved(content: Any, folder: Path) -> Path:
    torch.save(content, folder / "file.pt")
    return folder / "file.pt"


def assert_taken(found: tuple[Weights, Fit], mine: Weights, said: str) -> None:
    weights, fit = found
    assert weights.keys() == mine.keys()
    assert all(torch.equal(weights[name], mine[name]) for name in mine)
    assert said in fit.said() if said else fit.said() == ""


@pytest.mark.parametrize("whose", FILES)
def test_what_stands_before_the_names_is_stripped_and_said(whose: str, mine: Weights, tmp_path: Path) -> None:
    make, said = FILES[whose]
    assert_taken(load_weights(saved(make(mine), tmp_path), wanted()), mine, said)


@pytest.mark.parametrize("before", ["", "module."])
def test_a_file_of_safetensors(before: str, mine: Weights, tmp_path: Path) -> None:
    save_file(under(before, mine), tmp_path / "model.safetensors")
    said = f"names: {before}" if before else ""
    assert_taken(load_weights(tmp_path / "model.safetensors", wanted()), mine, said)
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(UserError, match="not a file of safetensors"):
        load_weights(tmp_path / "torn.safetensors", wanted())


@pytest.mark.parametrize("whose", REFUSED)
def test_what_is_unclear_is_one_line_that_says_what_to_name(whose: str, mine: Weights, tmp_path: Path) -> None:
    make, parts = REFUSED[whose]
    with pytest.raises(UserError) as caught:
        load_weights(saved(make(mine), tmp_path), wanted())
    assert all(part in str(caught.value) for part in parts), caught.value
    assert ("set model=" in str(caught.value)) == (whose not in RIGHT_MODEL)


@pytest.mark.parametrize("prefix", ["model_ema", "model_ema.", "_orig_mod.model_ema."])
def test_resume_prefix_chooses_between_two(prefix: str, mine: Weights, tmp_path: Path) -> None:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in mine.items()}
    file = saved({"model": zeros, "model_ema": under("_orig_mod.", mine)}, tmp_path)
    assert_taken(
        load_weights(file, wanted(), prefix), mine, "left out beside them: 116 tensors (model.conv1.weight, …)"
    )


def test_counters_of_before_pytorch_0_4_1_begin_at_0(mine: Weights, tmp_path: Path) -> None:
    old = {name: tensor for name, tensor in mine.items() if "num_batches_tracked" not in name}
    weights, fit = load_weights(saved(under("module.", old), tmp_path), wanted())
    assert "num_batches_tracked of 19 layers is not there, and begins at 0" in fit.said()
    assert weights.keys() == mine.keys()
    assert weights["bn1.num_batches_tracked"].item() == 0


@pytest.mark.parametrize("before", ["", "model.", "app.model."])
def test_a_folder_of_torch_distributed_checkpoint_s(before: str, mine: Weights, tmp_path: Path) -> None:
    """With an optimizer, and things that are no tensors, which are never unpickled."""
    state = under(before, mine) | {"optimizer.state.conv1.weight.exp_avg": torch.ones(3), "epoch": 3}
    dcp.save(state, checkpoint_id=tmp_path / "folder", no_dist=True)
    assert_taken(
        load_weights(tmp_path / "folder", wanted()), mine, f"stripped from their names: {before}" if before else ""
    )


def test_a_folder_of_deepspeed_s(mine: Weights, tmp_path: Path) -> None:
    """The one that `latest` names, and where its weights are in several files, how they become one."""
    (tmp_path / "step9").mkdir()
    (tmp_path / "latest").write_text("step9")
    torch.save({"module": mine}, tmp_path / "step9" / "mp_rank_00_model_states.pt")
    for folder in (tmp_path, tmp_path / "step9"):
        assert_taken(load_weights(folder, wanted()), mine, "stripped from their names: module.")
    torch.save({"module": mine}, tmp_path / "step9" / "mp_rank_01_model_states.pt")
    with pytest.raises(UserError, match=r"in 2 files there, such as mp_rank_00.*zero_to_fp32.py"):
        load_weights(tmp_path, wanted())


BAD = {
    "resume_prefix=model.": ["resume_prefix=model.", "set resume=FILE, or leave it out"],
    "resume=FILE resume_prefix=x": ["resume_prefix=x", "none of the model's weights under it", "module., other."],
    "resume=FILE": ["2 sets of weights that fit, under module., other.", "resume_prefix=module."],
}


@pytest.mark.parametrize("words", BAD)
def test_the_command_refuses_in_one_line(
    words: str, mine: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    file = saved(under("module.", mine) | under("other.", mine), tmp_path)
    assert run_main(ddp.train, words.replace("FILE", str(file)).split(), monkeypatch) == 2
    assert_one_line(capfd, BAD[words])
    assert list(Path().iterdir()) == []


def test_runs_start_from_them(mine: Weights, tmp_path: Path) -> None:
    """All of them, from a folder; and a backbone, whose head has other classes, from a file."""
    short = ("max_steps=1", "epochs=1", "optim.lr=0", "eval_every=0", "global_batch_size=48")
    dcp.save({"model": mine}, checkpoint_id=tmp_path / "folder", no_dist=True)
    execute(ddp.train, tmp_path / "ddp", 1, *short, f"resume={tmp_path / 'folder'}")
    file = saved({"model": under("module.", mine), "model_ema": mine}, tmp_path)
    chosen = (f"resume={file}", "resume_prefix=model.module", "data.classes=[7,8,9]")
    execute(transfer_learning.train, tmp_path / "transfer", 1, *short, *chosen)
    for name in ("ddp", "transfer"):
        found = torch.load(tmp_path / name / "model.pt", weights_only=True)
        assert all(
            torch.equal(found[each], mine[each]) for each in found if each.endswith("weight") and "fc" not in each
        )
        assert result(tmp_path / name)["resumed_from"]
        assert "stripped from their names: model." in (tmp_path / name / "ranks" / "0.log").read_text()
