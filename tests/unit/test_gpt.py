"""The GPT: what each of its parts promises, and that recipes can cut, shard, compile and trace it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.nn import functional as F

from lockstep.models.generate import generate
from lockstep.models.gpt import GPT, GPT_SIZES, Block, GPTConfig, gpt_config, rotate, rotation
from lockstep.models.parameters import count_parameters

SMALL = GPTConfig(layers=2, width=32, heads=4, kv_heads=2, hidden=48, vocabulary=11)


def gpt(config: GPTConfig = SMALL, dtype: torch.dtype = torch.float64) -> GPT:
    torch.manual_seed(0)
    return GPT(config).to(dtype)


def some_tokens(count: int, length: int, vocabulary: int = 11) -> Tensor:
    return torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(1))


# Attention ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 5, 15])
def test_a_token_changes_no_logits_before_it(place: int) -> None:
    model, tokens = gpt(), some_tokens(3, 16)
    other = tokens.clone()
    other[:, place] = (other[:, place] + 1) % 11
    before, after = model(tokens), model(other)
    assert torch.equal(before[:, :place], after[:, :place])
    changed = (before[:, place:] - after[:, place:]).abs().amax(-1)
    assert changed.min() > 1e-6, "and every one from it on"


@pytest.mark.parametrize("length", [1, 2, 7, 64, 300])
def test_any_length_is_a_prefix_of_a_longer_one(length: int) -> None:
    model, tokens = gpt(), some_tokens(2, 300)
    assert torch.allclose(model(tokens[:, :length]), model(tokens)[:, :length], atol=1e-12)


def test_a_score_depends_on_how_far_apart_two_positions_are_alone() -> None:
    query, key = torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    cos, sin = rotation(torch.arange(40), 16, 10_000.0, query)
    turned = [rotate(each.expand(1, 1, 40, 16), cos, sin)[0, 0] for each in (query, key)]
    scores = turned[0] @ turned[1].T
    for apart in range(-39, 40):
        diagonal = scores.diagonal(apart)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-12)
    assert scores[0].std() > 0.01, "and it does depend on that"
    assert torch.allclose(turned[0].norm(dim=-1), query.norm().expand(40)), "a rotation keeps lengths"


def test_the_angles_are_those_of_the_paper() -> None:
    """Pair i of head_width / 2 turns by position · 10000^(−2i / head_width)."""
    cos, sin = rotation(torch.arange(5), 8, 10_000.0, torch.zeros((), dtype=torch.float64))
    for position in range(5):
        for pair, speed in enumerate((1.0, 0.1, 0.01, 0.001)):
            angle = torch.tensor(position * speed, dtype=torch.float64)
            assert cos[position, pair] == pytest.approx(angle.cos().item(), abs=1e-12)
            assert sin[position, pair + 4] == pytest.approx(angle.sin().item(), abs=1e-12)
    turned = rotate(torch.eye(8, dtype=torch.float64)[None, None, [1]], cos, sin)[0, 0, 3]
    angle = torch.tensor(3 * 0.1, dtype=torch.float64)
    assert turned[[1, 5]].tolist() == pytest.approx([angle.cos().item(), angle.sin().item()])
    assert turned.count_nonzero() == 2


def test_grouped_queries_are_heads_with_repeated_keys_and_values() -> None:
    """A model of as many key heads as query heads, each group's keys and values copied for every one of its heads."""
    grouped = gpt()
    full = gpt(replace(SMALL, kv_heads=4))
    weights = grouped.state_dict()
    for name, weight in weights.items():
        if name.endswith(("attention.key.weight", "attention.value.weight")):
            heads = weight.unflatten(0, (SMALL.kv_heads, SMALL.head_width))
            weights[name] = heads.repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    tokens = some_tokens(3, 20)
    assert torch.allclose(grouped(tokens), full(tokens), atol=1e-12)


