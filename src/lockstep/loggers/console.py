"""What a person sees of a run, and of each rank's log: rank 0 speaks on the console, every rank into its log."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lockstep.config.keys import walk
from lockstep.config.own_files import open_own
from lockstep.config.schema import Config
from lockstep.config.tasks import IMAGES, short_name
from lockstep.distributed.host_logs import kept_on_hosts, own_log
from lockstep.distributed.process_group import World
from lockstep.task import option
from lockstep.training.evaluate import Evaluation
from lockstep.utils.places import as_installed
from lockstep.utils.text import by_rank, count, interpreter, short, worded

FILES = ("model.pt", "best.pt", "result.json", "metrics.jsonl", "config.yaml", "shown.txt", "misclassified.png")
PLAIN_LINE_SECONDS = 5.0  # where there is no terminal to draw on, a line of progress at most this often


class ConsoleReport:
    """The start-up summary, the progress display and the final summary of one run."""

    def __init__(self, recipe: str, config: Config, world: World, out: Path, next_command: str, quiet: bool) -> None:
        self.recipe, self.config, self.world, self.out = recipe, config, world, out
        self.next_command = next_command
        self.speaks = world.rank == 0 and not quiet
        log = own_log(out / "ranks", world.rank)
        self.log = open_own(log, "a", buffering=1, encoding="utf-8", errors="backslashreplace")
        # Written to a file or a pipe, a table is not squeezed into the 80 columns of a terminal that is not there.
        self.console = Console(quiet=not self.speaks, highlight=False, width=None if sys.stdout.isatty() else 140)
        self.last_line = time.monotonic()
        self.metric, self.unit = "", "samples"  # the first metric of the last evaluation, in words
        self.notes: list[str] = []
        self.progress: Progress | None = None

    def line(self, text: str) -> None:
        """One line into this rank's log, and from rank 0 onto the console."""
        with contextlib.suppress(OSError):  # a full disk: what matters is in metrics.jsonl, which does complain
            self.log.write(f"{time.strftime('%H:%M:%S')} {text}\n")
        if self.speaks:
            self.console.print(text, soft_wrap=True, markup=False)

    def start(
        self,
        *,
        parameters: tuple[int, int],
        task: Any,
        samples: tuple[int, int],
        shards: int,
        steps: tuple[int, int],
        chosen: list[str],
        first: int = 0,
    ) -> None:
        """Say what is about to be trained, with what and where, what was chosen by itself, and from which step on."""
        self.first_step = first
        config, world = self.config, self.world
        hosts = len(set(world.hosts))
        frozen = f", {parameters[0] - parameters[1]:,} of them frozen" if parameters[0] != parameters[1] else ""
        self.line(
            f"{self.recipe}: {count(world.world_size, 'rank')} on {count(hosts, 'host')} · {world.device.type} · "
            f"{world.backend} · {config.precision} · {count(world.threads, 'thread')} per rank ({world.threads_by})"
        )
        self.unit = unit = option(task, "unit")
        model, data = described(task, config)
        self.line(f"  model  {model}, {parameters[0]:,} parameters{frozen}")
        evaluated = f"{samples[1]:,} to evaluate" if samples[1] else "nothing to evaluate on"
        self.line(f"  data   {data}, {samples[0]:,} {unit} to train on, {evaluated}")
        self.line(
            f"  batch  {config.global_batch_size} = {count(shards, 'share')} × {config.global_batch_size // shards}; "
            f"{count(steps[0], 'step')} per epoch, {steps[1]:,} in all"
        )
        for number, choice in enumerate(chosen):
            self.line(f"  {'' if number else 'chosen':6} {choice}")
        if config.precision == "fp16" and world.device.type == "cpu":
            self.line("  fp16   CPUs are slow at it, up to 80 × slower than at bf16: set precision=bf16, or use a GPU")
        self.line(f"  run    {short(self.out)}")
        if on_hosts := len(kept_on_hosts(config.logs, world.hosts)):
            keep = "rank keeps its log on its host unless it fails"
            if on_hosts > 1:
                keep = "ranks keep their logs on their hosts unless they fail"
            self.line(f"  logs   {on_hosts} {keep} (logs=all: in ranks/)")
        self.total_steps, self.steps_per_epoch, self.eval_samples = steps[1], steps[0], samples[1]
        if self.speaks and self.console.is_terminal:
            self.progress = Progress(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f} steps  {task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self.progress.start()
            self.task = self.progress.add_task("", total=self.total_steps, epoch=1, numbers="")

    def step(self, step: int, loss: float, samples_per_second: float, usage: str) -> None:
        """Show a logged step, and how busy rank 0's device is."""
        numbers = f"loss {loss:.4f}  {self.metric}{samples_per_second:,.0f} {self.unit}/s  {usage}"
        epoch = (step - 1) // self.steps_per_epoch + 1
        if self.progress:
            self.progress.update(self.task, completed=step, epoch=epoch, numbers=numbers)
        elif time.monotonic() - self.last_line > PLAIN_LINE_SECONDS:
            self.last_line = time.monotonic()
            self.line(f"step {step}/{self.total_steps}  epoch {epoch}  {numbers}")

    def evaluation(self, step: int, result: Evaluation) -> None:
        """Show an evaluation: a line each, because these are what a person scrolls back to."""
        shown = [worded(name, value) for name, value in result.metrics.items()]
        self.metric = f"{shown[0]}  " if shown else ""
        self.last_line = time.monotonic()
        self.line(
            f"step {step}/{self.total_steps}  epoch {step / self.steps_per_epoch:.4g}  "
            + "  ".join([f"eval loss {result.loss:.4f}", *shown])
        )

    def finish(self, result: dict[str, Any]) -> None:
        """Show the run in numbers and what to try next."""
        if self.progress:
            self.progress.stop()
        memory = by_rank(result["peak_memory_bytes_by_rank"])
        state = f"{by_rank(result['state_bytes_by_rank'])} MiB of weights, gradients and optimizer, by rank"
        if result["state_bytes_unsharded"] > 1.01 * max(result["state_bytes_by_rank"]):
            state += f"; unsharded {by_rank([result['state_bytes_unsharded']])}"
        speed = "no step taken"
        if result["samples_per_second"] is not None:
            milliseconds = [round(1000 * result[f"step_seconds_p{percent}"]) for percent in (50, 95)]
            speed = f"{result['samples_per_second']:,.0f} {self.unit}/s ({milliseconds[0]} ms per step, 95 % within "
            speed += f"{milliseconds[1]} ms)"
            if result.get("tokens_per_second"):
                speed += f"; {result['tokens_per_second']:,.0f} tokens/s"
            if result.get("model_flops_per_second"):
                speed += f", {result['model_flops_per_second'] / 1e9:,.4g} GFLOP/s"
            if result.get("mfu"):
                speed += f", MFU {result['mfu']:.1%}"
        metrics = {name[5:]: value for name, value in result.items() if name.startswith("eval_") and value is not None}
        evaluated = [worded(name, value) for name, value in metrics.items() if name != "loss"]
        evaluated = evaluated or [worded(name, value) for name, value in metrics.items()]
        found = ", ".join(evaluated)
        rows = {
            "result": f"{found}, of {self.eval_samples:,} evaluation {self.unit}" if found else "not evaluated",
            "speed": speed,
            "time": f"{result['wall_seconds']:.1f} s for {count(result['steps'] - self.first_step, 'step')}",
            "memory": f"{memory} MiB at peak, by rank",
            "state": state,
            "written": f"{short(self.out)}/: {', '.join(name for name in FILES if (self.out / name).exists())}, ranks/",
        }
        if result.get("checkpoints_failed"):
            rows["not saved"] = f"{count(result['checkpoints_failed'], 'checkpoint')}, each named in ranks/0.log"
        for note in self.notes:
            name, _, text = note.partition(": ")
            rows[name] = text
        if self.next_command:
            command = suggested_for(self.config.task.name, self.next_command)
            rows["next"] = as_installed(command.replace("python", interpreter(), 1))
        with contextlib.suppress(OSError):
            self.log.write("".join(f"{name:9} {text}\n" for name, text in rows.items()))
        if self.console.is_terminal:
            table = Table.grid(padding=(0, 2))
            for name, text in rows.items():
                table.add_row(Text(name, "bold"), Text(text))  # a path may hold what looks like markup
            self.console.print(Panel(Group(table), title=f"{self.recipe} finished", border_style="green", expand=False))
        else:
            self.console.print(f"{self.recipe} finished", markup=False)
            for name, text in rows.items():
                self.console.print(f"  {name:9} {text}", soft_wrap=True, markup=False)


def described(task: Any, config: Config) -> tuple[str, str]:
    """(the model, the data) of a task in words: its own, else its class and its keys."""
    if hasattr(task, "describe"):
        model, data = task.describe()
        return str(model), str(data)
    own = {name: value for name, value, _ in walk(config.task) if name != "name"}
    keys = ", ".join(f"{name}={value}" for name, value in own.items())
    return short_name(config.task.name) + (f" ({keys})" if keys else ""), type(task.train_set).__name__


def suggested_for(task: str, suggested: str) -> str:
    """A recipe's `next_command` for the task that was trained: as it is written, it trains images or task=language."""
    command, gap, why = suggested.partition("     ")
    if task == IMAGES or f"task={task}" in command or "demonstrate=" in command or "<" in task:
        return suggested
    file, _, name = task.rpartition(":")
    mine = f"{short(Path(file))}:{name}" if file.endswith(".py") else task
    words = [word for word in command.split() if not word.startswith(("task=", "task."))]
    return f"{' '.join(words)} task={shlex.quote(mine)}{gap}{why}"
