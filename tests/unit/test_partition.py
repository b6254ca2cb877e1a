"""Any model in parts: the same outputs and gradients, bit for bit, under the same names."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from lockstep.errors import UserError
from lockstep.models.blocks import default_blocks
from lockstep.parallel.partition import check_cut, choose_cuts, join, measure_units, split, units


class Block(nn.Module):
    """Its inside is Python that torch.fx cannot follow."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, length: int) -> Tensor:
        for row in range(2 if float(x.detach().sum()) > 1e9 else 1):
            x = x + self.inner(self.norm(x) * cos) * (row + 1) / length
        return x


class Gpt(nn.Module):
    """Tokens [N, T] to logits [N, T, 11]: a ModuleList, a buffer that is no state, a parameter used directly, a length
    that each block is told, the tokens themselves needed at the end, and an argument that has a default."""

    rope: Tensor

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.start = nn.Parameter(torch.randn(8))
        self.blocks = nn.ModuleList(Block(8) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 11, bias=False)
        self.register_buffer("rope", torch.randn(32, 8), persistent=False)
        self.register_buffer("scale", torch.tensor(2.0))
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        count, length = tokens.shape
        x = self.embedding(tokens) + self.start.expand(count, length, 8)
        for block in self.blocks:
            x = block(x, self.rope[:length], length)
        x = self.head(self.norm(x)) * self.scale + (tokens == 3).unsqueeze(-1)
        if targets is not None:
            return nn.functional.cross_entropy(x.flatten(0, 1), targets.flatten())
        return x.reshape(count, length, 11)


