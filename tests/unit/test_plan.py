"""recipes.plan: profiles, what a collective takes, what hides it, and the bytes and memory of steps on fake tensors."""

from __future__ import annotations

from pathlib import Path

import pytest

from lockstep.config.compose import compose_another
from lockstep.config.schema import Config
from lockstep.errors import UserError
from lockstep.launch.validate import validate
from lockstep.plan.clock import DeviceClock
from lockstep.plan.dry_run import DryRun, dry_steps
from lockstep.plan.formulas import expected_traffic
from lockstep.plan.hardware import hardware_names, load_hardware
from lockstep.plan.links import Collective, collective_kind
from lockstep.recipe import Recipe
from lockstep.registry import get_recipe

H100 = load_hardware("h100")
WEIGHTS = 4 * (197_184 + 128 * 18)  # bytes of task=language's nano, with 17 grey values and a beginning


def planned_config(name: str, ranks: int, *words: str) -> tuple[Recipe, Config]:
    """A recipe, and its config for so many ranks."""
    recipe = get_recipe(name)
    config = compose_another(recipe, ["task.name=language", "optim=adamw", *words])
    validate(config, recipe, ranks)
    return recipe, config


def planned(name: str, ranks: int, *words: str) -> tuple[DryRun, dict[str, int] | None]:
    """(a recipe's steps, the bytes that it must send by formula)."""
    recipe, config = planned_config(name, ranks, *words)
    return dry_steps(recipe, config, ranks, H100), expected_traffic(name, config, ranks)


@pytest.mark.parametrize("name", hardware_names())
def test_every_profile_can_be_read(name: str) -> None:
    found = load_hardware(name)
    assert found.flops["fp64"] < found.flops["fp32"] < found.flops["bf16"]
    assert found.between.rate < found.inside.rate < found.memory_bandwidth
    assert 0 < found.achieved <= 1


def test_a_profile_of_ones_own_is_read_back(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(H100.as_yaml(), encoding="utf-8")
    assert load_hardware(str(tmp_path / "own.yaml")) == H100


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace("per_node: 8\n", ""), "lacks per_node"),
        (lambda text: text.replace("launch: 3.0e-06", "launch: soon"), "launch=soon"),
        (lambda text: text + "colour: green\n", "colour: no such key"),
        (lambda text: "- 1", "must be keys and values"),
    ],
)
def test_what_is_wrong_with_a_profile_is_said(change: object, said: str, tmp_path: Path) -> None:
    assert callable(change)
    (tmp_path / "own.yaml").write_text(change(H100.as_yaml()), encoding="utf-8")
    with pytest.raises(UserError, match=said):
        load_hardware(str(tmp_path / "own.yaml"))


def test_unknown_hardware_is_listed() -> None:
    with pytest.raises(UserError, match="hardware=h101: no such profile; allowed are a100, b200, epyc9654, h100"):
        load_hardware("h101")


def test_operations_have_one_name_each() -> None:
    assert collective_kind("_allgather_base_") == collective_kind("all_gather_into_tensor_out") == "all-gather"
    assert collective_kind("_reduce_scatter_base_") == "reduce-scatter"
    assert collective_kind("allreduce_") == "all-reduce"
    assert collective_kind("alltoall_base_") == "all-to-all"


def test_a_ring_sends_what_nccl_tests_say() -> None:
    each = Collective.among("all-reduce", 8_000_000, range(8), 8)
    assert (each.link, each.sent) == ("inside", 14_000_000)
    assert each.seconds(H100) == pytest.approx(10e-6 + 14 * 1.9e-6 + 14e6 / 360e9)
    wide = Collective.among("all-gather", 8_000_000, range(16), 8)
    assert (wide.link, wide.nodes, wide.sent) == ("between", 2, 7_500_000)
    # Eight network cards carry it, each an eighth.
    assert wide.seconds(H100) == pytest.approx(10e-6 + 14 * 1.9e-6 + 4e-6 + 7.5e6 / 8 / 42.5e9)
    assert Collective.among("all-reduce", 10**9, [3], 8).seconds(H100) == 0


def test_only_what_is_waited_for_is_exposed() -> None:
    each = Collective.among("all-reduce", 36_000_000, range(8), 8)
    seconds = each.seconds(H100)
    clock = DeviceClock(H100)
    clock.begin()
    clock.operation("memory", 0, "fp32", 1e9, [], [1])
    computed = clock.times.step
    clock.collective(each, [1], [2])
    clock.operation("memory", 0, "fp32", 1e9, [], [3])  # needs nothing of it
    assert clock.end().exposed == 0
    assert computed > seconds
    clock.begin()
    clock.operation("memory", 0, "fp32", 1e9, [], [1])
    clock.collective(each, [1], [2])
    clock.operation("memory", 0, "fp32", 1e9, [2], [3])  # needs all of it
    assert clock.end().exposed == pytest.approx(seconds)


@pytest.mark.slow
def test_bytes_and_memory_are_those_of_the_technique() -> None:
    found: dict[str, DryRun] = {}
    for name in ("single", "ddp", "comm_hooks", "zero1", "fsdp"):
        found[name], expected = planned(name, 1 if name == "single" else 4)
        counted: dict[str, int] = {}
        for (kind, _), size in found[name].step.traffic().items():
            counted[kind] = counted.get(kind, 0) + size
        assert counted == (expected or {}), name
    assert found["ddp"].step.traffic() == {("all-reduce", "inside"): WEIGHTS + 8}  # and the tokens of the batch
    assert found["ddp"].peak["parameters"] == found["single"].peak["parameters"] >= WEIGHTS
    assert found["ddp"].peak["optimizer"] == pytest.approx(2 * WEIGHTS, rel=0.01)
    assert 0 < found["comm_hooks"].step.traffic()["all-reduce", "inside"] < 0.5 * WEIGHTS
    assert 2.5 * WEIGHTS < found["comm_hooks"].peak["optimizer"] < 3.5 * WEIGHTS, "with what is remembered"
    assert found["zero1"].peak["optimizer"] == pytest.approx(2 * WEIGHTS / 4, rel=0.05)
    assert found["fsdp"].peak["parameters"] == pytest.approx(WEIGHTS / 4, rel=0.01)
    assert found["single"].step.flops == 4 * found["ddp"].step.flops  # the same work, shared


def test_a_mesh_over_nodes_keeps_the_gathers_inside() -> None:
    found, expected = planned("fsdp", 16, "replicate=2")
    assert {(kind, link) for kind, link in found.step.traffic()} == {
        ("all-gather", "inside"),
        ("reduce-scatter", "inside"),
        ("all-reduce", "between"),
    }
    counted = found.step.traffic()
    assert expected is not None
    assert counted["all-gather", "inside"] == expected["all-gather"]
    assert counted["all-reduce", "between"] == expected["all-reduce"]
