"""SyncBatchNorm: ranks normalise as one process does on the whole batch, with a backward that is written by hand."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

from lockstep.config.schema import ModelConfig
from lockstep.distributed import sync_batchnorm
from lockstep.distributed.process_group import World
from lockstep.distributed.sync_batchnorm import NO_BUFFER_SYNC, SyncBatchNorm, convert_sync_batchnorm
from lockstep.errors import UserError
from lockstep.models.resnet import build_model
from tests.helpers.harness import run_ranks

CHANNELS = 5
TOLERANCE = 1e-10

Results = dict[str, Tensor]
LayerCase = tuple[Callable[..., nn.Module], tuple[int, ...], dict[str, Any]]

LAYERS: dict[str, LayerCase] = {
    "1d of 2-D": (nn.BatchNorm1d, (), {}),
    "1d of 3-D": (nn.BatchNorm1d, (7,), {}),
    "2d": (nn.BatchNorm2d, (4, 3), {}),
    "3d": (nn.BatchNorm3d, (2, 3, 2), {}),
    "not affine": (nn.BatchNorm2d, (4, 3), {"affine": False}),
    "cumulative average": (nn.BatchNorm2d, (4, 3), {"momentum": None}),
    "no running statistics": (nn.BatchNorm2d, (4, 3), {"track_running_stats": False}),
    "nothing of its own": (nn.BatchNorm2d, (4, 3), {"track_running_stats": False, "affine": False}),
    "other numbers": (nn.BatchNorm2d, (4, 3), {"momentum": 0.7, "eps": 0.3}),
}
SHARES = {
    1: {"whole": [6]},
    2: {"equal": [4, 4], "uneven": [5, 2], "empty": [0, 6]},
    3: {"equal": [3, 3, 3], "uneven": [1, 5, 2], "empty": [4, 0, 3]},
}


def make_layer(case: LayerCase) -> nn.Module:
    kind, _, options = case
    torch.manual_seed(3)
    layer = kind(CHANNELS, **options).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, mean=1)
    return layer


def make_batch(samples: int, pixels: tuple[int, ...], step: int) -> tuple[Tensor, Tensor]:
    """Inputs whose samples differ in mean and spread, and the gradient that comes back from above."""
    generator = torch.Generator().manual_seed(step)
    shape = (samples, CHANNELS, *pixels)
    x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    sample = torch.arange(samples, dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    return x * (1 + sample) + sample, dy


def three_steps(layer: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Results:
    """Forward and backward of each batch; all that came of it, by name."""
    found: Results = {}
    for step, (x, dy) in enumerate(batches):
        x = x.clone().requires_grad_()
        y = layer(x)
        y.backward(dy)
        assert x.grad is not None
        found |= {f"y{step}": y.detach(), f"dx{step}": x.grad}
    found |= {f"d{name}": parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}
    found |= dict(layer.named_buffers())
    return found


def rank_of_three_steps(world: World, cases: list[LayerCase], shares: list[int]) -> list[Results]:
    found = []
    for case in cases:
        batches = [make_batch(sum(shares), case[1], step) for step in range(3)]
        mine = [(x.split(shares)[world.rank], dy.split(shares)[world.rank]) for x, dy in batches]
        found.append(three_steps(convert_sync_batchnorm(make_layer(case)), mine))
    return found


def errors(names: Iterable[str], shares: list[int]) -> dict[str, dict[str, float]]:
    """By layer and tensor: how far ranks that hold `shares` are from nn.BatchNorm on the whole batch, at most."""
    ranks = run_ranks(rank_of_three_steps, len(shares), [LAYERS[name] for name in names], shares)
    found = {}
    for number, name in enumerate(names):
        batches = [make_batch(sum(shares), LAYERS[name][1], step) for step in range(3)]
        found[name] = compare(three_steps(make_layer(LAYERS[name]), batches), [rank[number] for rank in ranks])
    return found


def compare(expected: Results, ranks: list[Results]) -> dict[str, float]:
    """Shares are put together, gradients of weight and bias summed, buffers must be equal on all ranks."""
    found = {}
    for name, value in expected.items():
        if name.startswith(("y", "dx")):
            ours = torch.cat([rank[name] for rank in ranks])
        elif name.startswith("d"):
            ours = torch.stack([rank[name] for rank in ranks]).sum(0)
        else:
            ours = ranks[0][name]
            assert all(torch.equal(rank[name], ours) for rank in ranks), f"{name} differs between ranks"
        assert ours.shape == value.shape
        assert ours.dtype == value.dtype
        found[name] = (ours - value).abs().max().item()
    return found


@pytest.mark.parametrize(("world_size", "shares"), [(n, name) for n in SHARES for name in SHARES[n]])
def test_ranks_compute_batch_norm_of_the_whole_batch(world_size: int, shares: str) -> None:
    found = errors(LAYERS, SHARES[world_size][shares])
    for layer, (_, _, options) in LAYERS.items():
        compared = 6 + 2 * options.get("affine", True) + 3 * options.get("track_running_stats", True)
        assert len(found[layer]) == compared
        assert max(found[layer].values()) <= TOLERANCE, (layer, found[layer])


def wrong_sign(dy: Tensor, x_hat: Tensor, scale: Tensor, mean_dy: Tensor, mean_dy_x_hat: Tensor) -> Tensor:
    return scale * (dy - mean_dy + x_hat * mean_dy_x_hat)  # the study notes' ∂σ/∂xᵢ


def no_sigma(dy: Tensor, x_hat: Tensor, scale: Tensor, mean_dy: Tensor, mean_dy_x_hat: Tensor) -> Tensor:
    return scale * (dy - mean_dy)  # dℓ/dσ left out


@pytest.mark.parametrize("formula", [wrong_sign, no_sigma])
def test_the_study_notes_backward_is_found_out(formula: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync_batchnorm, "input_gradient", formula)  # the ranks are forked, and inherit it
    found = errors(["2d"], [4, 4])["2d"]
    assert {name for name, error in found.items() if error > TOLERANCE} == {"dx0", "dx1", "dx2"}
    assert max(found.values()) > 0.01


def test_a_rank_s_own_sums_in_the_backward_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: None)
    found = errors(["2d"], [4, 4])["2d"]
    assert min(found[f"dx{step}"] for step in range(3)) > 0.01


def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The layer's two halves, without the module that skips them where there is one rank."""
    mean, var, count = sync_batchnorm.global_statistics(x, None)
    return sync_batchnorm._Normalise.apply(x, weight, bias, mean, var, count, 1e-5, None)


