"""A console that breaks, closes or fills up costs no checkpoint and changes no exit code."""

from __future__ import annotations

import os
import pty
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.harness import clean_environment, result
from tests.helpers.processes import heed_signals, read, wait_until
from tests.helpers.warm_interpreter import ROOT

WORDS = ["data=synthetic", "data.size=96", "data.image_size=8", "global_batch_size=12", "log_every=1"]


def shell(module: str, words: list[str], streams: str, folder: Path) -> tuple[int, str]:
    """(exit code, what is still to be seen) of a command with its streams as a shell redirects them."""
    line = f"set -o pipefail; {shlex.join([sys.executable, '-m', module, *words])} {streams}"
    variables = clean_environment() | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120
    )
    return done.returncode, done.stdout.decode()


@pytest.mark.parametrize(
    ("module", "words", "streams", "code"),
    [
        ("recipes", [], "| (exec <&-; sleep 0.1)", 0),
        ("lockstep", ["recipes"], "2>&1 >/dev/full", 0),
        ("recipes.ddp", ["--help"], "2>&1 | (exec <&-; sleep 0.1)", 0),
        ("recipes.ddp", ["nonsense=1"], ">&- 2>/dev/full", 2),
    ],
)
def test_an_answer_that_nobody_reads(module: str, words: list[str], streams: str, code: int, tmp_path: Path) -> None:
    assert shell(module, words, streams, tmp_path) == (code, "")


@pytest.mark.parametrize(
    ("recipe", "words", "streams"),
    [
        pytest.param("ddp", ["nproc=2"], "<&- >&- 2>/dev/full", marks=pytest.mark.slow),
        pytest.param("ddp", ["nproc=2", "start=spawn"], ">/dev/full 2>&-", marks=pytest.mark.soak),
        pytest.param("ddp", ["nproc=2", "launcher=lightning"], "2>/dev/full >&-", marks=pytest.mark.soak),
        pytest.param("lightning_trainer", ["nproc=2"], ">/dev/full 2>/dev/full", marks=pytest.mark.soak),
        pytest.param("deepspeed_zero", ["nproc=2"], ">&- 2>&-", marks=pytest.mark.soak),
        pytest.param("doctor", ["nproc=2", "data=digits"], ">/dev/full 2>&-", marks=pytest.mark.soak),
    ],
)
def test_a_run_that_nobody_sees_ends_as_any_other(recipe: str, words: list[str], streams: str, tmp_path: Path) -> None:
    data = [] if recipe == "doctor" else [*WORDS, "epochs=1"]
    assert shell(f"recipes.{recipe}", [*data, *words, "out=run"], streams, tmp_path) == (0, "")
    if recipe != "doctor":
        assert result(tmp_path / "run")["status"] == "finished"
        assert "Error" not in "".join(read(log) for log in tmp_path.glob("run/ranks/*.log"))


@pytest.mark.slow
def test_a_terminal_that_goes_costs_no_checkpoint(tmp_path: Path) -> None:
    """Its window is closed: each write fails with EIO, the announcement before the save too; then a signal comes."""
    outside, inside = pty.openpty()
    words = [sys.executable, "-m", "recipes.ddp", *WORDS, "epochs=100000", "nproc=2", "out=run"]
    process = subprocess.Popen(
        words,
        cwd=tmp_path,
        env=clean_environment() | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
        preexec_fn=heed_signals,
    )
    os.close(inside)
    out = tmp_path / "run"
    try:
        wait_until(lambda: '"step": 3,' in read(out / "metrics.jsonl"))
        os.close(outside)
        seen = read(out / "metrics.jsonl").count("\n")
        wait_until(lambda: read(out / "metrics.jsonl").count("\n") > seen + 5)
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) == 75
    finally:
        process.kill()  # its ranks end with it
    found = result(out)
    assert found["status"] == "preempted"
    assert (out / "checkpoints" / f"step-{found['steps']:08d}" / "manifest.json").is_file()
