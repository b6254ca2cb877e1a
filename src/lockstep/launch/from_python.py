"""A recipe started from Python, in a notebook or a script: `result = train.run(nproc=2, max_steps=20)`.

It is the command, in a process of its own: the caller's process need not be one that ranks can be forked from, and it
is not ended by an exit code. A recipe or a task that is defined in a notebook's cell has no file to be started from;
cloudpickle writes it down with all that it refers to, and a small script stands for its file.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.config.keys import typed
from lockstep.config.schema import LAST
from lockstep.errors import UserError
from lockstep.launch.recipe_process import BECOME_COMMAND, RecipeFailed, command_environment
from lockstep.utils.temporary import own_folder

if TYPE_CHECKING:
    from lockstep.recipe import Recipe

SCRIPT = '''"""Written by lockstep for a recipe or a task of a notebook."""
import dataclasses
import pathlib

import cloudpickle

globals().update(cloudpickle.loads(pathlib.Path(__file__).with_suffix(".pkl").read_bytes()))
if __name__ == "__main__":
    dataclasses.replace(train, target=__file__).main()
elif "train" in globals():
    train = dataclasses.replace(train, target=__file__)
'''


@dataclass(frozen=True)
class RunResult(Mapping[str, Any]):
    """A finished run: a mapping of result.json's fields, such as `result["eval_loss"]`.

    Attributes:
        out: its run directory.
    """

    out: Path
    fields: dict[str, Any] = field(repr=False)

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def __len__(self) -> int:
        return len(self.fields)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, one for each logged step and evaluation."""
        return [json.loads(line) for line in (self.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]

    def weights(self) -> dict[str, Any]:
        """The trained model's state_dict, on the CPU."""
        import torch

        return dict(torch.load(self.out / "model.pt", weights_only=True))


def run_recipe(recipe: Recipe, words: tuple[str, ...], keys: Mapping[str, Any]) -> RunResult:
    """Run a recipe as its command does, show what it says, and return its result.

    Args:
        words: as they would be typed, such as "optim.lr=0.1" or "+cluster=slurm".
        keys: the same by name; `task` may be a class.

    Raises:
        UserError: a mistake in words or keys; nothing was created.
        RecipeFailed: the run failed; the text is what it said last.
    """
    given = {word.lstrip("+").partition("=")[0] for word in words} | keys.keys()
    with own_folder() as folder:
        program, task = _as_program(recipe, keys.get("task"), Path(folder))
        if folder in (*program, task.rpartition("/")[0]) or program[0].startswith(folder):
            refuse_cluster(given)
        typed_words = [*words, *(typed(name, value) for name, value in keys.items() if name != "task")]
        if task:
            typed_words.append(f"task={task}")
        wanted = [word.partition("=")[2] for word in typed_words if word.startswith("out=")]
        if not wanted and f"resume={LAST}" in typed_words:
            raise UserError(f"resume={LAST}: is for the command line; name the run's folder here, as out=FOLDER")
        out = Path(wanted[-1].strip("\"'")).expanduser() if wanted else new_directory(recipe.name)
        if not wanted:
            typed_words.append(typed("out", str(out)))
        code, said = _follow([*program, *typed_words])
    last = [line for line in said if line.strip()]
    if code == UserError.exit_code:
        errors = [line for line in last if line.startswith("error: ")]
        raise UserError((errors or last or [f"exit code {code}"])[-1].removeprefix("error: "))
    if code:
        raise RecipeFailed("\n".join(last[-20:]) or f"exit code {code}")
    return RunResult(out.absolute(), json.loads((out / "result.json").read_text(encoding="utf-8")))


def refuse_cluster(given: set[str]) -> None:
    """A cluster's nodes read a recipe's file; raises UserError."""
    if "cluster" in given:
        raise UserError(
            "+cluster: what is defined in a notebook's cell has no file that a cluster's nodes could read; put it into a "
            "file (%%writefile my_recipe.py) and import it, or leave the cluster out"
        )


def new_directory(name: str) -> Path:
    """outputs/<recipe>/<time>, of a name that is not taken."""
    stamp = Path("outputs", name, time.strftime("%Y-%m-%d_%H-%M-%S"))
    number, found = 1, stamp
    while found.exists():
        number += 1
        found = stamp.with_name(f"{stamp.name}-{number}")
    return found


def _as_program(recipe: Recipe, task: Any, folder: Path) -> tuple[list[str], str]:
    """(what python is told to run, the task's name or nothing)."""
    content: dict[str, Any] = {}
    script = folder / f"{recipe.train.__name__}.py"
    name = task if isinstance(task, str) else ""
    if isinstance(task, type):
        file = getattr(sys.modules.get(task.__module__), "__file__", None)
        name = f"{file}:{task.__qualname__}" if file else f"{script}:{task.__qualname__}"
        if not file:
            content[task.__qualname__] = task
    elif task is not None and not isinstance(task, str):
        raise UserError(f"task={type(task).__name__}(…): name the class, and its fields as task.NAME=VALUE")
    if not recipe.target:
        content["train"] = recipe
    if content:
        import cloudpickle  # type: ignore[import-untyped]

        script.write_text(SCRIPT, encoding="utf-8")
        script.with_suffix(".pkl").write_bytes(cloudpickle.dumps(content))
    if not recipe.target:
        return [str(script)], name
    return [recipe.target] if recipe.target.endswith(".py") else ["-m", recipe.target], name


def _follow(words: list[str]) -> tuple[int, list[str]]:
    """Run `python WORDS` to its end and print what it says; (its exit code, what it said)."""
    command = [sys.executable, "-c", BECOME_COMMAND, str(os.getpid()), sys.executable, *words]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=command_environment(os.environ),
        start_new_session=True,  # a notebook's interrupt is handed on once, below
    )
    said: list[str] = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            said.append(line.rstrip("\n"))
            print(line, end="", flush=True)
        return process.wait(), said
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)  # it saves, and says how to resume
        with contextlib.suppress(KeyboardInterrupt):
            shutil.copyfileobj(process.stdout, sys.stdout)
            process.wait()
        raise
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
