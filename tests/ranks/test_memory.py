"""Where memory goes: counted by layer, predicted without any, and graphs that outlive their step are named."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW

from lockstep import Run
from lockstep.callbacks import device_stats
from lockstep.callbacks.device_stats import DeviceStats
from lockstep.config.schema import Config
from lockstep.distributed.process_group import World
from lockstep.memory.predict import predict_activations, predict_memory, sharded_state_bytes
from lockstep.memory.tracker import KINDS, MemoryTracker, local_bytes, memory_by_layer
from lockstep.memory.usage import group_bytes, process_bytes
from lockstep.models.resnet import build_model
from lockstep.registry import list_recipes
from recipes import doctor
from tests.helpers.harness import execute, lines, result, run_ranks

pytestmark = pytest.mark.usefixtures("narrow")

MORE = {"pipeline_parallel": ["micro_batches=4"], "fsdp": ["precision=bf16"], "lightning_trainer": ["accumulate=2"]}
MORE["transfer_learning"] = MORE["lora"] = ["weights=random"]
SHORT = ["max_steps=8", "global_batch_size=16", "log_every=1", "eval_every=0", "eval_batch_size=360"]


def config_of(**values: Any) -> Config:
    config = Config(**values)
    config.model.num_classes, config.model.image_size = 10, 16
    return config


QUICK = ("ddp", "deepspeed_zero", "fsdp", "lightning_trainer", "pipeline_parallel")
EVERY = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in list_recipes()]


@pytest.mark.slow_except("ddp", "pipeline_parallel")
@pytest.mark.soak_for("parallel_mesh", "tensor_parallel")
@pytest.mark.parametrize("name", EVERY)
def test_every_recipe_reports_what_its_ranks_hold_and_keeps_no_graph(name: str, tmp_path: Path) -> None:
    recipe = importlib.import_module(f"recipes.{name}").train
    ranks = recipe.ranks or 2
    execute(recipe, tmp_path / "run", ranks, "memory=report", *SHORT, *MORE.get(name, []))
    found, report = result(tmp_path / "run"), json.loads((tmp_path / "run" / "memory.json").read_text())
    assert "graphs_kept" not in found, "nothing outlives its step here"
    assert len(report["ranks"]) == ranks
    for rank, held in zip(report["ranks"], found["state_bytes_by_rank"], strict=True):
        state = sum(rank["total"][kind] for kind in KINDS[:3])
        if name in ("transfer_learning", "lora"):  # frozen layers are held too, and have no gradients
            assert rank["total"]["gradients"] < 0.5 * rank["total"]["parameters"]
            assert state > held
        else:
            assert state == pytest.approx(held, rel=0.02)
        assert rank["total"]["activations"] > 0
        assert rank["total"] == {kind: sum(layer[kind] for layer in rank["layers"]) for kind in KINDS}


def test_the_progress_line_says_how_busy_the_device_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU with clocks made up; a GPU's figures with the driver's words put in."""
    clocks = SimpleNamespace(perf_counter=iter((10.0, 12.0)).__next__, process_time=iter((5.0, 8.0)).__next__)
    monkeypatch.setattr(device_stats, "time", clocks)
    words, figures = DeviceStats(torch.device("cpu")).read()
    busy, used = re.fullmatch(r"([\d.]+) cores busy, ([\d,]+) MiB", words).groups()  # type: ignore[union-attr]
    assert busy == "1.5"
    monkeypatch.undo()
    assert abs(int(used.replace(",", "")) * 2**20 - process_bytes("VmRSS")) < 2**25
    assert figures == {}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 4 * 2**30))
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 87)
    words, figures = DeviceStats(torch.device("cuda", 0)).read()
    assert words == "GPU 87% busy, 3,072 of 4,096 MiB"
    assert figures == {"gpu_memory_bytes": 3 * 2**30, "gpu_memory_share": 0.75, "gpu_busy": 0.87}

    def missing(device: Any) -> int:
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "utilization", missing)
    assert DeviceStats(torch.device("cuda", 0)).read()[0] == "3,072 of 4,096 MiB"


def test_counting_changes_no_bit(tmp_path: Path) -> None:
    ddp = importlib.import_module("recipes.ddp").train
    for name, words in {"plain": [], "counted": ["memory=report"]}.items():
        execute(ddp, tmp_path / name, 2, *SHORT, "max_steps=2", *words)
    assert lines(tmp_path / "plain") == lines(tmp_path / "counted")


CASES = [("fp32", "adamw"), ("bf16", "sgd"), ("fp64", "sgd")]


