"""How busy and how full rank 0's device is, for the progress display and metrics.jsonl."""

from __future__ import annotations

import time

import torch

from lockstep.callbacks.base import Callback, CallbackContext, LogRecord
from lockstep.memory.usage import process_bytes
from lockstep.utils.text import mebibytes

MOMENT = 1.0  # seconds for which what a CPU is said to do stays said; to find it out takes as long as a small step


class DeviceStats(Callback):
    """How busy a rank's device is and how full, since it was last asked; a line for people, and figures on a GPU.

    A GPU's figures are NVML's, other processes' work among them: the share of the last moment in which it computed. A
    CPU's are this process's own: how many cores it kept busy. They are read anew after a second at the earliest.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = (time.perf_counter(), time.process_time())
        self._words = ""

    def on_log(self, context: CallbackContext, record: LogRecord) -> None:
        record.usage, figures = self.read()
        record.scalars |= figures

    def read(self) -> tuple[str, dict[str, float]]:
        """(words for the progress line, figures for metrics.jsonl)."""
        if self._device.type == "cuda":
            return self._read_gpu()
        now = (time.perf_counter(), time.process_time())
        seconds, busy = (after - before for after, before in zip(now, self._before, strict=True))
        if not self._words or seconds > MOMENT:
            self._before = now
            self._words = f"{busy / max(seconds, 1e-9):.1f} cores busy, {mebibytes(process_bytes('VmRSS'), 0)} MiB"
        return self._words, {}

    def _read_gpu(self) -> tuple[str, dict[str, float]]:
        free, total = torch.cuda.mem_get_info(self._device)
        figures: dict[str, float] = {"gpu_memory_bytes": total - free, "gpu_memory_share": round(1 - free / total, 3)}
        words = f"{mebibytes(total - free, 0)} of {mebibytes(total, 0)} MiB"
        try:
            figures["gpu_busy"] = torch.cuda.utilization(self._device) / 100  # by nvidia-ml-py
        except Exception:  # it is missing, or has no figure for this device, such as a slice of one (MIG)
            return words, figures
        return f"GPU {figures['gpu_busy']:.0%} busy, {words}", figures
