"""Compressed gradients: PowerSGD is torch's and one process's, nothing is lost on the way, ranks send what is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, _orthogonalize, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from lockstep.distributed.process_group import World
from lockstep.parallel.compressed_gradients import GradientCompression, PowerSGD, RoundedGradients, shares_of
from lockstep.training.precision import AUTOCAST
from lockstep.verify.trace import difference
from recipes import comm_hooks, ddp, single
from tests.helpers.harness import execute, lines, result, run_ranks, tensors_of, train
from tests.helpers.traffic import count_traffic
from tests.ranks.test_resume import assert_same, newest

pytestmark = pytest.mark.usefixtures("narrow")

DATA = ("data=synthetic", "data.size=48", "data.image_size=8", "global_batch_size=12", "model.norm=group")
WORDS = (*DATA, "precision=fp64", "log_every=1", "eval_every=0", "epochs=3", "optim.warmup_steps=2")


class Given(nn.Module):
    """Parameters whose gradients are what the loss is made of: matrices, one of them channels last, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.tall = nn.Parameter(torch.zeros(40, 12))
        self.bias = nn.Parameter(torch.zeros(7))
        self.conv = nn.Parameter(torch.zeros(16, 4, 3, 3).to(memory_format=torch.channels_last))
        self.last = nn.Parameter(torch.zeros(10, 30))

    def forward(self, gradients: list[Tensor]) -> Tensor:
        return sum(((p * g).sum() for p, g in zip(self.parameters(), gradients, strict=True)), torch.zeros(()))


def drawn(module: nn.Module, rank: int, step: int) -> list[Tensor]:
    """A rank's gradients of a step: large ones beside tiny ones, which 16 bits cannot hold together."""
    dice = torch.Generator().manual_seed(100 * step + rank)
    return [
        torch.randn(p.shape, generator=dice, dtype=p.dtype) * 10.0 ** (-3 * torch.rand(p.shape, generator=dice))
        for p in module.parameters()
    ]


