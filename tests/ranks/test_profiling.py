"""`profile=N`: which part of the communication is exposed, worked out of made-up events and of real ranks' traces."""

from __future__ import annotations

import json
import random
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lockstep.callbacks.communication import BRIDGE, Event, Interval, common, exposed, forest, length, minus, union
from lockstep.callbacks.profiler import DATA, STEP, Profiler, class_of, most_expensive, read_trace, step_costs
from lockstep.callbacks.step_time import StepTimeMonitor
from lockstep.distributed.process_group import World
from lockstep.run import Run
from lockstep.training import timing
from tests.helpers.harness import execute, result, run_ranks
from tests.helpers.narrow_resnet import narrow_resnet18
from tests.helpers.processes import wait_until
from tests.ranks.test_run import in_run

TINY = (
    "data=synthetic",
    "data.size=48",
    "data.image_size=16",
    "global_batch_size=8",
    "eval_every=0",
    "checkpoint.minutes=0",
)


# Intervals --------------------------------------------------------------------------------------------------------


def seconds_of(intervals: list[Interval]) -> set[int]:
    """The whole numbers that intervals with whole ends cover."""
    return {second for start, end in intervals for second in range(int(start), int(end))}


@pytest.mark.parametrize("seed", range(20))
def test_unions_differences_and_sections_cover_what_sets_do(seed: int) -> None:
    draw = random.Random(seed)
    some, others = (
        [(float(start), float(start + draw.randint(0, 9))) for start in draw.choices(range(60), k=draw.randint(0, 12))]
        for _ in range(2)
    )
    one, two = union(some), union(others)
    for found, expected in (
        (one, seconds_of(some)),
        (minus(one, two), seconds_of(some) - seconds_of(others)),
        (common(one, two), seconds_of(some) & seconds_of(others)),
    ):
        assert seconds_of(found) == expected
        assert length(found) == len(expected)


def test_short_gaps_are_bridged_where_asked() -> None:
    assert union([(0, 1), (1.5, 2), (3, 4)], bridge=0.5) == [(0, 2), (3, 4)]
    assert union([(0, 5), (1, 2)]) == [(0, 5)]


# Made-up events ---------------------------------------------------------------------------------------------------


def op(name: str, start: float, end: float, thread: str = "main", kind: str = "cpu_op") -> Event:
    return Event(name, kind, start, end, thread)


def share(*events: Event) -> tuple[float, float]:
    """(communication, exposed), from 0 to 100 s."""
    return exposed(list(events), forest(events), [(0, 100)])


ALL_REDUCE = op("gloo:all_reduce", 10, 20, "gloo", "user_annotation")


def test_what_an_operation_covers_is_hidden_and_the_rest_is_exposed() -> None:
    assert share(ALL_REDUCE) == (10, 10)
    assert share(ALL_REDUCE, op("aten::conv2d", 0, 14)) == (10, 6)
    assert share(ALL_REDUCE, op("aten::conv2d", 0, 14), op("aten::add", 13, 30, "another")) == (10, 0)
    assert share(ALL_REDUCE, op("gloo:send", 15, 25, "main", "user_annotation")) == (15, 15)
    assert share(op("gloo:recv", -5, 5, "main", "user_annotation")) == (5, 5), "outside of the steps"


def test_an_operation_that_waits_for_a_collective_counts_by_what_is_inside_it() -> None:
    layer = op("SyncBatchNorm", 5, 25), op("aten::native_batch_norm", 5, 9), op("c10d::allreduce_", 9, 9.5)
    assert share(ALL_REDUCE, *layer) == (10, 10)
    assert share(ALL_REDUCE, *layer, op("aten::mul", 18, 19)) == (10, 9)
    wrapped = op("aten::some_layer", 4, 30), op("aten::mul", 12, 17), op("c10d::allreduce_", 9, 9.5)
    assert share(ALL_REDUCE, *wrapped) == (10, 5), "it talks itself"
    hooks = op("autograd::engine::evaluate_function: ReluBackward0", 0, 30), op("aten::threshold_backward", 11, 12)
    assert share(ALL_REDUCE, *hooks) == (10, 9), "a hook may wait in there"
    forward = op("DistributedDataParallel.forward", 0, 30, kind="user_annotation")
    assert share(ALL_REDUCE, forward, op("aten::conv2d", 15, 16)) == (10, 9)
    assert share(ALL_REDUCE, op("CompiledFunction", 0, 30)) == (10, 0), "what was compiled shows no operations"


def test_bookkeeping_between_two_operations_is_no_wait() -> None:
    apart = BRIDGE * 0.9
    assert share(ALL_REDUCE, op("aten::a", 0, 15), op("aten::b", 15 + apart, 30)) == (10, 0)
    assert share(ALL_REDUCE, op("aten::a", 0, 15), op("aten::b", 15 + 2 * BRIDGE, 30))[1] == pytest.approx(2 * BRIDGE)


