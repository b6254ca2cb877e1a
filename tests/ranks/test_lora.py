"""LoRA: the trained weights stay to the last bit, two small matrices a layer are trained and sent, and merge."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lockstep.models.lora import ADAPTER, LoraConv2d, LoraLinear, adapt, adaptable, merged
from recipes import ddp, lora, single
from tests.helpers.harness import assert_equal, execute, lines, result, tensors_of, train
from tests.helpers.traffic import count_traffic

pytestmark = pytest.mark.usefixtures("narrow")

DATA = ("global_batch_size=48", "epochs=2", "log_every=1", "max_steps=8", "model.norm=group")
LOW, HIGH = "data.classes=[0,1,2,3,4]", "data.classes=[5,6,7,8,9]"
TEXT = ("task=language", "global_batch_size=12", "precision=fp64", "log_every=1", "max_steps=3")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the digits 0 to 4."""
    out = tmp_path_factory.mktemp("base") / "run"
    execute(ddp.train, out, 2, *DATA, LOW)
    return out


def plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.endswith(ADAPTER)}


class Mixed(nn.Module):
    """Layers that can be adapted, and two that cannot: a grouped convolution, and one that is read and never called."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=3)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.last = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.strided(x)).flatten(2).transpose(1, 2)
        return self.last(self.attention(x, x, x)[0])


def test_an_adapted_model_begins_as_the_trained_one_and_merges_into_one_like_it() -> None:
    torch.manual_seed(0)
    model, x = Mixed().double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    names, before = list(model.state_dict()), model(x)
    assert adaptable(model) == {"strided": 6, "last": 5}
    adapt(model, adaptable(model), rank=2, alpha=6)
    assert isinstance(model.strided, LoraConv2d)
    assert isinstance(model.last, LoraLinear)
    assert torch.equal(model(x), before), "B is zero"
    for layer in (model.strided, model.last):
        nn.init.normal_(layer.lora_b)
    adapted, whole = model(x), merged(model)
    assert (adapted - before).abs().max() > 0.1
    torch.testing.assert_close(whole(x), adapted, rtol=1e-12, atol=1e-12)
    assert list(whole.state_dict()) == names
    assert {type(module) for module in whole.modules()} == {type(module) for module in Mixed().modules()}
    expected = model.last.weight + 3 * model.last.lora_b @ model.last.lora_a  # the paper's W + (α / r) B A
    torch.testing.assert_close(whole.last.weight, expected)


def test_only_the_matrices_change_and_what_is_exported_is_a_plain_model(base: Path, tmp_path: Path) -> None:
    there = torch.load(base / "model.pt", weights_only=True)
    words = (*DATA, HIGH, f"resume={base}", "r=2", "layers=[layer1.*,layer4.?.conv1]")
    apart = train(lora.train, tmp_path / "apart", 2, *words, "merge=false")
    assert_equal(plain(apart), there)
    found = {name for name in apart if name.endswith(ADAPTER)}
    chosen = {
        name.removesuffix(".weight")
        for name, tensor in there.items()
        if tensor.dim() == 4 and (name.startswith("layer1.") or re.match(r"layer4\..\.conv1\.", name))
    }
    assert found == {f"{layer}.{kind}" for layer in chosen for kind in ADAPTER}
    whole = train(lora.train, tmp_path / "whole", 2, *words)
    assert whole.keys() == there.keys()
    for name, tensor in whole.items():
        layer = name.removesuffix(".weight")
        product = 8 * apart[f"{layer}.lora_b"] @ apart[f"{layer}.lora_a"] if f"{layer}.lora_b" in apart else None
        expected = there[name] if product is None else there[name] + product.view_as(there[name])
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)
    told = result(tmp_path / "whole")
    assert told["trainable_parameters"] == sum(apart[name].numel() for name in found)
    assert told["resumed_from"] == str(base)
    evaluated = [
        [line["eval_loss"] for line in lines(tmp_path / out) if "eval_loss" in line] for out in ("whole", "apart")
    ]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-5), "it is evaluated as it is exported"


def test_a_new_head_is_trained_whole(base: Path, tmp_path: Path) -> None:
    words = (*DATA, "data.classes=[7,8,9]", f"resume={base}", "new_head=true", "merge=false")
    mine = train(lora.train, tmp_path / "run", 2, *words)
    there = torch.load(base / "model.pt", weights_only=True)
    assert (mine["fc.weight"].shape, there["fc.weight"].shape) == ((3, 32), (5, 32))
    assert not any(name.startswith("fc.lora") for name in mine)
    rest = {name: tensor for name, tensor in plain(mine).items() if not name.startswith("fc.")}
    assert_equal(rest, {name: tensor for name, tensor in there.items() if not name.startswith("fc.")})


def test_ranks_send_the_gradients_of_the_matrices_alone(tmp_path: Path) -> None:
    ranks = count_traffic(
        lora.train, tmp_path / "run", 2, *TEXT, "weights=random", "r=4", "merge=false", "eval_every=0"
    )
    state = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    size = sum(tensor.nbytes for name, tensor in state.items() if name.endswith(ADAPTER))
    assert 0 < size < 0.3 * sum(tensor.nbytes for tensor in state.values())
    for *_, last in ranks:  # in the first two DDP also agrees on its buckets
        assert last == {"allreduce_": size + 8}, "and the number of the batch's tokens"


@pytest.mark.slow
def test_a_gpt_is_adapted_as_by_one_process_and_resumes_on_other_ranks(tmp_path: Path) -> None:
    execute(single.train, tmp_path / "base", 1, *TEXT)
    words = (*TEXT, f"resume={tmp_path / 'base'}", "r=4", "checkpoint.every=1", "merge=false")
    whole = train(lora.train, tmp_path / "one", 1, *words)
    mine: dict[str, Tensor] = {}
    for steps, ranks in ((1, 3), (2, 1), (3, 2)):
        mine = train(lora.train, tmp_path / "run", ranks, *words, f"max_steps={steps}")
    assert mine.keys() == whole.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-10, atol=1e-12)
    saved = tensors_of(tmp_path / "run" / "checkpoints" / "step-00000003")
    moments = {name for name in saved if name.startswith("optim.")}
    assert moments
    assert all(name.rpartition(".")[0].endswith(ADAPTER) for name in moments), "no other weight has a state"