def account(world: World, compress: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Of 8 steps: the sum of what arrived, of the true means, and the mean of the memories; by parameter."""
    model = Given().double()
    compression: GradientCompression
    if compress == "powersgd":
        compression = PowerSGD(model, world.rank, world.world_size, r=2)
    else:
        compression = RoundedGradients(model, world.rank, world.world_size, dtype=AUTOCAST[compress])
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=1e-3)  # type: ignore[arg-type]
    wrapped.register_comm_hook(None, compression.hook)
    arrived, true = ([torch.zeros_like(p) for p in model.parameters()] for _ in range(2))
    for step in range(8):
        wrapped(drawn(model, world.rank, step)).backward()
        for number, parameter in enumerate(model.parameters()):
            assert parameter.grad is not None
            if compress in AUTOCAST:
                assert torch.equal(parameter.grad, parameter.grad.to(AUTOCAST[compress]).double()), "16 bits have come"
            arrived[number] += parameter.grad
            others = [drawn(model, rank, step)[number] for rank in range(world.world_size)]
            true[number] += torch.stack(others).mean(0)
        wrapped.zero_grad()
    owed = []
    for name, parameter in model.named_parameters():
        error = compression.errors.get(name, torch.zeros_like(parameter)).contiguous()
        dist.all_reduce(error)
        owed.append(error / world.world_size)
    return arrived, true, owed


@pytest.mark.slow_except("bf16-3", "powersgd-3")
@pytest.mark.parametrize(("compress", "ranks"), [("bf16", 3), ("fp16", 2), ("powersgd", 3), ("bf16", 1)])
def test_what_arrived_and_what_is_remembered_is_all_there_was(compress: str, ranks: int) -> None:
    """Over several buckets, filled up where 3 ranks do not divide them, to the last bits of fp64."""
    for arrived, true, owed in run_ranks(account, ranks, compress):
        assert sum(each.abs().sum() for each in owed) > 1e-3, "something was left out"
        for got, expected, rest in zip(arrived, true, owed, strict=True):
            torch.testing.assert_close(got + rest, expected, rtol=0, atol=1e-12)


def trained_by(world: World, whose: str) -> dict[str, Tensor]:
    """Six steps of SGD, of which PowerSGD compresses four, by our hook or torch's; gloo grants torch's one bucket."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 20)).double()
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=64)
    if whose == "torch":
        wrapped.register_comm_hook(PowerSGDState(None, 3, 2, random_seed=0), powerSGD_hook)
    else:
        mine = PowerSGD(model, world.rank, world.world_size, 2, r=3)
        torch.manual_seed(PowerSGDState(None, 3, 2, random_seed=0).rng.randint(1_000_000_000))
        for name in ("2.weight", "0.weight"):  # drawn as torch does, in the order in which its bucket has them
            mine.q[name].copy_(torch.randn(1, *mine.q[name].shape, dtype=torch.float64)[0])
            _orthogonalize(mine.q[name][None])
        wrapped.register_comm_hook(None, mine.hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(6):
        dice = torch.Generator().manual_seed(10 * step + world.rank)
        wrapped(torch.randn(8, 24, generator=dice, dtype=torch.float64)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def test_powersgd_is_torch_s() -> None:
    mine, theirs = (run_ranks(trained_by, 2, whose)[0] for whose in ("ours", "torch"))
    assert difference(mine, theirs) <= 1e-10


def test_powersgd_trains_what_one_process_trains_and_resumes_on_other_ranks(tmp_path: Path) -> None:
    """On 2, 3, 1 ranks, in micro-batches: what they owe to the weights goes from hand to hand."""
    words = (*WORDS, "r=1", "checkpoint.every=2", "start_step=1")
    whole = train(comm_hooks.train, tmp_path / "whole", 1, *words, "max_steps=6")
    for ranks, steps in ((2, 2), (3, 4), (1, 6)):
        mine = train(comm_hooks.train, tmp_path / "parts", ranks, *words, "accumulate=2", f"max_steps={steps}")
    assert difference(mine, whole) <= 1e-10
    plain = train(single.train, tmp_path / "plain", 1, *WORDS, "max_steps=6")
    assert difference(mine, plain) > 1e-2, "it was compressed"


@pytest.mark.slow
def test_what_a_checkpoint_lacks_begins_anew(tmp_path: Path) -> None:
    """DDP's has no memories, that of another r a Q that does not fit, one in 16 bits none; DDP takes each of them."""
    words = (*WORDS, "checkpoint.every=2")
    starts = {"ddp": (ddp.train, ()), "r": (comm_hooks.train, ("r=1",)), "bf16": (comm_hooks.train, ("compress=bf16",))}
    for number, (name, (recipe, more)) in enumerate(starts.items()):
        execute(recipe, tmp_path / name, 2, *words, *more, "max_steps=2")
        for other, ranks in ((comm_hooks.train, 1 + number), (ddp.train, 2)):
            out = tmp_path / f"{other.name}-from-{name}"
            execute(other, out, ranks, *words, f"resume={tmp_path / name}", "max_steps=4")
            assert len([line for line in lines(out) if "loss" in line]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_memories_in_16_bits_resume_to_the_last_bit(ranks: int, tmp_path: Path) -> None:
    """Also of two ranks, whose buckets DDP would otherwise sort anew: who adds up what depends on its place."""
    words = (*DATA, "epochs=3", "eval_every=0", "compress=bf16", "checkpoint.every=3")
    whole = train(comm_hooks.train, tmp_path / "whole", ranks, *words, "max_steps=5")
    for steps in (3, 5):
        parts = train(comm_hooks.train, tmp_path / "parts", ranks, *words, f"max_steps={steps}")
    assert_same(parts, whole)
    before, after = (tensors_of(newest(tmp_path / run)) for run in ("whole", "parts"))
    assert_same(before, after)
    assert {f"keep.compression.error.{rank}.fc.weight" for rank in range(ranks)} <= before.keys()


@pytest.mark.parametrize("ranks", range(1, 7))
@pytest.mark.parametrize("saved", range(1, 7))
def test_other_ranks_owe_the_same(ranks: int, saved: int) -> None:
    shares = [shares_of(rank, ranks, saved) for rank in range(ranks)]
    assert all(sum(each.values()) == pytest.approx(1) for each in shares)
    assert all(share > 0 for each in shares for share in each.values())
    for old in range(saved):
        assert sum(each.get(old, 0) for each in shares) / ranks == pytest.approx(1 / saved)
    if ranks == saved:
        assert shares == [{rank: 1.0} for rank in range(ranks)]


@pytest.mark.slow_except("powersgd")
@pytest.mark.parametrize("compress", ["powersgd", "bf16"])
def test_ranks_send_what_the_recipe_says(compress: str, tmp_path: Path) -> None:
    words = (*WORDS, "max_steps=4", f"compress={compress}", "start_step=1", "checkpoint_activations=none")
    steps: list[Any] = count_traffic(comm_hooks.train, tmp_path / "run", 2, *words)[0]
    train(comm_hooks.train, tmp_path / "told", 2, *words)
    told = result(tmp_path / "told")
    weights = torch.load(tmp_path / "told" / "model.pt", weights_only=True)
    assert told["gradient_bytes"] == sum(weight.nbytes for weight in weights.values())
    sent = told["gradient_bytes_sent"]
    assert steps[0]["allreduce_"] == told["gradient_bytes"], "the first step is not compressed"
    if compress == "bf16":
        assert sent == sum(2 * weight.numel() for weight in weights.values())
        assert steps[3].keys() == {"alltoall_base_", "_allgather_base_"}
        assert all(sent <= size <= sent + 2 * 2 * 8 for size in steps[3].values()), "two halves of an all-reduce"
        return
    expected = 0
    for weight in weights.values():
        m, n = len(weight), weight[0].numel()
        expected += 8 * (4 * (m + n) if weight.dim() > 1 and 2 * 4 * (m + n) < m * n else m * n)
    assert sent == expected < 0.5 * told["gradient_bytes"]
    assert steps[3] == {"allreduce_": sent}


@pytest.mark.soak
def test_the_loss_is_near_ddp_s(tmp_path: Path) -> None:
    """The same 84 steps on the digits; without what is left out, PowerSGD would train two directions of each layer."""
    words = ("epochs=6", "log_every=1", "eval_every=0", "model.norm=group")
    execute(ddp.train, tmp_path / "ddp", 2, *words)
    plain = result(tmp_path / "ddp")["eval_loss"]
    for number, more in enumerate((("r=2",), ("compress=bf16",), ("compress=fp16",))):
        execute(comm_hooks.train, tmp_path / str(number), 2, *words, *more)
        assert result(tmp_path / str(number))["eval_loss"] < 1.5 * plain
