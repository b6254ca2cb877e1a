"""What a run leaves behind, and what `run.steps` does between two batches."""

from __future__ import annotations

import json
import math
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from lockstep.callbacks.step_time import STEP_SHARES, StepTimeMonitor, loader_advice
from lockstep.config.schema import OptimConfig
from lockstep.data.batch import Batch
from lockstep.distributed.heartbeat import TRAINING, WAITING, Heartbeat
from lockstep.distributed.process_group import World
from lockstep.errors import UserError
from lockstep.run import Run
from lockstep.training.optim import build_scheduler, lr_factor
from lockstep.training.timing import SAMPLE, Stopwatch, percentile
from recipes import ddp, single
from tests.helpers.harness import compose_config, run_ranks, train, validate

RESULT_KEYS = """
    recipe status world_size backend device precision steps epochs samples_seen train_loss eval_loss eval_accuracy
    eval_f1
    images_per_second step_seconds_p50 step_seconds_p95 peak_memory_bytes parameters trainable_parameters resumed_from
    wall_seconds checkpoint_stall_seconds
""".split()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks over one epoch and a little more."""
    folder = tmp_path_factory.mktemp("run") / "out"
    train(ddp.train, folder, 2, "global_batch_size=96", "max_steps=16", "log_every=5", "logger=tensorboard")
    return folder


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_result_has_its_fields_and_they_agree(out: Path) -> None:
    result = json.loads((out / "result.json").read_text())
    assert set(RESULT_KEYS) <= set(result)
    assert (result["recipe"], result["status"], result["world_size"]) == ("ddp", "finished", 2)
    assert (result["steps"], result["epochs"], result["samples_seen"]) == (16, 1, 16 * 96)
    assert result["images_per_second"] == pytest.approx(96 / result["step_seconds_p50"])
    assert result["step_seconds_p50"] <= result["step_seconds_p95"]
    assert result["peak_memory_bytes"] == max(result["peak_memory_bytes_by_rank"]) > 2**26
    assert result["train_loss"] == lines(out)[-2]["loss"]
    for wait, cores, main in zip(*(result[f"{name}_by_rank"] for name in STEP_SHARES), strict=True):
        assert 0 < wait < 1
        assert 0 < main <= cores


def test_a_line_of_metrics_a_logged_step_and_an_evaluation(out: Path) -> None:
    steps = [line["step"] for line in lines(out) if "loss" in line]
    assert steps == [5, 10, 15, 16]
    evaluations = [(line["step"], line["epoch"]) for line in lines(out) if "eval_loss" in line]
    assert evaluations == [(14, 1), (16, 1)], "after the epoch's 14 steps, and at the end"


def test_tensorboard_gets_the_same_curve(out: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    curve = [(event.step, event.value) for event in events.Scalars("loss")]
    expected = [(line["step"], line["loss"]) for line in lines(out) if "loss" in line]
    assert [step for step, _ in curve] == [step for step, _ in expected]
    assert [value for _, value in curve] == pytest.approx([value for _, value in expected], rel=1e-6)


def test_metrics_csv_has_a_row_a_line(tmp_path: Path) -> None:
    train(single.train, tmp_path / "run", 1, "global_batch_size=96", "max_steps=2", "log_every=1")
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + len(lines(tmp_path / "run"))
    assert rows[0].startswith("step,epoch")


def test_the_exported_weights_need_nothing_of_ours(out: Path) -> None:
    from torchvision.models import resnet18

    state = torch.load(out / "model.pt", weights_only=True)
    assert all(tensor.device.type == "cpu" for tensor in state.values())
    plain = resnet18(num_classes=10)
    plain.conv1, plain.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()  # type: ignore[assignment]
    plain.load_state_dict(state)


def test_environment_holds_versions_and_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lockstep.utils.system import system_info

    monkeypatch.setenv("WANDB_API_KEY", "secret-token")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    found = system_info(["a", "b"], "cpu", "gloo")
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert found["environment"]["SLURM_JOB_ID"] == "17"
    assert "secret-token" not in json.dumps(found)


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    factor = lr_factor(OptimConfig(warmup_steps=4), 104)
    assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(54) == pytest.approx(0.5)
    assert factor(104) == pytest.approx(0.0)
    assert lr_factor(OptimConfig(warmup_steps=0, schedule="constant"), 10)(9) == 1.0


def drive(world: World, config: Any, out: str, body: Any) -> Any:
    return body(Run("test", config, world, Path(out)))


def in_run(body: Any, tmp_path: Path, *overrides: str) -> Any:
    """Call body(run) on one rank and return what it returns."""
    config = compose_config(single.train, "global_batch_size=96", *overrides)
    validate(config, single.train, 1)
    (tmp_path / "ranks").mkdir(parents=True)
    return run_ranks(drive, 1, config, str(tmp_path), body)[0]


def modes_and_rates(run: Run) -> tuple[list[bool], list[float], list[tuple[int, ...]]]:
    model = run.place(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = build_scheduler(run.config.optim, optimizer, run.scheduled_steps)
    modes, rates, shapes = [], [], []
    for batch in run.steps(model=model, optimizer=optimizer, scheduler=scheduler):
        modes.append(model.training)
        rates.append(optimizer.param_groups[0]["lr"])
        shapes.append(tuple(batch.inputs.shape))
        optimizer.step()
        scheduler.step()
        run.record(loss=model(batch.inputs).sum())
    return modes, rates, shapes


def test_the_model_is_back_in_train_mode_after_each_evaluation(tmp_path: Path) -> None:
    """Evaluation switches BatchNorm and dropout off; forgotten, the second epoch would train without them."""
    modes, rates, shapes = in_run(modes_and_rates, tmp_path, "epochs=3", "optim.warmup_steps=2")
    assert modes == [True] * 42
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert all(0 < later < earlier for earlier, later in pairwise(rates[2:]))
    assert set(shapes) == {(96, 3, 8, 8)}


def first_batch(run: Run) -> Batch:
    model = run.place(nn.Sequential(nn.Flatten(), nn.Linear(run.data.example(1).inputs.numel(), 10)))
    return next(run.steps(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0)))


def test_batches_come_normalised_resized_and_in_the_model_s_dtype(tmp_path: Path) -> None:
    batch = in_run(first_batch, tmp_path, "precision=fp64", "model.image_size=16", "channels_last=true")
    assert (batch.inputs.dtype, batch.inputs.shape) == (torch.float64, (96, 3, 16, 16))
    assert batch.inputs.is_contiguous(memory_format=torch.channels_last)
    assert abs(batch.inputs.mean().item()) < 0.2
    assert abs(batch.inputs.std().item() - 1) < 0.2
    assert batch.targets.dtype == torch.int64


@pytest.mark.parametrize(
    ("wanted", "layout"), [("true", torch.channels_last), ("false", torch.contiguous_format)], ids=str
)
def test_images_from_files_come_in_the_memory_format_asked_for(
    wanted: str, layout: torch.memory_format, tmp_path: Path
) -> None:
    for part in ("train", "val"):
        for name, level in (("dark", 51), ("light", 204)):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (20, 16), (level, 0, 255)).save(tmp_path / part / name / "image.png")
    words = ("data=imagefolder", f"data.root={tmp_path}", "global_batch_size=2", "data.workers=0", "model.image_size=8")
    batch = in_run(first_batch, tmp_path / "run", *words, f"channels_last={wanted}", "precision=fp32")
    assert batch.inputs.is_contiguous(memory_format=layout)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for image, label in zip(batch.inputs, batch.targets, strict=True):
        expected = (torch.tensor([(0.2, 0.8)[int(label)], 0, 1]) - mean) / std
        torch.testing.assert_close(image, expected.view(3, 1, 1).expand(3, 8, 8))


def autocast_dtypes(run: Run) -> tuple[torch.dtype, torch.dtype]:
    layer = run.place(nn.Linear(4, 4))
    with run.autocast():
        return layer(torch.zeros(1, 4)).dtype, layer.weight.dtype


def test_bf16_computes_in_bf16_on_fp32_weights(tmp_path: Path) -> None:
    assert in_run(autocast_dtypes, tmp_path, "precision=bf16") == (torch.bfloat16, torch.float32)


def forget_the_loss(run: Run) -> str:
    model = run.place(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)))
    try:
        for _ in run.steps(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0)):
            pass
    except UserError as error:
        return str(error)
    return "trained"


def test_a_step_without_a_recorded_loss_is_refused(tmp_path: Path) -> None:
    assert "call run.record(loss=loss)" in in_run(forget_the_loss, tmp_path, "log_every=1")


def compiled(run: Run) -> tuple[list[str], bool]:
    model = run.place(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    inputs = torch.randn(2, 4)
    same = torch.allclose(model(inputs), model[1](model[0](inputs)), atol=1e-6)  # type: ignore[index]
    return list(model.state_dict()), same and model._compiled_call_impl is not None


@pytest.mark.slow
def test_a_compiled_model_keeps_its_names_and_its_numbers(tmp_path: Path) -> None:
    assert in_run(compiled, tmp_path, "compile=true") == (["0.weight", "0.bias"], True)


@pytest.mark.slow
def test_every_switch_of_the_arithmetic_trains(tmp_path: Path) -> None:
    """Each switch does its work in the real recipe; that it still learns is the loss."""
    for number, switch in enumerate(("precision=bf16", "channels_last=true", "optim=adamw", "model.init=xavier")):
        out = tmp_path / str(number)
        train(single.train, out, 1, "global_batch_size=96", "max_steps=4", switch)
        assert math.isfinite(json.loads((out / "result.json").read_text())["train_loss"])


class Clock:
    """A Pulse's clocks, made up: all three, set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passed = self.computed = self.main = 0.0
        monkeypatch.setattr(Heartbeat, "_clocks", lambda heartbeat: (self.computed, self.main, 0.0))
        wall = SimpleNamespace(perf_counter=lambda: self.passed, time=time.time)
        monkeypatch.setattr("lockstep.distributed.heartbeat.time", wall)

    def go(self, passed: float, computed: float, main: float) -> None:
        self.passed, self.computed, self.main = self.passed + passed, self.computed + computed, self.main + main


