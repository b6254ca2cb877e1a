"""The operations that a model needs, counted and by formula, and what follows from them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lockstep.callbacks import model_flops
from lockstep.callbacks.model_flops import FlopCounter, flops_per_sample, peak_flops, rates, work_of_a_sample
from lockstep.models.gpt import GPT, gpt_config
from lockstep.tasks.build import build_task
from lockstep.training.random_state import generators
from recipes import data_parallel, single
from tests.helpers.harness import compose_config

NANO = "task=language task.size=nano optim.warmup_steps=0".split()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_gpt_s_operations_are_the_formula_s(kv_heads: int) -> None:
    """6 for each weight of a matrix product and each token, and what attention adds."""
    config = compose_config(single.train, *NANO, f"task.kv_heads={kv_heads}")
    task: Any = build_task(config)
    shape, tokens = gpt_config("nano", task.vocabulary, kv_heads=kv_heads), task.tokens_per_sample
    with torch.device("meta"):
        weights = sum(each.weight.numel() for each in GPT(shape).modules() if isinstance(each, nn.Linear))
    assert flops_per_sample(task, 0) == 6 * weights * tokens + 12 * shape.layers * shape.width * tokens**2


def test_it_counts_what_torch_counts() -> None:
    config = compose_config(single.train, *NANO, "task.size=tiny")
    task: Any = build_task(config)
    inputs = torch.zeros(2, task.tokens_per_sample, dtype=torch.int64, device="meta")
    with torch.device("meta"):
        model, image = GPT(gpt_config("tiny", task.vocabulary)), nn.Conv2d(3, 8, 3, stride=2, groups=1)
        pixels = torch.zeros(2, 3, 9, 9, requires_grad=True)
    with FlopCounterMode(display=False) as theirs, FlopCounter() as ours:
        task.loss(model(inputs), inputs).backward()
        image(pixels).sum().backward()
    assert ours.total == theirs.get_total_flops() > 10**9


def test_recomputed_activations_do_not_count() -> None:
    config = compose_config(single.train, *NANO, "checkpoint_activations=full")
    plain = compose_config(single.train, *NANO)
    assert flops_per_sample(build_task(config), 0) == flops_per_sample(build_task(plain), 0)


def test_what_cannot_be_counted_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of one's own that asks for a value, which the meta device has none of."""

    class Asks(nn.Module):
        def forward(self, x: Any) -> Any:
            return x.sum().item()

    config = compose_config(single.train, *NANO)
    task: Any = build_task(config)
    monkeypatch.setattr(model_flops, "sketch_of", lambda task: Asks())
    assert flops_per_sample(task, 0) is None
    assert rates({"tokens_per_sample": 64, "flops_per_sample": None, "peak_flops_per_second": None}, 2.0) == {
        "tokens_per_second": 128.0,
        "model_flops_per_second": None,
        "mfu": None,
    }


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 2 * 989e12),
        ("NVIDIA H100 PCIe", "fp16", 2 * 756e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 2 * 312e12),
        ("NVIDIA L40S", "bf16", 2 * 362e12),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("Some Card", "bf16", None),
    ],
)
def test_mfu_is_over_what_all_gpus_promise(
    name: str, precision: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    world: Any = SimpleNamespace(device=torch.device("cuda", 0), world_size=2)
    assert peak_flops(world, precision) == peak
    work = {"tokens_per_sample": 10, "flops_per_sample": 100, "peak_flops_per_second": peak}
    assert rates(work, 989e9)["mfu"] == (989e11 / peak if peak else None)
    assert rates(work, None) == {"tokens_per_second": None, "model_flops_per_second": None, "mfu": None}


def test_without_tokens_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    world: Any = SimpleNamespace(device=torch.device("cpu"), world_size=2)
    images = compose_config(single.train)
    assert rates(work_of_a_sample(images, build_task(images), world), 5.0) == {}
    config = compose_config(single.train, *NANO, "precision=bf16", "seed=7", "task.dropout=0.1")
    task, before = build_task(config), generators(world.device)
    assert work_of_a_sample(config, task, world)["peak_flops_per_second"] is None
    after = generators(world.device)  # those that training goes on with
    assert all(torch.equal(before[name].nan_to_num(), state.nan_to_num()) for name, state in after.items())
    # A process that computes on several devices is not measured against one of them.
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    world.device = torch.device("cuda", 0)
    assert work_of_a_sample(config, build_task(config), world)["peak_flops_per_second"] == 2 * 756e12
    several = compose_config(data_parallel.train, *NANO, "precision=bf16")
    assert work_of_a_sample(several, build_task(several), world)["peak_flops_per_second"] is None
