"""What is chosen for the hardware by itself, that each choice can be typed instead, and that it is said."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep.distributed.process_group import World
from lockstep.recipe import Recipe
from lockstep.training import auto as tuning
from recipes import ddp, deepspeed_zero
from tests.helpers.harness import compose_config, execute, result, run_ranks

FASTEST = {"device": "cpu", "fast": "bf16", "units": "AVX-512", "keeps_memory": True}


def chosen(recipe: Recipe = ddp.train, asked: dict[str, Any] | None = None, **hardware: Any) -> dict[str, Any]:
    config = recipe.config(**(asked or {}))
    return {choice.key: choice.value for choice in tuning.make_choices(config, recipe.name, **FASTEST | hardware)}


def test_everything_that_is_auto_is_decided_and_nothing_else() -> None:
    keys = {"precision", "channels_last", "allocator", "cudnn_benchmark"}
    assert chosen(asked={"precision": "auto"}).keys() == keys
    typed: dict[str, Any] = {
        "precision": "fp32",
        "channels_last": True,
        "allocator": "system",
        "cudnn_benchmark": False,
    }
    assert chosen(asked=typed) == {}
    for key in keys - {"precision"}:
        assert chosen(asked={name: value for name, value in typed.items() if name != key}).keys() == {key}


def test_sixteen_bits_where_the_device_has_units_for_them() -> None:
    auto = {"precision": "auto"}
    assert chosen(asked=auto)["precision"] == "bf16"
    assert chosen(asked=auto)["channels_last"] is True
    plain = chosen(asked=auto, fast="fp32")
    assert (plain["precision"], plain["channels_last"]) == ("fp32", False)
    assert chosen(asked={"precision": "bf16"}, fast="fp32")["channels_last"] is True, "it goes with the arithmetic"
    assert chosen(deepspeed_zero.train, auto)["channels_last"] is False
    assert chosen()["channels_last"] is False, "of fp32"


def test_the_allocator_is_told_where_it_listens() -> None:
    assert chosen()["allocator"] == "keep"
    assert chosen(keeps_memory=False)["allocator"] == "system"
    gpu = chosen(device="cuda")
    assert (gpu["allocator"], gpu["cudnn_benchmark"]) == ("system", True)


@pytest.mark.parametrize(
    ("line", "fast"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16", "bf16"),
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16 amx_tile", "bf16"),
        ("Features\t: fp asimd asimdhp bf16", "bf16"),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni", "fp32"),
        ("model name\t: bf16", "fp32"),
    ],
)
def test_a_cpu_tells_by_its_flags(line: str, fast: str, tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\n{line}\n")
    assert tuning.arithmetic(torch.device("cpu"), file)[0] == fast
    assert tuning.arithmetic(torch.device("cpu"), tmp_path / "none")[0] == "fp32"


@pytest.mark.slow
@pytest.mark.parametrize("fast", ["fp32", "bf16"])
def test_a_run_says_what_it_chose_and_keeps_its_precision(
    fast: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on in what it began with, on whatever hardware; what was typed is frozen, not what it came to."""
    out = tmp_path / "run"
    words = ("precision=auto", "max_steps=2", "global_batch_size=24", "checkpoint.every=1")
    monkeypatch.setattr(tuning, "arithmetic", lambda device: (fast, "this test"))
    execute(ddp.train, out, 2, *words)
    ended = result(out)
    assert (ended["precision"], ended["channels_last"]) == (fast, fast == "bf16")
    assert ended["allocator"] == "keep"
    log = (out / "ranks/0.log").read_text()
    assert f"precision={fast} (this test " in log
    assert f"channels_last={str(fast == 'bf16').lower()} (" in log
    assert "allocator=keep (" in log
    assert "cudnn" not in log
    assert compose_config(ddp.train, *words).precision == "auto"
    assert "precision: auto" in (out / "config.yaml").read_text()
    monkeypatch.setattr(tuning, "arithmetic", lambda device: ({"fp32": "bf16", "bf16": "fp32"}[fast], "another"))
    (out / "result.json").unlink()
    execute(ddp.train, out, 2, *words[:1], "max_steps=3", *words[2:])
    assert result(out)["precision"] == fast


@pytest.mark.slow
def test_ranks_agree_on_the_slowest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def arithmetic(device: torch.device) -> tuple[str, str]:
        return ("fp32" if torch.distributed.get_rank() else "bf16"), "this test"

    monkeypatch.setattr(tuning, "arithmetic", arithmetic)
    execute(ddp.train, tmp_path / "run", 2, "precision=auto", "max_steps=1", "global_batch_size=24")
    assert result(tmp_path / "run")["precision"] == "fp32"
    assert "another rank's device" in (tmp_path / "run/ranks/0.log").read_text()


@pytest.mark.slow
def test_what_deepspeed_cannot_is_not_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "arithmetic", lambda device: ("bf16", "this test"))
    execute(deepspeed_zero.train, tmp_path / "run", 2, "precision=auto", "max_steps=1", "global_batch_size=24")
    ended = result(tmp_path / "run")
    assert (ended["precision"], ended["channels_last"]) == ("bf16", False)


def page_faults(world: World) -> tuple[int, int]:
    """Of ten blocks of 32 MiB, one after the other: (before, after) the C library was told to keep them."""

    def count() -> int:
        first = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            torch.zeros(2**23)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first

    before = count()
    tuning.keep_memory()
    count()  # takes the pages that the others will have, and until the heap has settled some more
    return before, count()


def test_kept_memory_is_used_again_without_page_faults() -> None:
    [(before, after)] = run_ranks(page_faults, 1)
    assert before > 10 * 10, "large pages at best: a block has 16 of 2 MiB, or 8,192 of 4 KiB"
    assert after < before / 10