@pytest.mark.parametrize(("steps", "profiled"), [(0, 0), (1, 0), (4, 0), (12, 0), (14, 3)])
def test_what_the_steps_were_spent_on_leaves_out_the_warm_up(
    steps: int, profiled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step: 1 s waiting for data, 3 s on more than one core; evaluations and a slow warm-up do not count."""
    clock = Clock(monkeypatch)
    heartbeat = Heartbeat()
    clock.go(99, 99, 99)
    load = StepTimeMonitor(heartbeat)
    slow = {*range(min(steps - 1, 5 if steps > 9 else 1)), *range(6, 6 + profiled)}
    for step in range(steps):
        load.before_step()
        if profiled and step == 6:
            since = heartbeat.of_steps()
        for phase, spent in ((WAITING, (10 if step in slow else 1, 0, 0)), (TRAINING, (3, 5, 3))):
            heartbeat.enter(phase)
            clock.go(*spent)
        if profiled and step == 5 + profiled:
            load.leave_out(profiled, since)
        if step % 3 == 0:
            heartbeat.enter("evaluating")
            clock.go(50, 0, 0)
    expected = {"data_wait_share": 0.25, "cores_busy": 1.25, "main_thread_busy": 0.75}
    assert load.shares() == (pytest.approx(expected) if steps else {})


def test_a_stopwatch_remembers_a_sample_of_a_long_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """100,000 steps, every tenth of which takes three times as long, after a warm-up that is slower still."""
    lengths = [60.0] * 5 + [3.0 if step % 10 == 9 else 1 + step / 1e6 for step in range(100_000)]
    now = [0.0]
    monkeypatch.setattr(Stopwatch, "_now", lambda watch: now[0])
    watch = Stopwatch(torch.device("cpu"))
    for length in lengths:
        watch.start()
        now[0] += length
        watch.stop()
    assert watch.count == 100_005
    assert watch.total() == pytest.approx(now[0])
    found = watch.seconds()
    assert len(found) == SAMPLE
    assert percentile(found, 50) == pytest.approx(1.05, rel=0.01)
    assert percentile(found, 95) == pytest.approx(3.0)
    assert 0.08 < sum(length > 2.9 for length in found) / SAMPLE < 0.12
    assert max(found) < 60


def test_a_long_wait_for_images_is_given_its_knob() -> None:
    assert "data.workers=1" in loader_advice(0, ranks=2, threads=1, cores=2)
    assert loader_advice(2, ranks=1, threads=1, cores=8) == "set data.workers=4"
    assert loader_advice(3, ranks=2, threads=1, cores=8).startswith("decoding shares 8 cores with the model")
