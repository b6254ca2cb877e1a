"""A signal that asked a run to leave, and that no rank came to heed: what is said then of what is saved."""

from __future__ import annotations

import signal
from pathlib import Path

from lockstep.checkpoint.directory import list_checkpoints
from lockstep.config.run_directory import CHECKPOINTS


def unheeded_signal(number: int, seconds: float, out: Path) -> str:
    """What a run says that leaves without saving, because it has stood still for so long since the signal came."""
    saved = list_checkpoints(out / CHECKPOINTS)
    step = int(saved[0].name.rpartition("-")[2]) if saved else 0
    kept = f"saved at step {step}, and not what came after it" if saved else "nothing is saved"
    name = signal.Signals(number).name
    return f"{name} came, and the run has stood still since, for timeout_seconds={seconds:g}: it leaves; {kept}"