def rank_of_gradcheck(world: World, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(shape[1], dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(normalise, (x, weight, bias))
    assert torch.autograd.gradcheck(lambda x: normalise(x, None, None), (x,))


@pytest.mark.parametrize("shape", [(4, 3), (3, 2, 4), (2, 3, 2, 2), (2, 2, 2, 1, 2)])
def test_gradcheck_on_one_rank(shape: tuple[int, ...]) -> None:
    run_ranks(rank_of_gradcheck, 1, shape)


def rank_of_finite_differences(world: World) -> float:
    """gradcheck would move both ranks' inputs at once; here one value of one rank moves while both evaluate."""
    torch.manual_seed(world.rank)
    x = torch.randn(3 - world.rank, 2, 2, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.tensor([[1.5, -0.7], [0.2, 0.4]], dtype=torch.float64)
    upstream = torch.randn_like(x)

    def loss() -> Tensor:
        return (normalise(x, weight, bias) * upstream).sin().sum()

    loss().backward()
    assert x.grad is not None
    worst, step = 0.0, 1e-5
    with torch.no_grad():
        for owner, numel in ((0, 12), (1, 8)):
            for index in range(numel):
                sides = []
                for move in (step, -2 * step):
                    if owner == world.rank:
                        x.view(-1)[index] += move
                    total = loss()
                    dist.all_reduce(total)
                    sides.append(total.item())
                if owner == world.rank:
                    x.view(-1)[index] += step
                    slope = (sides[0] - sides[1]) / (2 * step)
                    worst = max(worst, abs(x.grad.view(-1)[index].item() - slope))
    return worst


def test_the_gradient_is_the_slope_of_all_ranks_losses_together() -> None:
    assert max(run_ranks(rank_of_finite_differences, 2)) <= 1e-8


class CountCollectives(TorchDispatchMode):
    """Count what reaches c10d, by whatever function it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def rank_of_counting(world: World) -> list[Counter[str]]:
    layers = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3)))
    x = torch.randn(4, 3)
    with CountCollectives() as forward:
        y = layers(x.requires_grad_())
    with CountCollectives() as backward:
        y.sum().backward()
    y = layers(x.detach())
    with CountCollectives() as first_layer_needs_none:
        y.sum().backward()
    layers.eval()
    with CountCollectives() as evaluating:
        layers(x).sum().backward()
    untracked = convert_sync_batchnorm(nn.BatchNorm1d(3, track_running_stats=False)).eval()
    with CountCollectives() as untracked_evaluating:
        untracked(x).sum().backward()
    phases = (forward, backward, first_layer_needs_none, evaluating, untracked_evaluating)
    return [phase.calls for phase in phases]


def test_one_collective_a_layer_in_forward_and_one_in_backward_and_none_in_evaluation() -> None:
    gather, reduce = "c10d::allgather_", "c10d::allreduce_"
    for counts in run_ranks(rank_of_counting, 2):
        assert counts == [{gather: 3}, {reduce: 3}, {reduce: 2}, {}, {}]


def rank_of_evaluation(world: World, tracked: bool) -> bool:
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(CHANNELS, track_running_stats=tracked).double()
    synced = convert_sync_batchnorm(copy.deepcopy(plain))
    for layer in (plain, synced):
        if tracked:
            layer.running_mean.fill_(0.3)  # type: ignore[operator]
        layer.eval()
    x = torch.randn(4 + world.rank, CHANNELS, 2, 2, dtype=torch.float64)
    return torch.equal(plain(x), synced(x)) and all(map(torch.equal, plain.buffers(), synced.buffers()))


@pytest.mark.parametrize("tracked", [True, False])
def test_evaluation_is_batch_norm_s_own(tracked: bool) -> None:
    assert run_ranks(rank_of_evaluation, 2, tracked) == [True, True]


def test_without_a_process_group_it_is_batch_norm() -> None:
    for case in LAYERS.values():
        batches = [make_batch(6, case[1], step) for step in range(3)]
        plain = three_steps(make_layer(case), batches)
        synced = three_steps(convert_sync_batchnorm(make_layer(case)), batches)
        assert plain.keys() == synced.keys()
        assert all(torch.equal(plain[name], synced[name]) for name in plain)


def rank_of_subgroups(world: World) -> Results:
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2])]  # every rank makes both
    case = LAYERS["2d"]
    group = groups[world.rank // 2]
    assert isinstance(group, dist.ProcessGroup)
    layer = convert_sync_batchnorm(make_layer(case), group)
    x, dy = make_batch(6, case[1], 0)
    return three_steps(layer, [(x.chunk(3)[world.rank], dy.chunk(3)[world.rank])])


def test_ranks_of_a_subgroup_normalise_together_and_the_others_apart() -> None:
    case = LAYERS["2d"]
    x, dy = make_batch(6, case[1], 0)
    first, second, third = run_ranks(rank_of_subgroups, 3)
    together = three_steps(make_layer(case), [(x[:4], dy[:4])])
    alone = three_steps(make_layer(case), [(x[4:], dy[4:])])
    for name in ("y0", "dx0"):
        assert (torch.cat([first[name], second[name]]) - together[name]).abs().max() <= TOLERANCE
    for name in ("running_mean", "running_var"):
        assert (first[name] - together[name]).abs().max() <= TOLERANCE
    assert all(torch.equal(third[name], alone[name]) for name in alone)


def rank_of_small_batches(world: World, samples: list[int]) -> str:
    layer = convert_sync_batchnorm(nn.BatchNorm1d(3))
    try:
        layer(torch.randn(samples[world.rank], 3))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("samples", "refused"), [([1, 1], False), ([1, 0], True), ([0, 0], True), ([0, 2], False)])
def test_the_global_count_decides_whether_there_is_a_variance(samples: list[int], refused: bool) -> None:
    for said in run_ranks(rank_of_small_batches, 2, samples):
        assert said.startswith("Expected more than 1 value per channel when training") == refused
        assert bool(said) == refused


def rank_of_wrong_channels(world: World) -> None:
    layer = convert_sync_batchnorm(nn.BatchNorm1d(3))
    for shape in ((4, 2), (3,)):
        with pytest.raises(ValueError, match=r"expected an input \[N, 3, …\], got"):
            layer(torch.randn(shape))


def test_an_input_of_another_shape_is_refused_before_anything_is_sent() -> None:
    run_ranks(rank_of_wrong_channels, 2)


def large_mean(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(32, CHANNELS, 16, 16, generator=generator) for _ in range(2))
    return (x + 1000).to(dtype), dy.to(dtype)


def rank_of_large_mean(world: World) -> Results:
    layer = convert_sync_batchnorm(nn.BatchNorm2d(CHANNELS, momentum=1.0))
    x, dy = large_mean(torch.float32)
    return three_steps(layer, [(x.chunk(2)[world.rank], dy.chunk(2)[world.rank])])


def test_float32_keeps_its_digits_at_mean_1000() -> None:
    ranks = run_ranks(rank_of_large_mean, 2)
    expected = three_steps(nn.BatchNorm2d(CHANNELS, momentum=1.0).double(), [large_mean(torch.float64)])
    for name, limit in (("y0", 1e-4), ("dx0", 1e-4)):
        assert (torch.cat([rank[name] for rank in ranks]) - expected[name]).abs().max() <= limit
    assert (ranks[0]["running_mean"] - expected["running_mean"]).abs().max() <= 1e-4
    assert (ranks[0]["running_var"] - expected["running_var"]).abs().max() <= 1e-5


def test_sums_of_squares_would_lose_them() -> None:
    """What the limits above are worth: Σx²/N − μ² in float32, on the same batch."""
    x, _ = large_mean(torch.float32)
    var = x.square().mean([0, 2, 3]) - x.mean([0, 2, 3]).square()
    assert (var - x.double().var([0, 2, 3], correction=0)).abs().max() > 0.01


def bf16_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))


def bf16_step(net: nn.Module, x: Tensor) -> Results:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().mul(0.5).backward()
    assert x.grad is not None
    assert net[1].weight.grad.dtype == torch.float32  # type: ignore[index]
    return {"y": y.detach(), "dx": x.grad} | dict(net[1].named_buffers())  # type: ignore[index]


def rank_of_bf16(world: World, x: Tensor) -> Results:
    return bf16_step(convert_sync_batchnorm(bf16_net()), x.chunk(2)[world.rank])


def test_autocast_keeps_the_statistics_in_float32() -> None:
    x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    ranks, expected = run_ranks(rank_of_bf16, 2, x), bf16_step(bf16_net(), x)
    for name in ("y", "dx"):
        ours = torch.cat([rank[name] for rank in ranks])
        assert ours.dtype == expected[name].dtype
        torch.testing.assert_close(ours, expected[name], rtol=2**-7, atol=2**-7)  # bf16 has 8 bits
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(ranks[0][name], expected[name], rtol=1e-5, atol=1e-6)


def rank_of_half_model(world: World) -> tuple[torch.dtype, ...]:
    layer = convert_sync_batchnorm(nn.BatchNorm2d(4)).bfloat16()
    x = torch.randn(3, 4, 2, 2, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert x.grad is not None
    return y.dtype, x.grad.dtype, layer.weight.grad.dtype, layer.running_mean.dtype  # type: ignore[union-attr, return-value]


def test_a_model_in_bfloat16_stays_in_it() -> None:
    assert run_ranks(rank_of_half_model, 2) == [(torch.bfloat16,) * 4] * 2


def rank_of_channels_last(world: World) -> list[bool]:
    layer = convert_sync_batchnorm(nn.BatchNorm2d(4))
    x = torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    assert x.grad is not None
    return [tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (y, x.grad)]


def test_channels_last_is_kept() -> None:
    assert run_ranks(rank_of_channels_last, 2) == [[True, True]] * 2


def resnet18() -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(num_classes=10, image_size=8)).double()


def train_resnet(model: nn.Module, share: Callable[[Tensor], Tensor]) -> Results:
    """Three steps of SGD on `share` of three batches of 8 images; the weights and buffers after them."""
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        images = torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64)
        labels = torch.randint(10, (8,), generator=generator)
        cross_entropy(model(share(images)), share(labels)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name.removeprefix("module."): value for name, value in model.state_dict().items()}


def rank_of_resnet(world: World, convert: bool, whole: Results) -> float:
    """The largest difference of any weight or buffer from `whole`, relative to the largest value in it."""
    model = convert_sync_batchnorm(resnet18()) if convert else resnet18()
    model = DistributedDataParallel(model, **NO_BUFFER_SYNC)
    ours = train_resnet(model, lambda batch: batch.chunk(2)[world.rank])
    assert ours.keys() == whole.keys()
    return max(((ours[name] - whole[name]).abs().max() / whole[name].abs().max()).item() for name in whole)


@pytest.mark.slow
def test_a_resnet_under_ddp_trains_as_on_one_process_only_when_converted() -> None:
    whole = train_resnet(resnet18(), lambda batch: batch)
    assert len(whole) == 122
    assert max(run_ranks(rank_of_resnet, 2, True, whole)) <= TOLERANCE
    assert min(run_ranks(rank_of_resnet, 2, False, whole)) > 0.01


def rank_of_empty_network(world: World) -> tuple[int, bool, bool]:
    net = convert_sync_batchnorm(resnet18())
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    net(images[: 4 * world.rank]).sum().backward()
    gradients = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    return len(gradients), all(g.isfinite().all() for g in gradients), all((g == 0).all() for g in gradients)


def test_a_rank_without_samples_takes_part_through_a_whole_network() -> None:
    assert run_ranks(rank_of_empty_network, 2) == [(62, True, True), (62, True, False)]


def test_conversion_changes_20_layers_and_nothing_else() -> None:
    model = resnet18()
    before = dict(model.named_modules())
    state = copy.deepcopy(model.state_dict())
    for _ in range(2):  # idempotent
        assert convert_sync_batchnorm(model) is model
        after = dict(model.named_modules())
        assert all(after[name] is module for name, module in before.items())
        assert sum(type(module) is SyncBatchNorm for module in after.values()) == 20
        assert not any(isinstance(module, nn.BatchNorm2d) for module in after.values())
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    resnet18().load_state_dict(model.state_dict())
    copy.deepcopy(model).load_state_dict(state)


def test_conversion_of_a_root_keeps_its_mode_options_and_hooks() -> None:
    layer = nn.BatchNorm1d(3, eps=0.1, momentum=None, affine=False).eval()
    seen: list[nn.Module] = []
    layer.register_forward_hook(lambda module, *_: seen.append(module))
    converted = convert_sync_batchnorm(layer)
    converted(torch.zeros(2, 3))
    assert converted is layer
    assert seen == [layer]
    assert type(converted) is SyncBatchNorm
    assert (converted.eps, converted.momentum, converted.affine, converted.training) == (0.1, None, False, False)


def test_a_layer_on_cuda_becomes_torch_s() -> None:
    with FakeTensorMode():
        mixed = nn.Sequential(nn.BatchNorm2d(4, device="cuda"), nn.BatchNorm2d(4))
        convert_sync_batchnorm(convert_sync_batchnorm(mixed))
    assert [type(layer) for layer in mixed] == [nn.SyncBatchNorm, SyncBatchNorm]


@pytest.mark.gpu
def test_on_a_gpu_torch_s_layer_runs_as_converted() -> None:
    layer = convert_sync_batchnorm(nn.BatchNorm2d(4).cuda())
    x = torch.randn(3, 4, 2, 2, device="cuda")
    assert type(layer) is nn.SyncBatchNorm
    torch.testing.assert_close(layer(x), nn.BatchNorm2d(4).cuda()(x))


def test_a_model_without_batch_norm_is_refused_with_the_key_to_turn() -> None:
    model = build_model(ModelConfig(num_classes=10, image_size=8, norm="group"))
    with pytest.raises(UserError, match=r"no BatchNorm.* model.norm=group .* set model.norm=batch") as raised:
        convert_sync_batchnorm(model)
    assert "\n" not in str(raised.value)


def test_a_batch_norm_with_a_forward_of_its_own_is_refused_and_nothing_is_changed() -> None:
    class Activated(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).relu()

    for layer in (Activated(3), nn.LazyBatchNorm2d()):
        model = nn.Sequential(nn.BatchNorm2d(3), layer)
        with pytest.raises(UserError, match=f"cannot synchronise a {type(layer).__name__}"):
            convert_sync_batchnorm(model)
        assert type(model[0]) is nn.BatchNorm2d