class Skip(nn.Module):
    """What the first block gives is needed by the last one too; inputs are a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.last = nn.Linear(12, 2)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        first = x = self.down[0](inputs["x"]).tanh()
        for layer in list(self.down)[1:]:
            x = layer(x).relu() + inputs["mask"].unsqueeze(1)
        return self.last(torch.cat([x, first], 1))


def images(side: int) -> Callable[[int], Any]:
    return lambda count: torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count))


def tokens(count: int) -> Tensor:
    return torch.randint(0, 11, (count, 4 + count), generator=torch.Generator().manual_seed(count))


def rows(count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return {"x": torch.randn(count, 6, generator=generator), "mask": torch.randn(count, generator=generator)}


def small_vit() -> nn.Module:
    model = models.VisionTransformer(16, 4, 6, 4, 32, 64, num_classes=10, dropout=0.1)
    nn.init.normal_(model.heads[0].weight)  # zeros, as torchvision leaves it, let no gradient through
    return model


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 9), nn.ReLU(inplace=True), nn.Linear(9, 9), nn.ReLU(inplace=True), nn.Linear(9, 4)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "vit": (small_vit, images(16)),
    "convnext_tiny": (lambda: models.convnext_tiny(num_classes=10), images(32)),
    "mobilenet_v3_small": (lambda: models.mobilenet_v3_small(num_classes=10), images(32)),
    "efficientnet_b0": (lambda: models.efficientnet_b0(num_classes=10), images(32)),
    "swin_t": (lambda: models.swin_t(num_classes=10), images(32)),
    "vgg11": (lambda: models.vgg11(num_classes=10), images(32)),
    "densenet121": (lambda: models.densenet121(num_classes=10), images(32)),
    "sequential": (perceptron, images(2)),
    "gpt": (Gpt, tokens),
    "skip": (Skip, rows),
}


def run(parts: list[Any], inputs: Any) -> Tensor:
    values: Any = (inputs,)
    for part in parts:
        values = part(*values) if isinstance(values, tuple) else part(values)
    assert isinstance(values, Tensor)
    return values


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow_except(*("2-vit", "2-gpt", "2-skip", "2-sequential"), "3-gpt")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [2, 3])
def test_the_parts_of_any_model_are_the_model(count: int, name: str) -> None:
    build, make = MODELS[name]
    torch.manual_seed(0)
    whole = build()
    cut = copy.deepcopy(whole)
    parts = split(cut, choose_cuts(cut, "even", count, make(2)))
    states = [part.state_dict() for part in parts]
    joined = {key: tensor for state in states for key, tensor in state.items()}
    assert joined.keys() == cut.state_dict().keys()
    assert all(tensor.data_ptr() == joined[key].data_ptr() for key, tensor in cut.state_dict().items())
    buffers = {key for key, _ in cut.named_buffers()}
    assert all(key in buffers for key in joined if sum(key in state for state in states) > 1), "a parameter twice"
    assert join(parts).state_dict().keys() == cut.state_dict().keys()
    for size in (4, 3):  # the parts are made for no size
        results = []
        for model, call in ((whole, whole), (cut, lambda inputs: run(parts, inputs))):
            torch.manual_seed(size)
            model.zero_grad()
            outputs = call(make(size))
            (outputs * torch.arange(outputs.numel()).reshape(outputs.shape)).sum().backward()
            results.append((outputs, gradients(model)))
        (expected, slopes), (found, mine) = results
        assert torch.equal(found, expected)
        assert slopes.keys() == mine.keys() == {key for key, _ in whole.named_parameters()}
        assert all(torch.equal(mine[key], slope) for key, slope in slopes.items())
    assert all(torch.equal(tensor, cut.state_dict()[key]) for key, tensor in whole.state_dict().items())
    with torch.no_grad():
        assert torch.equal(run([part.eval() for part in parts], make(2)), whole.eval()(make(2)))


def test_a_length_crosses_a_cut_without_the_tokens() -> None:
    """What the last part needs is told apart: the tokens themselves, for a comparison, or their shape alone."""
    model = Gpt()
    first, _ = split(model, ["blocks.2"])
    crossing = first(tokens(2))
    assert {(*x.shape, x.dtype) for x in crossing} == {
        (2, 6, 8, torch.float32),
        (6, 8, torch.float32),
        (2, 6, torch.int64),
    }
    assert "rope" in dict(first.named_buffers())
    assert "rope" not in first.state_dict(), "as in the model, it is no state"

    class Lengths(Gpt):
        def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
            length = tokens.shape[1]
            x = self.embedding(tokens)
            for block in self.blocks:
                x = block(x, self.rope[:length], length * 2)
            return self.head(x)

    crossing = split(Lengths(), ["blocks.1", "blocks.3"])[0](tokens(2))
    assert [tuple(x.shape) for x in crossing if not x.numel()] == [(2, 6, 0)]


def test_the_units_of_a_model() -> None:
    """The stem, each block, the head; a ReLU that works in place is one with what it works on."""
    assert list(units(perceptron()).values()) == [["0"], ["1", "2"], ["3", "4"], ["5"]]
    assert list(units(small_vit())) == [
        "conv_proj",
        *(f"encoder.layers.encoder_layer_{number}" for number in range(6)),
        "encoder.ln",
    ]
    assert units(small_vit())["encoder.ln"] == ["encoder.ln", "heads"]
    assert list(units(Gpt())) == ["embedding", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "norm"]
    assert list(units(Gpt(), ["blocks.2", "head"])) == ["embedding", "blocks.2", "head"]
    assert "features.1.0" in units(models.convnext_tiny())
    assert {"features.0", "classifier.3"} <= units(models.vgg11()).keys()
    assert default_blocks(models.resnet18())[:3] == ["layer1.0", "layer1.1", "layer2.0"]


def test_cuts_by_the_names_that_a_model_has() -> None:
    model = small_vit()
    layer = "encoder.layers.encoder_layer_3"
    assert choose_cuts(model, layer, 2, None) == [layer]
    assert choose_cuts(model, "even", 2, None) == [layer]
    assert choose_cuts(model, "auto", 2, None) == [layer]
    assert choose_cuts(models.resnet50(), "auto", 2, None) == ["layer3.0"]
    assert choose_cuts(Gpt(), ["blocks", "norm"], 3, None) == ["blocks.0", "norm"]
    found = choose_cuts(model, "balanced", 3, images(16)(2))
    assert sorted(found, key=list(units(model)).index) == found
    assert len(set(found)) == 2


def test_every_unit_s_cost_is_measured_whatever_crosses_the_cuts() -> None:
    for name in ("gpt", "skip", "sequential"):
        build, make = MODELS[name]
        model = build()
        costs = measure_units(model, make(3), rounds=1)
        assert len(costs) == len(units(model))
        assert min(costs) > 0
        assert not gradients(model)


class Decides(Gpt):
    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        if tokens.sum() > 7:
            tokens = tokens + 1
        return super().forward(tokens)


class Drops(Gpt):
    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        return nn.functional.dropout(super().forward(tokens), 0.5, self.training)


class Idle(Gpt):
    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        return self.head(self.embedding(tokens))


class Reused(Gpt):
    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens)
        for block in [*self.blocks, self.blocks[0]]:
            x = block(x, self.rope[:1], 1)
        return self.head(x)


@pytest.mark.parametrize(
    ("build", "names", "said"),
    [
        (Decides, None, ["Decides", "if tokens.sum() > 7:", "control flow", "blocks(model)"]),
        (Drops, None, ["Drops", "in training", "nn.Dropout"]),
        (Idle, None, ["Idle", "none of its blocks"]),
        (lambda: Gpt(tied=True), None, ["embedding.weight and head.weight", "parts 0 and 1"]),
        (Reused, None, ["blocks.0", "parts 0 and 1"]),
        (Gpt, ["blocks.9"], ["'blocks.9'", "no module of Gpt"]),
        (Gpt, [""], ["''", "no module of Gpt"]),
    ],
)
def test_what_cannot_be_cut_is_said_in_one_line(
    build: Callable[[], nn.Module], names: list[str] | None, said: list[str]
) -> None:
    with pytest.raises(UserError) as raised:
        check_cut(build, "even", 2, names)
    assert "\n" not in str(raised.value)
    assert all(word in str(raised.value) for word in said), str(raised.value)


def test_a_model_that_looks_at_its_weights_while_it_is_built_is_checked_too() -> None:
    """It cannot be built without memory; it is then built with, and the generators are as before."""

    class Looks(Gpt):
        def __init__(self) -> None:
            super().__init__()
            assert self.start.sum().item() < 100

    state = torch.get_rng_state()
    check_cut(Looks, "blocks.1", 2, lambda model: [name for name in default_blocks(model) if "blocks" in name])
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(UserError, match=r"cut=blocks\.9: not a layer"):
        check_cut(Looks, "blocks.9", 2)