def test_on_a_gpu_its_streams_decide_and_the_host_does_not() -> None:
    nccl = op("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 10, 20, "stream 9", "kernel")
    assert share(nccl, op("aten::conv2d", 0, 30), op("gemm", 0, 13, "stream 7", "kernel")) == (10, 7)
    assert share(nccl, op("Memcpy DtoD", 12, 14, "stream 7", "gpu_memcpy")) == (10, 8)


def test_shares_of_a_step_add_up_and_each_operation_is_counted_once() -> None:
    """Of 100 s: 10 wait for data, 8 in the optimizer with all it calls, 10 of communication of which 6 are exposed."""
    events = [
        op(f"{STEP}7", 0, 100, kind="user_annotation"),
        op(DATA, 0, 10, kind="user_annotation"),
        op("aten::copy_", 1, 9),
        op("aten::conv2d", 10, 44),
        op("aten::mkldnn_convolution", 11, 41),
        op("aten::copy_", 12, 15),
        op("aten::batch_norm", 44, 49),
        op("aten::relu_", 50, 54),
        op("gloo:all_reduce", 50, 60, "gloo", "user_annotation"),
        op("Optimizer.step#SGD.step", 70, 78, kind="user_annotation"),
        op("aten::_foreach_add_", 71, 77),
        op("aten::sum", 80, 81),
    ]
    found = step_costs(events)
    assert found["seconds"] == 100
    assert (found["communication"], found["exposed"]) == (10, 6)
    expected = {"data": 10, "optimizer": 8, "communication": 6, "normalisation": 5, "activation": 4, "convolution": 31}
    expected |= {"copies": 3, "compiled": 0, "other": 1, "outside": 32}
    assert found["shares"] == pytest.approx({name: seconds / 100 for name, seconds in expected.items()})
    operations = found["operations"]
    assert operations["aten::mkldnn_convolution"] == [27, 1]
    assert operations["aten::conv2d"] == [4, 1]
    assert operations["gloo:all_reduce"] == [10, 1]
    assert "aten::_foreach_add_" not in operations, "it is the optimizer's"


def test_an_optimizer_that_runs_forward_and_backward_is_charged_for_its_update_alone() -> None:
    """As under Lightning's Trainer. On a GPU, backward has a thread of its own."""
    inside = [
        op("aten::conv2d", 12, 20),
        op("autograd::engine::evaluate_function: ConvolutionBackward0", 20, 40),
        op("aten::convolution_backward", 22, 38),
        op("aten::_foreach_add_", 60, 69),
    ]
    step = [
        op(f"{STEP}7", 0, 100, kind="user_annotation"),
        op("Optimizer.step#SGD.step", 10, 70, kind="user_annotation"),
    ]
    shares = step_costs([*step, *inside])["shares"]
    assert {name: round(100 * found) for name, found in shares.items() if found} == {
        "convolution": 24,
        "optimizer": 9,
        "outside": 67,
    }
    kernels = [Event("kernel", "kernel", at, at + 2, "stream 7", at) for at in (12, 22, 60)]
    launches = [Event(each.name, each.kind, each.start, each.end, "main", int(each.start)) for each in inside]
    launches[2] = Event("aten::convolution_backward", "cpu_op", 22, 38, "another", 22)
    shares = step_costs([*step, *launches, *kernels])["shares"]
    assert {name: round(100 * found) for name, found in shares.items() if found} == {
        "convolution": 4,
        "optimizer": 2,
        "outside": 94,
    }


def test_a_kernel_belongs_where_it_was_launched() -> None:
    def kernel(name: str, start: float, link: int) -> Event:
        return Event(name, "kernel", start, start + 2, "stream 7", link)

    events = [
        op(f"{STEP}7", 0, 100, kind="user_annotation"),
        Event("aten::cudnn_convolution", "cpu_op", 1, 2, "main", 1),
        Event("Optimizer.step#SGD.step", "user_annotation", 5, 9, "main", 2),
        Event("aten::_foreach_add_", "cpu_op", 6, 8, "main", 3),
        Event("aten::something", "cpu_op", 10, 11, "main", 4),
        kernel("sm90_xmma_gemm", 20, 1),
        kernel("vectorized_elementwise_kernel", 30, 3),
        kernel("triton_poi_fused__native_batch_norm_legit_functional_relu_3", 40, 4),
        kernel("unheard_of", 50, 5),
    ]
    shares = step_costs(events)["shares"]
    assert {name for name, found in shares.items() if found == pytest.approx(0.02)} == {
        "convolution",
        "optimizer",
        "normalisation",
        "other",
    }


def test_a_gpu_s_trace_is_read_as_it_is_written(tmp_path: Path) -> None:
    """Microseconds; a kernel has its operation's number; an annotation stands on the GPU's line once more."""
    events = [
        ("user_annotation", f"{STEP}7", 0, 100, "main", 1),
        ("cpu_op", "aten::cudnn_convolution", 5, 10, "main", 2),
        ("cuda_runtime", "cudaLaunchKernel", 7, 2, "main", 2),
        ("gpu_user_annotation", f"{STEP}7", 20, 300, "7", 1),
        ("kernel", "sm90_xmma_gemm", 20, 30, "7", 2),
        ("kernel", "ncclDevKernel_AllReduce_Sum_f32_RING_LL", 40, 20, "20", 3),
        ("gpu_memset", "Memset (Device)", 70, 5, "7", 4),
        ("Trace", "PyTorch Profiler (0)", 0, 900, "main", 5),
    ]
    names, numbered = ("cat", "name", "ts", "dur", "tid"), {"ph": "X", "pid": 1}
    rows = [dict(zip(names, each, strict=False)) | numbered | {"args": {"External id": each[5]}} for each in events]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": [*rows, {"ph": "s", "name": "ac2g", "ts": 7, "pid": 1, "tid": "main"}]}))
    found = step_costs(read_trace(path))
    assert found["seconds"] == pytest.approx(100e-6)
    assert (found["communication"], found["exposed"]) == pytest.approx((20e-6, 10e-6))
    assert found["shares"]["convolution"] == pytest.approx(0.3)
    assert found["shares"]["copies"] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("aten::convolution_backward", "convolution"),
        ("autograd::engine::evaluate_function: ConvolutionBackward0", "convolution"),
        ("aten::native_group_norm", "normalisation"),
        ("aten::cudnn_batch_norm_backward", "normalisation"),
        ("aten::linalg_vector_norm", "other"),
        ("aten::normal_", "other"),
        ("aten::clamp_min_", "activation"),
        ("aten::_to_copy", "copies"),
        ("aten::to", "copies"),
        ("aten::topk", "other"),
        ("c10d::allreduce_", "communication"),
        ("## Call CompiledFxGraph fyhgwmu6 ##", "compiled"),
        ("triton_poi_fused_native_batch_norm_backward_3", "normalisation"),
        ("Optimizer.zero_grad#AdamW.zero_grad", "optimizer"),
    ],
)
def test_names_tell_what_an_operation_is_for(name: str, expected: str) -> None:
    assert class_of(name) == expected


