"""Where a run's curves go: one writer a run, on rank 0, and as many kinds of files as `monitor=` names.

`metrics.jsonl`, and `histograms.jsonl` where there are histograms, are always written, a line at a time, and are what a
resumed run goes by: what was logged after the checkpoint it starts from is dropped, for those steps are taken again.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lockstep.files import write_atomically
from lockstep.schema import Config, to_yaml

Scalars = dict[str, float | int]


@dataclass(frozen=True)
class Histogram:
    """How many numbers of a tensor lie in each of equal bins from `low` to `high`; their sum and sum of squares."""

    low: float
    high: float
    counts: list[int]
    total: float
    squares: float

    @property
    def edges(self) -> list[float]:
        """The ends of the bins, one more than there are bins."""
        return torch.linspace(self.low, self.high, len(self.counts) + 1, dtype=torch.float64).tolist()


@dataclass(frozen=True)
class Mistake:
    """An image of the evaluation set that the trained model gets wrong: uint8 [3, H, W]."""

    sample: int
    label: int
    predicted: int
    image: Tensor

    @property
    def caption(self) -> str:
        return f"sample {self.sample}: {self.label}, predicted {self.predicted}"


class Monitor(Protocol):
    """Takes what a run logs, on rank 0."""

    def log(self, scalars: Scalars) -> None:
        """A line of scalars, `step` among them."""

    def histograms(self, step: int, found: dict[str, Histogram]) -> None:
        """Histograms of weights and gradients, by name."""

    def mistakes(self, step: int, found: list[Mistake]) -> None:
        """What the trained model gets wrong, at the end."""

    def flush(self) -> None:
        """Have on disk what was logged: a checkpoint is about to say that it happened."""

    def close(self) -> None: ...


class JsonLines:
    """`metrics.jsonl`: a JSON object a line, readable while the run goes on."""

    def __init__(self, out: Path, step: int) -> None:
        for name in ("metrics.jsonl", "histograms.jsonl"):
            keep_lines(out / name, lambda line: json.loads(line)["step"] <= step)
        self._out = out
        self._file = (out / "metrics.jsonl").open("a", buffering=1)  # by line: a killed run keeps all it logged

    def log(self, scalars: Scalars) -> None:
        self._file.write(json.dumps(scalars) + "\n")

    def histograms(self, step: int, found: dict[str, Histogram]) -> None:
        with (self._out / "histograms.jsonl").open("a") as stream:
            stream.write(json.dumps({"step": step} | {name: asdict(each) for name, each in found.items()}) + "\n")

    def mistakes(self, step: int, found: list[Mistake]) -> None:
        """`misclassified.png`, eight in a row; result.json says which they are."""
        from torchvision.utils import make_grid, save_image  # half a second, which a run without has not to wait for

        grid = make_grid(torch.stack([visible(each.image) for each in found]), nrow=8)
        stream = io.BytesIO()
        save_image(grid.float() / 255, stream, format="png")
        write_atomically(self._out / "misclassified.png", stream.getvalue())

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Csv:
    """`metrics.csv`, for spreadsheets: one column a scalar, empty where a step has none."""

    COLUMNS = (
        *("step", "epoch", "samples_seen", "loss", "lr", "images_per_second", "peak_memory_bytes"),
        *("loss_scale", "skipped_steps", "eval_loss", "eval_accuracy", "eval_f1"),
    )

    def __init__(self, out: Path, step: int, columns: Sequence[str] = ()) -> None:
        path = out / "metrics.csv"
        keep_lines(path, lambda line: line.startswith("step,") or int(line.partition(",")[0]) <= step)
        before = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
        names = list(dict.fromkeys([*self.COLUMNS, *columns, *(before[0] if before else ())]))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, names)
        writer.writeheader()  # with other columns than before, where it now logs other things
        writer.writerows(before)
        write_atomically(path, text.getvalue())
        self._file = path.open("a", buffering=1, newline="")
        self._writer = csv.DictWriter(self._file, names, extrasaction="ignore")

    def log(self, scalars: Scalars) -> None:
        self._writer.writerow(scalars)

    def histograms(self, step: int, found: dict[str, Histogram]) -> None:
        pass

    def mistakes(self, step: int, found: list[Mistake]) -> None:
        pass

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """`tensorboard/`: event files for `tensorboard --logdir`."""

    def __init__(self, out: Path, step: int, config: Config) -> None:
        from torch.utils.tensorboard import SummaryWriter  # only who asks for it imports it

        self._writer: Any = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
        self._writer.add_text("config", "".join(f"    {line}\n" for line in to_yaml(config).splitlines()), step)

    def log(self, scalars: Scalars) -> None:
        for name, value in scalars.items():
            if name != "step":
                self._writer.add_scalar(name, value, scalars["step"])

    def histograms(self, step: int, found: dict[str, Histogram]) -> None:
        for name, each in found.items():
            self._writer.add_histogram_raw(
                name,
                min=each.low,
                max=each.high,
                num=sum(each.counts),
                sum=each.total,
                sum_squares=each.squares,
                bucket_limits=each.edges[1:],
                bucket_counts=each.counts,
                global_step=step,
            )

    def mistakes(self, step: int, found: list[Mistake]) -> None:
        for number, each in enumerate(found):
            self._writer.add_image(f"misclassified/{number}", visible(each.image), step)
            self._writer.add_text(f"misclassified/{number}", each.caption, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """`wandb/`: a run of Weights & Biases, under an id that is kept, so that a resumed run goes on in the same curves.

    Offline, unless credentials are found or WANDB_MODE says otherwise, for a training must not wait for a question or
    for a server: where that does not answer, a line says so and it goes on offline. Each start of an offline run makes
    a folder of its own, and a process that is killed leaves nothing in it, since wandb's service writes late. So each
    start tells the whole story from metrics.jsonl and histograms.jsonl, and the folder from before is removed: what
    there is in the end is one folder with every step once, for `wandb sync`. Online the server ignores steps it has.

    Args:
        out: the run directory.
        lines: what was logged so far, in order of steps.
        say: what prints a line.
        seconds: how long to wait for a server.
    """

    def __init__(
        self,
        out: Path,
        config: Config,
        name: str,
        lines: Iterator[tuple[Scalars, dict[str, Histogram]]],
        say: Callable[[str], None],
        seconds: float,
    ) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb  # a second, which only who asks for it waits

        self._wandb: Any = wandb
        folder, note = out / "wandb", out / "wandb" / "id"
        folder.mkdir(exist_ok=True)
        if not note.exists():
            write_atomically(note, uuid.uuid4().hex[:12])
        earlier = list(folder.glob(f"offline-run-*-{note.read_text()}"))
        # Of the machine and the person nothing but what the config says; the console, git and code stay here.
        quiet: Any = {
            "console": "off",
            "silent": True,
            "disable_git": True,
            "save_code": False,
            "init_timeout": seconds,
        }
        quiet |= {"x_disable_meta": True, "x_disable_stats": True, "x_disable_machine_info": True}
        settings = wandb.Settings(**quiet, x_save_requirements=False)
        options: Any = {"project": config.monitor.project, "id": note.read_text(), "name": name, "resume": "allow"}
        options |= {"dir": str(out), "config": asdict(config), "settings": settings}
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if has_credentials(wandb) else "offline")
        try:
            self._run: Any = wandb.init(mode=mode, **options)
        except wandb.errors.Error as error:
            say(f"wandb: {str(error).splitlines()[0]}; going on offline, to be sent later with wandb sync")
            wandb.teardown()  # its service still has the run
            self._run = wandb.init(mode="offline", **options)
        for scalars, histograms in lines:
            self._log(int(scalars["step"]), scalars, histograms)
        for path in earlier:
            shutil.rmtree(path, ignore_errors=True)

    def log(self, scalars: Scalars) -> None:
        self._log(int(scalars["step"]), scalars, {})

    def histograms(self, step: int, found: dict[str, Histogram]) -> None:
        self._log(step, {}, found)

    def mistakes(self, step: int, found: list[Mistake]) -> None:
        shown = [(visible(each.image).permute(1, 2, 0).numpy(), each.caption) for each in found]
        pictures = [self._wandb.Image(image, caption=caption) for image, caption in shown]
        self._run.log({"misclassified": pictures}, step=step)

    def flush(self) -> None:
        pass  # what is lost of it is told again

    def close(self) -> None:
        self._run.finish()
        self._wandb.teardown()  # its service would outlive the run by a moment

    def _log(self, step: int, scalars: Scalars, histograms: dict[str, Histogram]) -> None:
        drawn = {name: self._wandb.Histogram(np_histogram=(h.counts, h.edges)) for name, h in histograms.items()}
        self._run.log({name: value for name, value in scalars.items() if name != "step"} | drawn, step=step)


def has_credentials(wandb: Any) -> bool:
    """Whether wandb knows a key, from the environment or a file; it is not asked for one."""
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except wandb.errors.Error:
        return False


def visible(image: Tensor) -> Tensor:
    """An image [3, H, W], its pixels made large enough to be seen."""
    times = max(1, 64 // image.shape[-1])
    return image.repeat_interleave(times, 1).repeat_interleave(times, 2)


def keep_lines(path: Path, wanted: Callable[[str], bool]) -> None:
    """Drop what a run logged after the checkpoint from which it now goes on, and a line that it died in."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if line.endswith("\n") and wanted(line):
                kept.append(line)
    write_atomically(path, "".join(kept))


