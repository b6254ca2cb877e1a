"""recipes.plan: profiles, what a collective takes, what hides it, and the bytes and memory of steps on fake tensors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from lockstep.config.compose import compose_another
from lockstep.config.schema import Config
from lockstep.distributed.cores import usable_cores
from lockstep.errors import UserError
from lockstep.launch.validate import validate
from lockstep.plan.allocator import reserved_bytes
from lockstep.plan.clock import DeviceClock, StepTimes
from lockstep.plan.dry_run import DryRun, dry_world
from lockstep.plan.formulas import expected_traffic
from lockstep.plan.hardware import hardware_names, load_hardware
from lockstep.plan.links import Collective, collective_kind
from lockstep.plan.pipeline import dry_training, played
from lockstep.plan.rows import USUAL, beyond_the_table, why_not
from lockstep.plan.watch import StageMessage, StepTrace, bytes_moved
from lockstep.plan.workers import planned_beside
from lockstep.recipe import Recipe
from lockstep.registry import get_recipe, list_recipes

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
    found = dry_training(recipe, config, ranks, H100)
    return found, expected_traffic(name, found.config, ranks)


def bytes_by_kind(found: DryRun) -> dict[str, int]:
    counted: dict[str, int] = {}
    for (kind, _), size in found.step.traffic().items():
        counted[kind] = counted.get(kind, 0) + size
    return counted


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
        assert bytes_by_kind(found[name]) == (expected or {}), name
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
    whole, expected = planned("fsdp", 4, "replicate=4")
    assert bytes_by_kind(whole) == expected, "with a copy on each rank nothing is gathered"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ranks", "words"),
    [
        ("parallel_mesh", 8, ("replicate=2", "context=2")),
        ("tensor_parallel", 4, ("precision=fp64",)),
        ("expert_parallel", 4, ("balance=bias",)),
        ("pipeline_parallel", 4, ("schedule=interleaved",)),
    ],
)
def test_a_mesh_sends_what_its_formula_says(name: str, ranks: int, words: tuple[str, ...]) -> None:
    found, expected = planned(name, ranks, *words)
    assert expected
    assert bytes_by_kind(found) == expected
    assert found.slack > 0
    if name == "pipeline_parallel":
        assert found.where == "rank 0 of 2"  # the first stage has the most micro-batches under way
        assert 0 < found.step.times.bubble < 0.5 * found.step.times.step


@pytest.mark.parametrize(
    ("name", "tensors"),  # of 16 bytes each
    [("add.Tensor", 3), ("add_.Tensor", 3), ("mul_.Scalar", 2), ("copy_", 2), ("zero_", 1), ("zeros_like", 1)],
)
def test_what_is_updated_is_read_and_written_and_what_is_written_over_is_not_read(name: str, tensors: int) -> None:
    packet, _, overload = name.partition(".")
    func = getattr(getattr(torch.ops.aten, packet), overload or "default")
    x, y = torch.zeros(4), torch.zeros(4)
    given = [x, y][: 2 if overload == "Tensor" or packet == "copy_" else 1]
    made = [x if packet.endswith("_") else torch.zeros(4)]
    assert bytes_moved(func, (*given,), {}, given, made) == 16 * tensors


def test_a_list_that_is_updated_counts_as_its_tensors_do() -> None:
    x, y = [torch.zeros(4), torch.zeros(2)], [torch.zeros(4), torch.zeros(2)]
    assert bytes_moved(torch.ops.aten._foreach_add_.List, (x, y), {}, [*x, *y], []) == 3 * 24
    gathered = torch.zeros(6)
    assert (
        bytes_moved(torch.ops.aten.split_with_sizes_copy.out, (gathered, [4, 2]), {"out": x}, [gathered, *x], []) == 48
    )


@pytest.mark.slow
def test_deepspeed_is_planned_by_its_own_engine() -> None:
    found, _ = planned("deepspeed_zero", 2, "stage=2")
    expected, _ = planned("ddp", 2)
    bucket = 4 * 2**22  # bytes of the recipe's reduce_bucket_size
    held = WEIGHTS + 3 * WEIGHTS / 2 + bucket + expected.peak["activations"]
    assert found.peak_bytes == pytest.approx(held, abs=WEIGHTS / 4)  # and no copy of the model
    found, _ = planned("deepspeed_zero", 2, "stage=3")
    assert found.peak["optimizer"] == pytest.approx(3 * WEIGHTS / 2, rel=0.05)  # two moments, and fp32 weights
    assert bytes_by_kind(found)["reduce-scatter"] == pytest.approx(WEIGHTS, rel=0.01)


def test_the_bubble_of_stages_that_cost_the_same_is_gpipes() -> None:
    """Two stages, m micro-batches, forward 1 s, backward 2 s: a share 1 / (m + 1) of the step is waiting."""
    m = 4
    first = [StageMessage(1, 0.0, n, n) for n in range(1, m + 1)] + [
        StageMessage(1, None, m + 2 * n, m + 2 * n) for n in range(m)
    ]
    last = [StageMessage(0, None, n, n) for n in range(m)] + [
        StageMessage(0, 0.0, m + 2 * n, m + 2 * n) for n in range(1, m + 1)
    ]
    traces = [StepTrace(times=StepTimes(compute=3.0 * m), messages=each) for each in (first, last)]
    assert 1 - 3 * m / played(traces, overlaps=True) == pytest.approx(1 / (m + 1))
    with pytest.raises(UserError, match="wait for messages that none of them sends"):
        played([traces[0], StepTrace()], overlaps=True)


def test_the_allocator_takes_whole_segments() -> None:
    mib = 2**20
    assert reserved_bytes([(1, 1)]) == 2 * mib
    assert reserved_bytes([(1, mib), (2, mib)]) == 2 * mib
    assert reserved_bytes([(1, 2 * mib), (2, 18 * mib)]) == 20 * mib, "the rest of a segment is used"
    assert reserved_bytes([(1, 2 * mib), (2, 19 * mib)]) == (20 + 20) * mib, "where it does not do, there is another"
    assert reserved_bytes([(1, 11 * mib + 1)]) == 12 * mib
    halves = [(1, 9 * mib), (2, 9 * mib), (1, -9 * mib), (2, -9 * mib)]
    assert reserved_bytes([*halves, (3, 18 * mib)]) == 20 * mib, "freed neighbours are one block again"


def test_numbers_that_follow_from_constants_are_known() -> None:
    config = compose_another(get_recipe("single"), ["task.name=language"])
    with dry_world(config, 2, H100):
        gradient = torch.randn(3, 4)
        assert bool(torch.isfinite(gradient).all())
        assert not bool(torch.isnan(gradient).any())
        overflowed = torch.zeros(1)
        overflowed += torch.isinf(gradient).any()
        assert overflowed.byte()[0].item() == 0
        step = torch.zeros(())
        step += 1
        step += 1
        assert step.item() == 2
        assert gradient.sum().item() == 12
        assert gradient[0, 0].item() == 1


def test_an_operation_that_needs_numbers_is_named() -> None:
    said = why_not(DynamicOutputShapeException(torch.ops.aten.nonzero.default))
    assert "aten.nonzero.default" in said


def test_nothing_that_a_recipe_can_do_is_left_out_silently() -> None:
    said = "\n".join(beyond_the_table())
    for name in list_recipes():
        assert name in USUAL or name in said, name
    for word in ("parallel_mesh pipeline=N", "local_sgd"):
        assert word in said


def test_replicas_that_meet_in_one_step_of_many_send_a_share_of_their_weights() -> None:
    """As many bytes as the formula says; the more seldom they meet, the less a step waits."""
    (often, each_step), (seldom, share) = (
        planned("local_sgd", 16, *words) for words in (("period=1",), ("period=8", "fragments=3"))
    )
    assert bytes_by_kind(often) == each_step == {"all-reduce": WEIGHTS + 8}
    assert bytes_by_kind(seldom) == share == {"all-reduce": WEIGHTS / 8 + 8}
    assert seldom.step.times.exposed < often.step.times.exposed / 2
    assert seldom.peak["optimizer"] == pytest.approx(3 * WEIGHTS, rel=0.01), "two moments, and what they last agreed on"


def test_a_compiled_model_is_planned_as_it_is_issued() -> None:
    plain, compiled = (planned("ddp", 4, *words)[0] for words in ((), ("compile=true",)))
    assert bytes_by_kind(compiled) == bytes_by_kind(plain)
    assert compiled.peak == plain.peak


def test_a_storage_that_is_made_smaller_without_an_operation_is_seen() -> None:
    config = compose_another(get_recipe("single"), ["task.name=language"])
    with dry_world(config, 2, H100) as (_, watch, _):
        tensor = torch.zeros(1000)
        watch.ledger.begin()
        assert sum(watch.ledger.peak().values()) == 4000
        tensor.untyped_storage().resize_(0)
        watch.ledger.begin()
        assert sum(watch.ledger.peak().values()) == 0
    assert torch.zeros(10).untyped_storage().resize_(0).nbytes() == 0, "torch's own is back"


@pytest.mark.skipif(usable_cores() < 2, reason="with one core rows are planned in this process")
def test_rows_are_planned_beside_each_other_and_one_that_is_killed_is_said() -> None:
    mine = os.getpid()
    found = dict(planned_beside(lambda number: (number, os.getpid() != mine), [2, 0, 1]))
    assert found == {number: (number, True) for number in range(3)}
    assert dict(planned_beside(lambda number: os._exit(1), [0, 1])) == {0: None, 1: None}
    assert dict(planned_beside(lambda number: os.getpid(), [7])) == {7: mine}, "one row needs no other process"
