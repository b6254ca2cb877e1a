"""What a trial of a search has written: its record, and its metrics.

Standard library only: the workers of a Ray cluster import it, as they do recipe_process.py.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from lockstep.utils.files import write_json


class TrialRecord:
    """`trials/N.json`: what a trial runs with, and what has become of it: running, finished, stopped or failed.

    Args:
        folder: where it is.
        number: the trial's.
        words: the overrides of its command.
        values: those of them that were drawn.
    """

    def __init__(self, folder: Path, number: int, words: list[str], values: dict[str, Any]) -> None:
        self.path, self.out = folder / f"{number}.json", folder / str(number)
        self.content = {"number": number, "words": words, "values": values, "state": "running", "problem": ""}
        self.before = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}

    def has_ended(self) -> bool:
        """Whether this very trial has come to its end before."""
        if self.before.get("words") != self.content["words"] or self.before["state"] not in ("finished", "failed"):
            return False
        self.content = self.before
        return True

    def start(self) -> Path:
        """Begin it, or resume it; return its run directory.

        The search may have been killed before it had noted this trial. If it then draws another one for the same
        number, the first one's files are renamed.
        """
        if self.before and self.before["words"] != self.content["words"] and self.out.exists():
            self.out.rename(self.out.with_name(f"{self.out.name}.{os.getpid()}.aside"))
        self.change(state="running")
        return self.out

    def change(self, **values: str) -> None:
        """Note something, in one piece."""
        self.content |= values
        self.path.parent.mkdir(exist_ok=True)
        write_json(self.path, self.content)


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics.jsonl; none where it has not begun."""
    with contextlib.suppress(OSError, ValueError):
        return [
            json.loads(line)
            for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines(True)
            if line[-1] == "\n"
        ]
    return []


def evaluation_lines(lines: list[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Those lines that say how good the model is, numbered from 1 as `evaluations`."""
    return [line | {"evaluations": number} for number, line in enumerate((x for x in lines if metric in x), start=1)]