def logged(out: Path) -> Iterator[tuple[Scalars, dict[str, Histogram]]]:
    """All that a run has logged, in order of steps: (scalars, histograms)."""
    found: list[tuple[int, Scalars, dict[str, Histogram]]] = []
    for line in (out / "metrics.jsonl").read_text().splitlines():
        scalars = json.loads(line)
        found.append((scalars["step"], scalars, {}))
    if (out / "histograms.jsonl").exists():
        for line in (out / "histograms.jsonl").read_text().splitlines():
            entry = json.loads(line)
            step = entry.pop("step")
            found.append((step, {"step": step}, {name: Histogram(**each) for name, each in entry.items()}))
    for _, scalars, histograms in sorted(found, key=lambda each: each[0]):
        yield scalars, histograms


def open_monitors(
    out: Path,
    config: Config,
    *,
    name: str,
    step: int = 0,
    columns: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> list[Monitor]:
    """The writers of a run: metrics.jsonl always, and those that `monitor=` names.

    Args:
        name: of the run, for a board that shows several.
        step: steps done; what was logged of later ones is dropped, for they are now taken again.
        columns: scalars that only some runs have.
        say: what prints a line.
    """
    asked = config.monitor
    opened: list[Monitor] = [JsonLines(out, step)]
    if asked.csv:
        opened.append(Csv(out, step, columns))
    if asked.tensorboard:
        opened.append(TensorBoard(out, step, config))
    if asked.wandb:
        opened.append(Wandb(out, config, name, logged(out), say, min(30.0, config.timeout_seconds / 2)))
    return opened
