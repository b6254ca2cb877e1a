"""recipes.plan curve=true: steps that are not taken are those that would have been; measured curves, chosen links."""

from __future__ import annotations

import re
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lockstep.errors import UserError
from lockstep.models.gpt import GPT
from lockstep.parallel.tensor_plan import tensor_parallel_plan
from lockstep.plan.check import unrest
from lockstep.plan.clock import DeviceClock
from lockstep.plan.dry_run import dry_steps
from lockstep.plan.hardware import doubt_of_links, load_hardware, with_links
from lockstep.plan.links import Collective
from lockstep.plan.measured_seconds import operation_class, seconds_at
from lockstep.plan.probes import IN_TURN, ProbeResults, operation_probes, tiny_gpt
from lockstep.plan.rows import PlanRow
from lockstep.plan.scaling import CurvePoint, ScalingCurve, curve_ranks, formula_of, further
from lockstep.tasks.language import Language
from tests.unit.test_plan import H100, planned_config

TWO_A_NODE = replace(H100, per_node=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_step_that_is_not_taken_is_the_one_that_would_be(name: str) -> None:
    taken = {}
    for ranks in (4, 8, 32):
        recipe, config = planned_config(name, ranks, f"global_batch_size={2 * ranks}")
        taken[ranks] = dry_steps(recipe, config, ranks, TWO_A_NODE)
    recipe, config = planned_config(name, 8, "global_batch_size=16")
    formula = formula_of(PlanRow(recipe, config, 8, ()), 32, 64)
    made = further(taken[4], taken[8], 2, TWO_A_NODE, formula)
    assert made is not None
    sent = [given[0] for kind, given in made[0] if kind == "collective"]
    for each, real in zip(sent, taken[32].step.collectives, strict=True):
        assert (each.kind, each.ranks, each.nodes) == (real.kind, real.ranks, real.nodes)
    for kind in {each.kind for each in sent}:  # FSDP fills up small tensors more than large ones: the sum is by formula
        total = sum(each.size for each in taken[32].step.collectives if each.kind == kind)
        assert sum(each.size for each in sent if each.kind == kind) == pytest.approx(total, rel=1e-3), kind
    times = DeviceClock(TWO_A_NODE).replay(made[0])
    assert times.step == pytest.approx(taken[32].step.times.step, rel=0.02)
    assert made[1] == pytest.approx(taken[32].peak_bytes, rel=0.03)


def test_a_curve_says_where_it_stops_and_why() -> None:
    points = (
        CurvePoint(8, 800.0, 1.0, 0.0, 90e9, "nothing"),
        CurvePoint(16, 1500.0, 1.1, 0.1, 40e9, "all-gather's bytes between nodes"),
        CurvePoint(32, 1800.0, 1.8, 0.8, 20e9, "all-gather's hops between nodes"),
    )
    curve = ScalingCurve("fsdp", points, 80e9)
    assert curve.end == points[1]
    assert curve.efficiency(points[1]) == pytest.approx(15 / 16)
    said = curve.verdict()
    assert "stops at 16: on 32 44% of a step waits for all-gather's hops between nodes; fits from 16" in said
    assert ScalingCurve("ddp", points[:2], 80e9).end is None
    assert curve_ranks(100, 8) == [8, 16, 32, 64]


def test_seconds_lie_between_what_was_measured() -> None:
    curve = [(0.0, 0.0), (100.0, 1.0), (300.0, 5.0)]
    assert [seconds_at(curve, work) for work in (0, 50, 200, 400)] == [0.0, 0.5, 3.0, 7.0]
    assert seconds_at([(100.0, 1.0)], 10) == 1.0


def test_operations_have_the_class_that_they_cost() -> None:
    names = ("mm", "silu_backward", "sqrt", "clone", "embedding_dense_backward", "addcmul_", "add", "sum", "copy_")
    classes = [operation_class(name, float(name == "mm")) for name in names]
    expected = ["matmul", "function", "root", "copy", "lookup", "update", "elementwise", "reduction", "copy"]
    assert classes == expected
    flash = "_scaled_dot_product_flash_attention_for_cpu"
    assert operation_class(f"{flash}_backward", 1.0, 80) == "attention backward, 64"
    assert operation_class(flash, 1.0, 8) == "attention, 16", "narrow heads have a pace of their own"


def test_what_a_probe_makes_is_kept_for_a_while_and_no_longer() -> None:
    kept = ProbeResults()
    made = [torch.zeros(IN_TURN // 16) for _ in range(9)]  # each a quarter of what is kept
    alive = [weakref.ref(each) for each in made]
    while made:
        kept.keep(made.pop(0))
    assert [each() is not None for each in alive] == [False] * 5 + [True] * 4


@pytest.mark.parametrize("ranks", [1, 2, 4, 6, 16])
def test_any_number_of_ranks_can_share_the_gpt_that_is_timed(ranks: int) -> None:
    with torch.device("meta"):
        model = GPT(tiny_gpt(ranks))
    assert tensor_parallel_plan(Language(), "language", model, ranks, False)


def test_every_class_is_probed_from_the_host_alone_to_much_work() -> None:
    names = {probe.name for probe in operation_probes()}
    known = (
        "mm",
        "silu",
        "sqrt",
        "clone",
        "embedding",
        "addcmul_",
        "add",
        "sum",
        "convolution",
        "convolution_backward",
    )
    assert {operation_class(name, float(name == "mm")) for name in known} <= names
    assert {operation_class(f"attention{way}", 1.0, dim) for way in ("", "_backward") for dim in (16, 64, 128)} <= names
    points = {name: [probe.work for probe in operation_probes() if probe.name == name] for name in names}
    assert all(works == sorted(works) and works[-1] > 1000 * works[0] for works in points.values())


def test_a_measured_profile_is_read_back_and_counts(tmp_path: Path) -> None:
    measured = {"all-reduce": [(1.0, 1e-3), (1e6, 2e-3)], "matmul": [(0.0, 0.0), (1e9, 0.5)]}
    made = replace(H100, measured=measured, host={"view": 1e-6}, launch=1e-3, ranks_per_core=2.0, overlaps=False)
    file = tmp_path / "here.yaml"
    file.write_text(made.as_yaml(), encoding="utf-8")
    read = load_hardware(str(file))
    assert read == made
    assert Collective.among("all-reduce", 10**6, range(8), 8).seconds(read) == pytest.approx(2e-3)
    clock = DeviceClock(read)
    clock.operation("matmul", 1e9, "fp32", 1e3, [], [1], "matmul")
    assert clock.times.work == pytest.approx(0.501)
    assert clock.times.step == pytest.approx(1.002), "two ranks share a core"
    file.write_text(made.as_yaml().replace("- 1000000000.0", "- -1.0"), encoding="utf-8")
    with pytest.raises(UserError, match="measured: matmul: must be pairs"):
        load_hardware(str(file))


BYTES = 10**6
BETWEEN = {"all-reduce between nodes": [(1.0, 1e-3), (BYTES, 5e-3)], "all-reduce": [(1.0, 1e-4), (BYTES, 1e-3)]}
MEASURED = replace(H100, per_node=2, nodes=2, measured=BETWEEN, device="cpu")


@pytest.mark.parametrize(
    ("ranks", "nodes", "milliseconds"),
    [
        (4, 2, 1 + 4),  # as it was measured
        (2, 1, 1),  # inside a node
        (8, 4, 3 + 4 * (7 / 8) / (3 / 4)),  # three hops between nodes, and a little more by each card
        (2, 2, 1 + 4 * (1 / 2 * 2) / (3 / 4)),  # a rank per node, as two replicas exchange: each card carries all of it
    ],
)
def test_what_was_measured_between_nodes_goes_on(ranks: int, nodes: int, milliseconds: float) -> None:
    assert Collective("all-reduce", BYTES, ranks, nodes).seconds(MEASURED) == pytest.approx(milliseconds / 1e3)


def test_a_gpu_s_all_reduce_goes_on_as_a_tree() -> None:
    gpus, number = replace(MEASURED, device="cuda"), Collective("all-reduce", 1, 2048, 1024)
    assert number.seconds(gpus) == pytest.approx(10 * 1e-3)
    assert number.seconds(MEASURED) == pytest.approx(1023 * 1e-3), "a ring"


def test_a_link_that_is_chosen_replaces_what_was_measured() -> None:
    measured = MEASURED.measured | {"all-reduce, work": [(1.0, 1e-5)], "all-reduce between nodes, work": [(1.0, 1e-5)]}
    assert with_links(replace(MEASURED, measured=measured), "ndr", None).measured.keys() == {
        "all-reduce",
        "all-reduce, work",
    }
    inside = with_links(replace(MEASURED, measured=measured), None, "nvlink4").measured
    assert inside.keys() == {"all-reduce between nodes", "all-reduce between nodes, work"}


def test_links_that_were_not_measured_are_said_or_refused() -> None:
    assert not doubt_of_links(MEASURED, 64, None, "two.yaml"), "between nodes, too"
    assert not doubt_of_links(H100, 64, None, "h100"), "published"
    one_node = replace(MEASURED, nodes=1)
    assert not doubt_of_links(one_node, 2, None, "one.yaml")
    assert not doubt_of_links(one_node, 8, "ndr", "one.yaml")
    assert doubt_of_links(one_node, 8, None, "one.yaml").startswith(
        "hardware=one.yaml: was measured on one node of 2 ranks"
    )
    with pytest.raises(
        UserError, match=r"hardware=one\.yaml: was measured with one rank, and knows no link between 8; measure"
    ):
        doubt_of_links(replace(one_node, per_node=1), 8, None, "one.yaml")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("nodes: 2", "nodes: 1", "nodes=1: has curves between nodes; set on how many they were measured"),
        ("\nnodes: 2", "", "nodes=0: has curves between nodes"),
        ("nodes: 2", "nodes: 2.5", "nodes=2.5: allowed are whole numbers"),
        ("per_node: 2", "per_node: 1.5", "per_node=1.5: allowed are whole numbers"),
    ],
)
def test_a_profile_says_on_how_many_nodes_it_was_measured(old: str, new: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "two.yaml"
    file.write_text(MEASURED.as_yaml(), encoding="utf-8")
    assert load_hardware(str(file)) == MEASURED
    assert old in MEASURED.as_yaml()
    file.write_text(MEASURED.as_yaml().replace(old, new), encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(f"{file}: {said}")):
        load_hardware(str(file))


def test_a_busy_machine_is_said() -> None:
    assert "a load of 7.2 when this began" in unrest(7.2)
    assert not unrest(0.1)


def test_links_can_be_chosen() -> None:
    found = with_links(H100, "100gbe", "pcie4")
    assert found.between.bandwidth == pytest.approx(12.5e9 / 8), "a card per node"
    assert found.inside.bandwidth == pytest.approx(31.5e9)
    assert with_links(H100, "ndr", None).between == H100.between
    with pytest.raises(UserError, match="network=nvlink4: no such link; allowed are 100gbe, 400gbe, hdr, ndr"):
        with_links(H100, "nvlink4", None)
