"""benchmarks/gpu.py where there is no GPU: that it measures, leaves out what does not fit, and survives what fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

CPU = torch.device("cpu")
EAGER = next(each.options for each in gpu.plan(quick=True) if each.kind == "bare")


@pytest.mark.slow
def test_what_fits_is_measured_and_written_and_the_rest_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = [
        gpu.Measurement("rates", "rates", {"quick": True}, 1),
        gpu.Measurement("broken", "bare", EAGER | {"model": "resnet7"}, 1),
        gpu.Measurement("endless", "bare", EAGER | {"steps": 10**9}, 1, limit=1),
        gpu.Measurement("late", "bare", EAGER, 10_000),
    ]
    monkeypatch.setattr(gpu, "plan", lambda quick: plan)
    monkeypatch.setenv("OUT", str(tmp_path))
    gpu.main(["--device", "cpu", "--quick", "--seconds", "400"])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["rates"]["bytes_per_second"] > 0 < found["rates"]["flops_per_second"]
    assert "resnet7" in found["broken"]["failed"]
    assert found["endless"]["failed"] == "not done after 1 s"
    assert "left out" in found["late"]["failed"]
    said = capsys.readouterr().out
    assert all(each.name in said for each in plan)


def test_the_bare_loop_trains() -> None:
    found = gpu.bare(CPU, EAGER | {"host": True, "fused": True, "channels_last": True})
    assert found["images_per_second"] == pytest.approx(2 / found["step_seconds"])


@pytest.mark.slow
def test_a_recipe_is_measured(tmp_path: Path) -> None:
    options = next(each.options for each in gpu.plan(quick=True) if each.kind == "recipe")
    found = gpu.through_recipe(CPU, options | {"profile": 1})
    assert found["images_per_second"] > 0
    assert 0 < found["data_wait_share_by_rank"] < 1
    assert found["profile"]["shares"]["convolution"] > 0
    assert gpu.profile_table(found["profile"]).row_count == 20


def test_the_work_of_a_resnet_50_is_what_is_published() -> None:
    """4.09 billion multiplications an image forward, and twice that backward, but for the images' own gradient."""
    found = gpu.work(CPU, {"model": "resnet50", "image_size": 224})
    assert found["flops"] == pytest.approx(6 * 4.09e9, rel=0.02)
    assert found["update_bytes"] == 20 * 25_557_032
    rates = {"bytes_per_second": 1e12, "flops_per_second": 1e14}
    limits = gpu.limits({"rates": rates, "work": found}, 256)
    assert limits is not None
    roofline, fused = limits
    assert roofline < fused < 1e14 / found["flops"]
    assert roofline < 1e12 / found["bytes"]


def test_shares_and_ratios_are_worked_out_of_what_was_measured() -> None:
    options = {"batch": 10, "compile": True}
    plan = [
        gpu.Measurement("ours", "recipe", options | {"recipe": "single", "profile": 5}),
        gpu.Measurement("theirs", "bare", options),
        gpu.Measurement("host", "bare", options | {"host": True}),
        gpu.Measurement("other", "bare", options | {"compile": False}),
    ]
    found = {
        "rates": {"bytes_per_second": 100.0, "flops_per_second": 1000.0},
        "work": {"operations": [["conv", 10, 0.5], ["relu", 0, 1.0]], "flops": 10, "update_bytes": 50},
        "ours": {"images_per_second": 9.0},
        "theirs": {"images_per_second": 10.0},
        "host": {"images_per_second": 6.0},
        "other": {"images_per_second": 1.0},
    }
    assert gpu.limits(found, 10) == pytest.approx((1 / (0.01 + 0.01 + 0.05), 1 / (0.01 + 0.05)))
    gpu.derive(found, plan)
    assert found["ours"]["of_bare"] == 0.9
    assert found["ours"]["of_bare_from_the_host"] == 1.5
    assert found["ours"]["of_roofline"] == pytest.approx(9 * 0.07)
    assert found["ours"]["of_matmul_rate"] == pytest.approx(0.09)
