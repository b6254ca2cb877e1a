"""What ResNet-50 makes of one GPU: through the recipes, in a bare loop, and as far as the device's own rates allow.

    python -m benchmarks.gpu                                      inside 8 minutes, on one GPU
    python -m benchmarks.gpu --seconds 200                        drops the least important measurements
    python -m benchmarks.gpu --only rates,bare                    those whose names contain one of these
    python -m benchmarks.gpu --device cpu --quick                 a tiny model: whether the benchmark works

Each measurement is a process of its own with a time limit, the most important ones first; what does not fit into the
rest of the time is left out, and named. `gpu.json`, in $OUT or here, is written anew after each of them.

- rates: what the device copies a second, bytes read and bytes written, and multiplies (8192 × 8192 matrices in bf16).
- work: of one training step an image's floating-point operations, as torch.utils.flop_counter has them, and its bytes.
  Of the bytes this is an estimate: every operation of the step, on meta tensors in bf16, reads its inputs and writes
  its outputs once, and views cost nothing; the update reads weights, gradients and momentum in fp32 and writes two of
  them. `roofline` is the time in which the device could do that at its measured rates, operation by operation the
  longer of the two, so a compiler that fuses can exceed it. `fused` counts convolutions, matrix products and the update
  alone, as if all between them were free: no training gets there.
- recipe: `recipes.single` and `recipes.ddp nproc=1` (NCCL), images through the loader; their median step.
- bare: a loop written here, with the same flags, on images that lie on the device or come from the host's memory; with
  and without torch.compile, channels_last, a fused optimizer; `timm` is timm's own model in it, where it is installed.

`compile` is what the first step took beyond a usual one; a second process finds much of it in the compiler's cache.
It needs what lockstep needs, Hydra included.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
SAID = "MEASURED "  # what a measurement's last line begins with
TUNED = {"precision": "bf16", "compile": True, "channels_last": True}


@dataclass
class Measurement:
    """One process: what it measures, with what, and how many seconds it may take."""

    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    expected: float = 60.0
    limit: float = 200.0


def plan(quick: bool) -> list[Measurement]:
    """All measurements, the most important ones first."""
    if quick:
        size = {
            "model": "resnet18",
            "image_size": 72,
            "steps": 3,
            "batch": 2,
        }  # above 64: the recipes' stem is the same
        eager = size | {"precision": "fp32", "compile": False, "channels_last": False}
        return [
            Measurement("rates", "rates", {"quick": True}, 10),
            Measurement("work", "work", size, 10),
            Measurement("bare 2", "bare", eager, 10),
            Measurement("recipe single 2", "recipe", eager | {"recipe": "single"}, 20),
        ]
    base = {"model": "resnet50", "image_size": 224, "steps": 40} | TUNED
    at = [base | {"batch": batch} for batch in (256, 512, 64, 1024)]
    first, rest = at[0], at[1:]
    eager = first | {"compile": False}
    found = [
        Measurement("rates", "rates", {}, 20),
        Measurement("work", "work", base, 15),
        Measurement("bare 256", "bare", first, 70),
        Measurement("recipe single 256", "recipe", first | {"recipe": "single", "profile": 5}, 90),
        Measurement("bare 256, from the host", "bare", first | {"host": True}, 40),
        Measurement("bare 256, eager", "bare", eager, 20),
        Measurement("bare 256, eager, NCHW", "bare", eager | {"channels_last": False}, 20),
        Measurement("recipe ddp 256", "recipe", first | {"recipe": "ddp"}, 70),
        Measurement("bare 256, fused optimizer", "bare", first | {"fused": True}, 40),
        Measurement("timm 256", "bare", first | {"timm": True}, 60),
    ]
    for each in rest:
        found.append(Measurement(f"recipe single {each['batch']}", "recipe", each | {"recipe": "single"}, 80))
        found.append(Measurement(f"bare {each['batch']}", "bare", each, 50))
    found.append(Measurement("recipe single 256, eager", "recipe", eager | {"recipe": "single"}, 40))
    found.append(Measurement("bare 256, eager, fp32", "bare", eager | {"precision": "fp32"}, 25))
    return found


# What is measured, each in a process of its own ---------------------------------------------------------------------


def seconds_of(work: Callable[[], Any], device: torch.device, rounds: int) -> list[float]:
    """What each call takes on the device, after two that do not count."""
    work(), work()
    if device.type != "cuda":
        found = []
        for _ in range(rounds):
            began = time.perf_counter()
            work()
            found.append(time.perf_counter() - began)
        return found
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize(device)
    return [begun.elapsed_time(ended) / 1000 for begun, ended in pairwise(marks)]


def rates(device: torch.device, options: dict[str, Any]) -> dict[str, Any]:
    """Bytes copied and operations of a matrix product a second."""
    quick = options.get("quick", False)
    source = torch.empty(2**20 if quick else 2**31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = statistics.median(seconds_of(lambda: target.copy_(source), device, 20))
    side = 256 if quick else 8192
    left, right = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    multiplied = statistics.median(seconds_of(lambda: left @ right, device, 20))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "device": name,
        "torch": torch.__version__,
        "bytes_per_second": 2 * source.nbytes / copied,
        "flops_per_second": 2 * side**3 / multiplied,
    }


class Counter(TorchDispatchMode):
    """Of every operation that runs within it: (name, floating-point operations, bytes read and written)."""

    def __init__(self) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry

        self.found: list[tuple[str, int, int]] = []
        self._flops = flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            flops = self._flops.get(func.overloadpacket)
            tensors = [each for each in tree_leaves((args, kwargs, out)) if isinstance(each, Tensor)]
            size = sum(each.numel() * each.element_size() for each in tensors)
            self.found.append((str(func), int(flops(*args, **(kwargs or {}), out_val=out)) if flops else 0, size))
        return out


def work(device: torch.device, options: dict[str, Any]) -> dict[str, Any]:
    """Operations of one training step: [[name, flops, bytes] an image], and the update's bytes in all."""
    batch, side = 8, options["image_size"]
    with torch.device("meta"):
        model = make_model(options).to(torch.bfloat16)
        images, labels = torch.empty(batch, 3, side, side, dtype=torch.bfloat16), torch.empty(batch, dtype=torch.int64)
    with Counter() as counter:
        cross_entropy(model(images).float(), labels).backward()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "operations": [[name, flops / batch, size / batch] for name, flops, size in counter.found],
        "flops": sum(flops for _, flops, _ in counter.found) / batch,
        "bytes": sum(size for _, _, size in counter.found) / batch,
        "update_bytes": 5 * 4 * parameters,  # reads weight, gradient and momentum, writes weight and momentum
    }


