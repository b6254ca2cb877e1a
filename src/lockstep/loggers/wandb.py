"""A run of Weights & Biases, offline where there is no account or no server."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lockstep.config.schema import Config
from lockstep.loggers.base import Histogram, Logger, Misclassified, Scalars, visible
from lockstep.utils.files import write_atomically


class WandbLogger(Logger):
    """`wandb/`: a run of Weights & Biases, under an id that is kept, so that a resumed run continues the same curves.

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
        earlier = list(folder.glob(f"offline-run-*-{note.read_text(encoding='utf-8')}"))
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
        options: Any = {
            "project": config.logger.project,
            "id": note.read_text(encoding="utf-8"),
            "name": name,
            "resume": "allow",
        }
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

    def log_histograms(self, step: int, found: dict[str, Histogram]) -> None:
        self._log(step, {}, found)

    def log_misclassified(self, step: int, found: list[Misclassified]) -> None:
        shown = [(visible(each.image).permute(1, 2, 0).numpy(), each.caption) for each in found]
        pictures = [self._wandb.Image(image, caption=caption) for image, caption in shown]
        self._run.log({"misclassified": pictures}, step=step)

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