def test_a_block_is_what_its_formula_says() -> None:
    """Written out again, with one loop per head and a mask, from the block's own weights."""
    block, x = gpt().blocks[0], torch.randn(2, 9, 32, dtype=torch.float64)
    assert isinstance(block, Block)

    def normed(values: Tensor, norm: nn.RMSNorm) -> Tensor:
        return values / (values.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight

    nn.init.normal_(block.attention_norm.weight)
    nn.init.normal_(block.mlp_norm.weight)
    attention, inner = block.attention, normed(x, block.attention_norm)
    cos, sin = rotation(torch.arange(9), 8, 10_000.0, x)
    mask = torch.full((9, 9), -torch.inf, dtype=torch.float64).triu(1)
    heads = []
    for head in range(4):
        rows, shared = slice(8 * head, 8 * head + 8), slice(8 * (head // 2), 8 * (head // 2) + 8)
        query = rotate(inner @ attention.query.weight[rows].T, cos, sin)
        key = rotate(inner @ attention.key.weight[shared].T, cos, sin)
        scores = query @ key.transpose(1, 2) / 8**0.5 + mask
        heads.append(scores.softmax(-1) @ (inner @ attention.value.weight[shared].T))
    y = x + torch.cat(heads, -1) @ attention.output.weight.T
    inner, mlp = normed(y, block.mlp_norm), block.mlp
    y = y + (F.silu(inner @ mlp.gate.weight.T) * (inner @ mlp.up.weight.T)) @ mlp.down.weight.T
    assert torch.allclose(block(x), y, atol=1e-12)


# Sizes and weights ----------------------------------------------------------------------------------------------------

STATED = {"nano": 197_184, "tiny": 9_442_176, "124M": 124_668_672, "350M": 354_993_152, "1B": 1_100_048_384}
STATED |= {"8B": 7_241_732_096, "70B": 68_976_648_192}  # Mistral 7B's and Llama 2 70B's own numbers


@pytest.mark.parametrize("size", GPT_SIZES)
def test_a_size_has_as_many_parameters_as_its_table_says(size: str) -> None:
    """On the meta device. 1B's number is TinyLlama's own."""
    with torch.device("meta"):
        model = GPT(GPT_SIZES[size])
    config = GPT_SIZES[size]
    found = count_parameters(model)[0]
    assert found == config.parameters
    counted_apart = (
        2 * config.vocabulary * config.width if size in ("nano", "tiny") else 0
    )  # whose vocabularies are small
    assert found - counted_apart == STATED[size]
    assert config.width % config.heads == config.heads % config.kv_heads == config.head_width % 2 == 0


def test_the_seed_decides_the_weights_and_there_is_no_other_state() -> None:
    first, second = gpt(), gpt()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not list(first.buffers())
    assert first.state_dict().keys() == dict(first.named_parameters()).keys()


def test_weights_are_drawn_as_documented() -> None:
    model = gpt(gpt_config("tiny", 4096), torch.float32)
    expected = {
        "embedding.weight": 0.02,
        "output.weight": 384**-0.5,
        "blocks.3.attention.query.weight": 384**-0.5,
        "blocks.3.attention.output.weight": 384**-0.5 / 12**0.5,
        "blocks.5.mlp.up.weight": 384**-0.5,
        "blocks.5.mlp.down.weight": 1024**-0.5 / 12**0.5,
    }
    for name, deviation in expected.items():
        weight = model.get_parameter(name)
        assert weight.std().item() == pytest.approx(deviation, rel=0.01), name
        assert weight.mean().abs() < 0.02 * deviation, name
    assert all((module.weight == 1).all() for module in model.modules() if isinstance(module, nn.RMSNorm))


def test_a_model_that_was_built_without_memory_is_the_same_once_it_has_weights() -> None:
    built = gpt()
    with torch.device("meta"):
        empty = GPT(SMALL)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    empty.to_empty(device="cpu")
    torch.manual_seed(0)
    empty.init_weights()
    tokens = some_tokens(2, 12)
    assert torch.equal(empty.double()(tokens), built(tokens))


def test_it_is_built_where_torch_s_default_device_is() -> None:
    with FakeTensorMode():
        fake = GPT(SMALL)
        logits = fake(torch.zeros(2, 12, dtype=torch.int64))
    assert isinstance(logits, FakeTensor)
    assert (logits.shape, logits.device.type) == ((2, 12, 11), "cpu")


def test_dropout_is_there_in_training_alone() -> None:
    model, tokens = gpt(replace(SMALL, dropout=0.5)), some_tokens(2, 12)
    plain = gpt()
    assert not torch.equal(model(tokens), model(tokens))
    assert torch.equal(model.eval()(tokens), plain(tokens))


# What recipes do to it ------------------------------------------------------------------------------------------------


class BlocksAreLeaves(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Block) or super().is_leaf_module(m, module_qualified_name)


def test_fx_traces_it_with_the_blocks_as_leaves() -> None:
    model, tokens = gpt(), some_tokens(3, 10)
    graph = BlocksAreLeaves().trace(model)
    called = [node.target for node in graph.nodes if node.op == "call_module"]
    assert called == ["embedding", "dropout", "blocks.0", "blocks.1", "norm", "output"]
    traced = fx.GraphModule(model, graph)
    assert torch.equal(traced(tokens), model(tokens))
    assert torch.equal(traced(tokens[:, :4]), model(tokens[:, :4])), "the graph holds no length"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_is_about_the_same(dtype: torch.dtype) -> None:
    model, tokens = gpt(dtype=torch.float32), some_tokens(2, 300)
    exact = gpt()(tokens)
    with torch.autocast("cpu", dtype):
        logits = model(tokens)
    assert logits.dtype == dtype
    assert (logits.double() - exact).abs().mean() < 0.02 * exact.abs().mean()
    loss = F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_in_bf16_as_a_whole_distant_positions_stay_apart() -> None:
    """bf16 has no 257: angles computed in it would be the same for two neighbours from there on."""
    cos, _ = rotation(torch.arange(1024), 8, 10_000.0, torch.zeros((), dtype=torch.bfloat16))
    assert (cos[1:, 0] - cos[:-1, 0]).abs().min() > 1e-6
    assert cos[1023, 0].item() == pytest.approx(torch.tensor(1023.0, dtype=torch.float64).cos().item(), abs=1e-4)
    model = gpt(dtype=torch.bfloat16)
    assert model(some_tokens(1, 20)).dtype == torch.bfloat16


def test_gradients_are_the_numerical_ones() -> None:
    config = GPTConfig(layers=1, width=8, heads=2, kv_heads=1, hidden=6, vocabulary=5)
    model, tokens = gpt(config), some_tokens(1, 4, 5)
    names = list(dict(model.named_parameters()))

    def loss(*weights: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (tokens,))
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    assert torch.autograd.gradcheck(loss, tuple(model.parameters()), atol=1e-7)


@pytest.mark.slow
def test_compiled_it_computes_the_same() -> None:
    """A graph for the first length, one for all others; no break in any (`fullgraph`)."""
    model = gpt()
    compiled = torch.compile(model, fullgraph=True)
    for length in (12, 20, 33):
        tokens = some_tokens(2, length)
        assert torch.allclose(compiled(tokens), model(tokens), atol=1e-12)


# Writing --------------------------------------------------------------------------------------------------------------


class Counter(nn.Module):
    """After token t comes t + 1, for sure; it keeps the lengths that it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(50.0))
        self.lengths: list[int] = []

    def forward(self, tokens: Tensor) -> Tensor:
        self.lengths.append(tokens.shape[1])
        return F.one_hot((tokens + 1) % 7, 7) * self.scale


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_written_follows_the_model(temperature: float) -> None:
    model = Counter()
    written = generate(model, torch.tensor([[0, 1], [4, 5]]), 6, max_length=4, temperature=temperature)
    assert written.tolist() == [[0, 1, 2, 3, 4, 5, 6, 0], [4, 5, 6, 0, 1, 2, 3, 4]]
    assert model.lengths == [2, 3, 4, 4, 4, 4], "never more than max_length"
    assert model.training, "as it was"


def test_samples_have_the_model_s_own_distribution() -> None:
    model, begin = gpt(), torch.zeros(4000, 1, dtype=torch.int64)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    drawn = generate(model, begin, 1, 8)[:, 1]
    assert torch.equal(torch.get_rng_state(), before), "torch's own generator is left alone"
    expected = model(begin[:1])[0, 0].softmax(-1)
    assert torch.allclose(drawn.bincount(minlength=11) / 4000, expected.float(), atol=0.03)
    assert torch.equal(drawn, generate(model, begin, 1, 8)[:, 1])
    assert not torch.equal(drawn, generate(model, begin, 1, 8, seed=1)[:, 1])
    coldest = generate(model, begin, 1, 8, temperature=0)[:, 1]
    assert (coldest == expected.argmax()).all()