def make_model(options: dict[str, Any]) -> nn.Module:
    if options.get("timm"):
        import timm

        return timm.create_model(options["model"], num_classes=1000)  # type: ignore[no-any-return]
    import torchvision.models

    return torchvision.models.get_model(options["model"], num_classes=1000)


def bare(device: torch.device, options: dict[str, Any]) -> dict[str, Any]:
    """A training loop as one writes it by hand, with the flags that the recipes have."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    batch, side, nhwc = options["batch"], options["image_size"], options["channels_last"]
    layout = torch.channels_last if nhwc else torch.contiguous_format
    model = make_model(options).to(device, memory_format=layout)
    if options["compile"]:
        model.compile()
    fused = {"fused": True} if options.get("fused") else {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4, **fused)
    host = torch.randint(0, 256, (2 * batch, 3, side, side), dtype=torch.uint8)
    labels = torch.randint(0, 1000, (batch,), device=device)
    there = normalised(host[:batch], device, layout)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=options["precision"] == "bf16")

    def step() -> None:
        images = there
        if options.get("host"):
            chosen = host[torch.randperm(2 * batch)[:batch]]
            images = normalised(chosen.pin_memory() if device.type == "cuda" else chosen, device, layout)
        with autocast:
            loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    first = time.perf_counter() - began
    taken = seconds_of(step, device, options["steps"])
    median = statistics.median(taken)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    found = {"images_per_second": batch / median, "step_seconds": median, "peak_memory_bytes": peak}
    return found | ({"compile_seconds": first - median} if options["compile"] else {})


def normalised(images: Tensor, device: torch.device, layout: torch.memory_format) -> Tensor:
    """Bytes to floats from −1 to 1, on the device."""
    return images.to(device, non_blocking=True).float().div_(127.5).sub_(1).contiguous(memory_format=layout)


def through_recipe(device: torch.device, options: dict[str, Any]) -> dict[str, Any]:
    """What a recipe's result.json and profile.json say of a run."""
    batch, steps, profile = options["batch"], options["steps"], options.get("profile", 0)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        words = [
            f"model={options['model']}",
            f"device={device.type}",
            f"out={out}",
            f"global_batch_size={batch}",
            "nproc=1",
        ]
        words += ["data=synthetic", f"data.image_size={options['image_size']}", f"data.size={4 * batch}"]
        words += ["data.augment=false", "data.num_classes=1000", f"precision={options['precision']}"]
        words += [f"{name}={str(options[name]).lower()}" for name in ("compile", "channels_last")]
        words += [f"max_steps={steps + profile + 6}", "epochs=10000", "eval_every=0", "checkpoint.minutes=0"]
        words += [f"profile={profile}", "log_every=1000", f"eval_batch_size={batch}"]  # all shapes alike
        command = [sys.executable, "-m", f"recipes.{options['recipe']}", *words]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | paths(), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip()[-2000:])
        result = json.loads((out / "result.json").read_text())
        found = {name: result[name] for name in ("images_per_second", "peak_memory_bytes", "wall_seconds")}
        found |= {name: value[0] for name, value in result.items() if name.endswith(("share_by_rank", "busy_by_rank"))}
        if profile:
            told = json.loads((out / "profile.json").read_text())
            found["profile"] = {"shares": told["ranks"][0]["shares"], "operations": told["operations"][:20]}
        return found | {"step_seconds": result["step_seconds_p50"]}