def test_of_each_operation_the_worst_rank_is_shown() -> None:
    ranks = [{"seconds": 1.0, "operations": {"a": [0.2, 3.0], "b": [0.5, 1.0]}}]
    ranks += [{"seconds": 1.0, "operations": {"a": [0.7, 3.0], "c": [0.1, 1.0]}}]
    assert [(row["name"], row["seconds"], row["rank"]) for row in most_expensive(ranks)] == [
        ("a", 0.7, 1),
        ("b", 0.5, 0),
        ("c", 0.1, 1),
    ]


# Real ranks -------------------------------------------------------------------------------------------------------


def late(world: World, folder: str, hidden: bool) -> dict[str, Any]:
    """A step in which rank 1 comes a second late to an all_reduce, and rank 0 waits, or computes."""
    begun = Path(folder) / "begun"
    profiler = Profiler(world.device, 1, 1, Path(folder) / f"{world.rank}.json")
    tensor, square = torch.ones(1000), torch.ones(200, 200)
    dist.all_reduce(tensor)  # the first one connects
    profiler.before_step(1)
    if world.rank:
        wait_until(begun.exists)
        time.sleep(1)
    work = dist.all_reduce(tensor, async_op=True)
    assert work is not None
    if world.rank == 0:
        begun.touch()
    while hidden and world.rank == 0 and not work.is_completed():
        square @ square
    work.wait()
    assert profiler.after_step(1)
    return profiler.report()


@pytest.mark.parametrize("hidden", [False, True])
def test_a_rank_that_waits_is_exposed_and_one_that_computes_meanwhile_is_not(hidden: bool, tmp_path: Path) -> None:
    first, second = run_ranks(late, 2, str(tmp_path), hidden)
    assert first["communication"] > 1
    assert (first["exposed"] < 0.5 * first["communication"]) == hidden, first
    # Both end together, however late: rank 0 began a second earlier.
    assert second["communication"] < first["communication"] - 0.25, "who comes late does not wait"
    assert second["shares"]["outside"] > 0.5, "it sleeps"
    assert {"gloo:all_reduce"} <= first["operations"].keys()