@pytest.mark.slow
def test_what_is_predicted_is_what_a_real_step_holds() -> None:
    """The prediction allocates nothing: here the same steps are taken with real memory."""
    run_ranks(predicted_and_real, 1)


def predicted_and_real(world: World) -> None:
    for precision, optim in CASES:
        config = config_of(precision=precision)
        config.optim.name = optim
        expected = predict_memory(config, 6)
        dtype = torch.float64 if precision == "fp64" else torch.float32
        model = build_model(config.model).to(dtype)
        optimizer: Any = SGD(model.parameters(), momentum=0.9) if optim == "sgd" else AdamW(model.parameters())
        tracker = MemoryTracker(model)
        with tracker, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            cross_entropy(model(torch.randn(6, 3, 16, 16, dtype=dtype)), torch.zeros(6, dtype=torch.int64)).backward()
        gradients = {name: local_bytes(parameter.grad) for name, parameter in model.named_parameters()}
        optimizer.step()
        real = {layer.name: layer for layer in memory_by_layer(model, optimizer, gradients, tracker)}
        assert {layer.name for layer in expected.layers} == set(real)
        for layer in expected.layers:
            mine = real[layer.name]
            for kind in KINDS[:3]:
                assert getattr(layer, kind) == getattr(mine, kind)
            assert layer.output == mine.output
            assert layer.activations == pytest.approx(mine.activations, rel=0.01, abs=4096)
        sums = expected.sums()
        assert expected.peak["parameters"] == sums["parameters"]
        assert expected.peak["optimizer"] == sums["optimizer"]
        assert 0.5 * sum(sums.values()) < sum(expected.peak.values()) < 1.5 * sum(sums.values())


def test_activations_grow_with_the_images_and_nothing_else_does() -> None:
    ((small, large, huge),) = run_ranks(sums_of, 1, (4, 12, 10_000_000))
    assert large["activations"] == pytest.approx(3 * small["activations"], rel=0.02)
    assert [small[kind] for kind in KINDS[:3]] == [large[kind] for kind in KINDS[:3]]
    assert huge["activations"] > 2**40, "what no machine has can be asked about"


def sums_of(world: World, sizes: tuple[int, ...]) -> list[dict[str, int]]:
    found = [predict_memory(config_of(), images, peak=False).sums() for images in sizes]
    assert [predict_activations(config_of(), images).total for images in sizes] == [
        each["activations"] for each in found
    ]
    return found


@pytest.mark.soak
@pytest.mark.parametrize(
    ("name", "words", "technique"),
    [
        ("fsdp", ["optim=adamw"], "fsdp"),
        ("deepspeed_zero", ["optim=adamw", "stage=1"], "deepspeed_zero stage=1"),
        ("deepspeed_zero", ["stage=2"], "deepspeed_zero stage=2"),
        ("deepspeed_zero", ["optim=adamw", "stage=3"], "deepspeed_zero stage=3"),
    ],
)
def test_the_formulas_are_what_the_recipes_measure(name: str, words: list[str], technique: str, tmp_path: Path) -> None:
    recipe = importlib.import_module(f"recipes.{name}").train
    execute(recipe, tmp_path / "run", 2, *SHORT, "max_steps=1", *words)
    config = config_of()
    config.model.image_size, config.optim.name = 8, "adamw" if "optim=adamw" in words else "sgd"
    formula, found = sharded_state_bytes(config, 2)[technique], result(tmp_path / "run")
    if name == "deepspeed_zero":  # its gradients are cut where its buckets end, and measured after the cut
        assert max(found["held_weights_bytes"]) == pytest.approx(formula["parameters"], rel=0.02)
        assert max(found["held_optimizer_bytes"]) == pytest.approx(formula["optimizer"], rel=0.02)
        if "stage=1" not in words:
            assert max(found["held_gradients_bytes"]) == pytest.approx(formula["gradients"], rel=0.35)
    else:
        assert max(found["state_bytes_by_rank"]) == pytest.approx(formula["total"], rel=0.001)


LANGUAGE = ["task=language", "optim=adamw"]
TECHNIQUES = {
    "tensor_parallel": (2, [*LANGUAGE, "sequence_parallel=true"]),
    "context_parallel": (2, LANGUAGE),
    "expert_parallel": (2, [*LANGUAGE, "task.experts=4"]),
    "zero1": (2, ["optim=adamw"]),
    "parallel_mesh": (4, [*LANGUAGE, "pipeline=2", "micro_batches=2"]),
    "fsdp": (2, ["task=language", "optim=muon"]),
    "local_sgd": (2, ["optim=sgd"]),
    "lora": (2, ["weights=random", "r=2"]),
    "comm_hooks": (2, LANGUAGE),
    "ddp": (2, ["task=language", "optim=muon"]),
}