KINDS: dict[str, Callable[[torch.device, dict[str, Any]], dict[str, Any]]] = {
    "rates": rates,
    "work": work,
    "bare": bare,
    "recipe": through_recipe,
}


# The whole ----------------------------------------------------------------------------------------------------------


def paths() -> dict[str, str]:
    """Where a process finds this repository, installed or not."""
    known = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, known))}


def take(each: Measurement, device: str, seconds: float) -> dict[str, Any]:
    """One measurement in a process of its own: its figures, or `failed` with a reason."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", device, "--measure", each.kind]
    command += ["--options", json.dumps(each.options)]
    # A session of its own: at the limit all that it has started is ended with it.
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | paths(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {seconds:.0f} s"}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    said = [line for line in out.splitlines() if line.startswith(SAID)]
    if process.returncode or not said:
        return {"failed": (err.strip().splitlines() or ["it said nothing"])[-1][:500]}
    return dict(json.loads(said[-1].removeprefix(SAID)))


def limits(found: dict[str, dict[str, Any]], batch: int) -> tuple[float, float] | None:
    """(roofline, fused) in images/s at a batch; None where rates or work are not known."""
    device, step = found.get("rates", {}), found.get("work", {})
    if "bytes_per_second" not in device or "operations" not in step:
        return None
    costs = [
        (name, max(flops / device["flops_per_second"], size / device["bytes_per_second"]), flops)
        for name, flops, size in step["operations"]
    ]
    update = step["update_bytes"] / batch / device["bytes_per_second"]
    least = sum(cost for _, cost, flops in costs if flops)
    return 1 / (sum(cost for _, cost, _ in costs) + update), 1 / (least + update)


def derive(found: dict[str, dict[str, Any]], measurements: list[Measurement]) -> None:
    """Add to each speed what share of the limits it reaches, and to a recipe's its ratio to the bare loop's."""
    for each in measurements:
        here = found.get(each.name, {})
        if not here.get("images_per_second"):
            continue
        speed, batch = here["images_per_second"], each.options["batch"]
        if most := limits(found, batch):
            here["of_roofline"], here["of_fused"] = speed / most[0], speed / most[1]
            here["of_matmul_rate"] = speed * found["work"]["flops"] / found["rates"]["flops_per_second"]
        plain = {name: value for name, value in each.options.items() if name not in ("recipe", "profile")}
        for other in measurements:
            theirs = found.get(other.name, {}).get("images_per_second")
            if each.kind == "recipe" and other.kind == "bare" and theirs:
                if other.options == plain:
                    here["of_bare"] = speed / theirs
                elif other.options == plain | {"host": True}:
                    here["of_bare_from_the_host"] = speed / theirs


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "images/s": lambda row: f"{row['images_per_second']:,.0f}",
    "ms per step": lambda row: f"{1000 * row['step_seconds']:.1f}",
    "of roofline": lambda row: f"{row['of_roofline']:.0%}",
    "of fused": lambda row: f"{row['of_fused']:.0%}",
    "of matmul": lambda row: f"{row['of_matmul_rate']:.0%}",
    "of bare": lambda row: f"{row['of_bare']:.3f}",
    "of bare from host": lambda row: f"{row['of_bare_from_the_host']:.3f}",
    "compile s": lambda row: f"{row['compile_seconds']:.0f}",
    "peak MiB": lambda row: f"{row['peak_memory_bytes'] / 2**20:,.0f}",
    "data wait": lambda row: f"{row['data_wait_share_by_rank']:.0%}",
}


def table(found: dict[str, dict[str, Any]]) -> Table:
    """All speeds, and what was not measured."""
    grid = Table(title="one device", title_justify="left")
    for column in ("measurement", *COLUMNS):
        grid.add_column(column)
    for name, row in found.items():
        if "images_per_second" in row:
            cells = []
            for cell in COLUMNS.values():
                try:
                    cells.append(cell(row))
                except (KeyError, TypeError):
                    cells.append("")
            grid.add_row(name, *cells)
        elif "failed" in row:
            grid.add_row(name, row["failed"])
    return grid


def profile_table(profile: dict[str, Any]) -> Table:
    """What a step of the recipe was spent on."""
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in profile["shares"].items() if share >= 0.005)
    grid = Table(title=f"a step: {shares}", title_justify="left")
    for column in ("operation or kernel", "class", "ms per step", "share", "calls"):
        grid.add_column(column, overflow="fold")
    for row in profile["operations"]:
        figures = f"{1000 * row['seconds']:.2f}", f"{row['share']:.1%}", f"{row['calls']:.0f}"
        grid.add_row(row["name"][:80], row["class"], *figures)
    return grid


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float, default=460.0)
    parser.add_argument("--only", default="")
    parser.add_argument("--measure", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--options", type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args(words)
    if asked.measure:
        told = KINDS[asked.measure](torch.device(asked.device), asked.options)
        print(f"{SAID}{json.dumps(told)}")
        return
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is none here; --device cpu --quick tries the benchmark itself")
    began, out = time.monotonic(), Path(os.environ.get("OUT", ".")) / "gpu.json"
    chosen = [each for each in plan(asked.quick) if any(word in each.name for word in asked.only.split(","))]
    found: dict[str, dict[str, Any]] = {}
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    for each in chosen:
        left = asked.seconds - (time.monotonic() - began)
        if each.options.get("timm") and importlib.util.find_spec("timm") is None:
            found[each.name] = {"failed": "left out: timm is not installed"}
        elif left < each.expected:
            found[each.name] = {"failed": f"left out: {left:.0f} s are left, and it takes about {each.expected:.0f}"}
        else:
            started = time.monotonic()
            found[each.name] = take(each, asked.device, min(each.limit, left))
            found[each.name]["seconds"] = round(time.monotonic() - started, 1)
        derive(found, chosen)
        out.write_text(json.dumps(found, indent=2) + "\n")
        brief = {name: value for name, value in found[each.name].items() if name not in ("operations", "profile")}
        console.print(f"{each.name}: {json.dumps(brief)}", markup=False, soft_wrap=True)
    console.print(table(found))
    for row in found.values():
        if "profile" in row:
            console.print(profile_table(row["profile"]))
    console.print(f"written: {out}", markup=False)


if __name__ == "__main__":
    main(sys.argv[1:])
