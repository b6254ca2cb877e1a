"""recipes.plan with offload=true: what the host holds and updates, what is copied, and what waits for it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import yaml

from lockstep.config.compose import compose_another
from lockstep.config.schema import Config
from lockstep.errors import UserError
from lockstep.launch.validate import validate
from lockstep.plan.clock import HOST_UPDATE, DeviceClock
from lockstep.plan.config import PlanConfig
from lockstep.plan.dry_run import DryRun, dry_steps
from lockstep.plan.estimate import estimate
from lockstep.plan.formulas import expected_traffic
from lockstep.plan.hardware import OffloadHost, load_hardware
from lockstep.plan.rows import PlanRow, made_valid
from lockstep.registry import get_recipe

H100 = load_hardware("h100")
HOST = OffloadHost(memory=1e9, memory_bandwidth=10e9, memory_achieved=0.5, bandwidth=2e9, achieved=0.5)
PART = 4 * (197_184 + 128 * 18) // 4  # bytes of a rank's part of task=language's nano on four ranks
ADAM = 20 * PART  # bytes that torch's AdamW reads and writes, one operation after the other: 20 numbers per weight


def config_of(name: str, *words: str) -> Config:
    recipe = get_recipe(name)
    config = compose_another(recipe, ["task.name=language", "optim=adamw", "offload=true", *words])
    validate(config, recipe, 4)
    return config


@cache
def planned(name: str, *words: str) -> tuple[DryRun, dict[str, float]]:
    """(a recipe's step, bytes that the host reads and writes, that go to the device, and that come from it)."""
    found = dry_steps(get_recipe(name), config_of(name, *words), 4, H100)
    moved = {"host": 0.0, "to": 0.0, "from": 0.0}
    for kind, given in found.step.events:
        if kind in ("copy", "on_host"):
            moved["host" if kind == "on_host" else "to" if given[1] else "from"] += given[0]
    return found, moved


def test_fsdp_keeps_its_shards_on_the_host_and_sends_what_it_sends_without() -> None:
    found, moved = planned("fsdp")
    kept = [found.peak[part] for part in ("parameters", "gradients", "optimizer")]
    assert kept == [0, 0, 0], "none of it is on the device"
    assert found.host_peak == pytest.approx(4 * PART, rel=0.1), "weights, gradients and two moments"
    traffic: dict[str, int] = {}
    for (kind, _), size in found.step.traffic().items():
        traffic[kind] = traffic.get(kind, 0) + size
    assert traffic == expected_traffic("fsdp", found.config, 4)
    assert moved["to"] == pytest.approx(2 * PART, rel=0.02), "for forward, and for backward again"
    assert moved["from"] == pytest.approx(PART, rel=0.01)
    assert moved["host"] == pytest.approx(ADAM, rel=0.01)


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.soak), 3])
def test_deepspeed_keeps_its_optimizer_on_the_host(stage: int) -> None:
    found, moved = planned("deepspeed_zero", f"stage={stage}")
    assert found.peak["optimizer"] == found.peak["gradients"] == 0
    assert found.peak["parameters"] == pytest.approx(4 * PART if stage == 2 else PART, rel=0.02)
    assert found.host_peak > 4 * PART, "fp32 weights, gradients and two moments"
    # Stage 3 keeps gradients on the host while it adds them up, and brings them back for their norm.
    gradients = PART if stage == 2 else 2 * PART
    assert moved["from"] == moved["to"] == pytest.approx(gradients, rel=0.01)
    assert moved["host"] == pytest.approx(ADAM + 2 * PART, rel=0.1)


def test_a_slow_host_is_waited_for_and_a_slow_link_where_nothing_hides_it() -> None:
    found, moved = planned("fsdp")
    slow, quick = (replace(H100, offload=replace(HOST, memory_bandwidth=rate)) for rate in (1e9, 1e15))
    waits, works = (DeviceClock(each).replay(found.step.events) for each in (slow, quick))
    update = waits.kinds[HOST_UPDATE]
    assert update == pytest.approx(moved["host"] / 0.5e9, rel=0.1)
    assert waits.step - works.step == pytest.approx(update - works.kinds[HOST_UPDATE], rel=0.01)
    clock = DeviceClock(slow)
    clock.begin()
    clock.copy(1e6, to_device=True, hides=True, reads=[], writes=[1])
    clock.copy(1e6, to_device=False, hides=True, reads=[], writes=[2])  # the other direction is free
    clock.operation("memory", 0, "fp32", 1e9, [], [3])
    assert clock.times.exposed == 0
    clock.on_host(0.5e6, [2], [4])
    assert clock.end().exposed == pytest.approx(1e-3 - 1e9 / (H100.memory_bandwidth * H100.memory_achieved))
    clock.begin()
    clock.operation("memory", 0, "fp32", 1e6, [], [1])
    clock.copy(1e6, to_device=False, hides=False, reads=[1], writes=[2])  # as DeepSpeed's stages 1 and 2 copy
    assert clock.end().exposed == pytest.approx(1e-3)


def test_what_does_not_fit_the_host_does_not_fit() -> None:
    hardware = replace(H100, offload=replace(HOST, memory=PART))
    row = estimate(PlanRow(get_recipe("fsdp"), config_of("fsdp"), 4, ()), PlanConfig(), hardware)
    assert row.host_over == row.host_memory - PART > 2 * PART
    assert not row.fits
    assert replace(row, host_room=HOST.memory).fits


def test_a_host_that_is_not_known_is_asked_for(tmp_path: Path) -> None:
    recipe, unknown = get_recipe("fsdp"), replace(H100, offload=None)
    said = (
        r"its profile does not know the host; give it offload: \{memory, memory_bandwidth, memory_achieved, bandwidth, "
    )
    with pytest.raises(UserError, match=said):
        made_valid(config_of("fsdp"), recipe, 4, unknown)
    made_valid(config_of("fsdp"), recipe, 4, load_hardware("xeon8480"))  # it is the host itself: nothing moves
    own = yaml.safe_load(H100.as_yaml())
    del own["offload"]["bandwidth"]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    with pytest.raises(UserError, match="offload: lacks bandwidth"):
        load_hardware(str(tmp_path / "own.yaml"))