@pytest.mark.slow
@pytest.mark.soak_for(*(name for name in TECHNIQUES if name != "tensor_parallel"))
@pytest.mark.parametrize("name", TECHNIQUES)
def test_the_doctor_predicts_what_each_technique_leaves_a_rank(name: str, tmp_path: Path) -> None:
    ranks, words = TECHNIQUES[name]
    execute(doctor.train, tmp_path / "run", ranks, "check=memory", f"recipes=[{name}]", "global_batch_size=16", *words)
    found = json.loads((tmp_path / "run" / "memory.json").read_text())["technique"]
    for kind in (*KINDS[:3], "total"):
        assert found["measured"][kind] == pytest.approx(found["predicted"][kind], rel=0.01), (kind, found)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_the_doctor_sets_the_measured_beside_the_sum(name: str, tmp_path: Path) -> None:
    execute(
        doctor.train, tmp_path / "run", 2, "check=memory", f"recipes=[{name}]", "global_batch_size=24", "accumulate=2"
    )
    found = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert (found["samples"], found["unit"]) == (6, "images")
    held = found["ranks"][0]["total"]
    assert held["activations"] == pytest.approx(found["total"]["activations"], rel=0.02)
    assert sum(held[kind] for kind in KINDS[:3]) == pytest.approx(found["sharded"][name]["total"], rel=0.01)
    assert len(found["measured_peak_bytes_by_rank"]) == 2
    assert min(found["measured_peak_bytes_by_rank"]) > 0
    names = [layer["name"] for layer in found["layers"]]
    assert [each["name"] for each in found["ranks"][1]["layers"]] == names
    assert "memory" in (tmp_path / "run" / "config.yaml").read_text()


def keeping(world: World, out: str, config: Config, kept: str) -> list[int]:
    """Train, and keep something with its graph; the steps that the run complains of."""
    run = Run("keeping", config, world, Path(out))
    model = build_model(config.model)
    optimizer = SGD(model.parameters(), lr=0.01)
    losses: list[Any] = []
    total: Any = 0
    for batch in run.steps(model=model, optimizer=optimizer):
        logits = model(batch.inputs)
        loss = cross_entropy(logits, batch.targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.record(loss=loss)
        if kept == "list":
            losses.append(loss)
        elif kept == "sum":
            total = total + loss
        elif kept == "output":
            losses.append(logits)
        elif kept == "detached":
            losses.append(loss.detach())
        elif kept == "last":
            losses = [loss, logits]
    run.finish()
    return list(run.notes.get("graphs_kept", []))


@pytest.mark.slow_except("sum", "detached")
@pytest.mark.parametrize(("kept", "steps"), [("list", 3), ("sum", 3), ("output", 3), ("detached", 0), ("last", 0)])
def test_a_loss_that_is_kept_with_its_graph_is_named_once(kept: str, steps: int, tmp_path: Path) -> None:
    config = config_of(max_steps=12, global_batch_size=8, eval_every=0)
    config.model.image_size, config.data.num_classes = 8, 10
    (tmp_path / "ranks").mkdir()
    (found,) = run_ranks(keeping, 1, str(tmp_path), config, kept)
    assert found == list(range(1, steps + 1))
    log = (tmp_path / "ranks" / "0.log").read_text()
    assert log.count("memory leak") == (steps > 0)
    assert ("loss.detach()" in log) == (steps > 0)


def test_a_control_group_s_limit_is_found(tmp_path: Path) -> None:
    """Version 2, of a container, and version 1, of a Slurm job's step."""
    for path, text in {
        "proc/self/cgroup": "4:memory:/slurm/job_7\n1:cpu:/\n0::/box\n",
        "sys/fs/cgroup/memory/slurm/job_7/memory.limit_in_bytes": "1000",
        "sys/fs/cgroup/memory/slurm/job_7/memory.usage_in_bytes": "900",
        "sys/fs/cgroup/memory/slurm/job_7/memory.stat": "inactive_file 1\ntotal_inactive_file 300\n",
        "sys/fs/cgroup/box/memory.max": "max",
        "sys/fs/cgroup/box/memory.current": "5",
        "sys/fs/cgroup/box/memory.stat": "inactive_file 1\n",
        "sys/fs/cgroup/memory.max": "5000",
        "sys/fs/cgroup/memory.current": "700",
        "sys/fs/cgroup/memory.stat": "inactive_file 100\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert [free for free, _ in group_bytes(tmp_path)] == [400, 4400]