SENT = {
    "ddp": {"gloo:all_reduce", "gloo:broadcast"},
    "sync_batchnorm": {"gloo:all_gather", "gloo:all_reduce"},
    "fsdp": {"gloo:all_gather", "gloo:all_reduce"},  # which gloo reduces and scatters by
    "deepspeed_zero": {"gloo:all_reduce"},
    "lightning_trainer": {"gloo:all_reduce"},
    "pipeline_parallel": {"gloo:send", "gloo:recv"},
    "local_sgd": {"gloo:all_reduce"},
}
OWN = {"pipeline_parallel": ("stages=2", "micro_batches=2", "model.norm=group"), "local_sgd": ("period=2",)}
STEPS = {"local_sgd": 6}  # the first, two that are recorded, two whose bytes are counted, and one that is timed


@pytest.mark.slow_except("ddp", "deepspeed_zero")
@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", SENT)
def test_every_engine_s_messages_are_seen(name: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = (*TINY, *OWN.get(name, ()), f"max_steps={STEPS.get(name, 5)}", "profile=2")
    execute(import_module(f"recipes.{name}").train, out, 2, *words)
    found, told = result(out), json.loads((out / "profile.json").read_text())
    names = {row["name"] for row in told["operations"]}
    assert all(any(each.startswith(sent) for each in names) for sent in SENT[name]), names
    assert found["profiled_steps"] == told["steps"] == 2
    assert min(found["sent_bytes_by_rank"]) > 0
    if name == "ddp":  # gradients, and rank 0's buffers: mean and variance of each BatchNorm in fp32, a count in int64
        buffers = sum(each.nbytes for each in narrow_resnet18(10, torch.nn.BatchNorm2d).buffers())
        assert found["sent_bytes_by_rank"] == [4 * found["parameters"] + buffers] * 2
    if name == "local_sgd":
        assert found["sent_bytes_by_rank"] == [4 * found["parameters"] / 2] * 2, "the weights in one step of two"
    talk = found["communication_seconds_by_rank"], found["exposed_communication_seconds_by_rank"]
    assert all(0 <= alone <= whole > 0 for whole, alone in zip(*talk, strict=True))
    assert all(sum(each["shares"].values()) == pytest.approx(1) for each in told["ranks"])
    assert all(each["shares"]["convolution"] > 0 for each in told["ranks"])
    assert all(each["shares"]["optimizer"] > 0 for each in told["ranks"])
    assert all(each["shares"]["data"] > 0 for each in told["ranks"])
    for rank in range(2):
        events = read_trace(out / "ranks" / f"{rank}.trace.json")
        assert {event.name for event in events if event.name.startswith(STEP)} == {f"{STEP}2", f"{STEP}3"}
    said = (out / "ranks" / "0.log").read_text()
    assert "ms of communication a step on rank" in said


def recorded_steps(run: Run) -> list[bool]:
    """Four steps, of which the recorded ones are slow; of each whether it was recorded, and what is left of them."""
    found: list[bool] = []
    timing.Stopwatch._now = lambda self: float(sum(found))  # type: ignore[method-assign]  # by which others take no time
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 10))
    for batch in run.steps(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)):
        found.append(run.loop.callbacks.distorts_time)
        run.record(loss=model(batch.inputs).sum())
        time.sleep(0.3 if run.loop.callbacks.distorts_time else 0)
    (step_time,) = (each for each in run.loop.callbacks.callbacks if isinstance(each, StepTimeMonitor))
    return [
        *found,
        run.loop.timer.count == 4 - sum(found),
        run.loop.timer.total() > 0,
        step_time.seconds_left_out > 0.3,
    ]


def test_recorded_steps_do_not_count_for_the_speed_and_none_is_recorded_unasked(tmp_path: Path) -> None:
    recorded = in_run(recorded_steps, tmp_path / "1", *TINY, "max_steps=4", "profile=1")
    assert recorded == [False, True, False, False, True, False, True]
    assert in_run(recorded_steps, tmp_path / "2", *TINY, "max_steps=4") == [False] * 4 + [True, False, False]


def test_a_run_that_is_cut_short_says_so_instead(tmp_path: Path) -> None:
    """What is left of a run that goes on may be too short to be recorded."""
    from recipes import single

    for steps in (4, 6):
        execute(single.train, tmp_path / "run", 1, *TINY, f"max_steps={steps}", "profile=2", "checkpoint.every=4")
    said = (tmp_path / "run" / "ranks" / "0.log").read_text()
    assert "profile=2: left out, for only 2 steps are left to take" in said
    assert "\nprofile   " in said
    assert "of communication" not in said, "one rank has nobody to talk to"
    assert "profiled_steps" not in result(tmp_path / "run")
