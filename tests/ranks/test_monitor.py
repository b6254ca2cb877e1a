"""`logger=`: any mix, one writer a run, each step once however often the run was cut off; and what it got wrong."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shutil
import signal
import struct
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep.config.run_directory import freeze
from lockstep.config.schema import shared_part
from lockstep.data.datasets import load_data
from lockstep.distributed.process_group import World
from lockstep.errors import UserError
from lockstep.launch.validate import validate
from lockstep.loggers.csv import CsvLogger
from lockstep.models.resnet import build_model
from lockstep.run import Run
from recipes import ddp, single
from tests.helpers.harness import ROOT, compose_config, execute, lines, result, run_ranks
from tests.helpers.processes import as_a_shell, wait_until

pytestmark = pytest.mark.usefixtures("narrow")

DATA = ("data=synthetic", "data.size=48", "data.image_size=8", "global_batch_size=12", "epochs=3")  # 4 steps per epoch
WORDS = (*DATA, "log_every=1", "checkpoint.every=4", "logger=[csv,tensorboard,wandb]", "logger.histograms=2")
STEPS = 12


@pytest.fixture(autouse=True)
def _wandb_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No account of the person's, whose tests these are; and imported once here, not once in every forked rank."""
    import wandb  # noqa: F401

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def wandb_history(out: Path) -> list[dict[str, Any]]:
    """Every step that wandb has of a run, from the file that `wandb sync` sends: records of protobuf, framed as LevelDB
    frames its log (https://github.com/google/leveldb/blob/main/doc/log_format.md), behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = out.glob("wandb/offline-run-*/*.wandb")
    content, place, record, rows = path.read_bytes(), 7, b"", []
    assert content.startswith(b":W&B")
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # too little left of a block for a frame
            place += 32768 - place % 32768
            continue
        size, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        record = (record if kind in (3, 4) else b"") + content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # the only frame of a record, or its last
            items = Record.FromString(record).history.item
            if items:
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def events(out: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(out / "tensorboard"), size_guidance={"histograms": 0, "images": 0})
    found.Reload()
    return found


def curves(out: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """{writer: {curve: [(step, value), …]}} as each has them on disk."""
    names = ("loss", "lr", "eval_loss")
    jsonl = lines(out)
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    board, history = events(out), wandb_history(out)
    return {
        "jsonl": {name: [(line["step"], line[name]) for line in jsonl if name in line] for name in names},
        "csv": {name: [(int(row["step"]), float(row[name])) for row in rows if row[name]] for name in names},
        "tensorboard": {name: [(event.step, event.value) for event in board.Scalars(name)] for name in names},
        "wandb": {name: [(row["_step"], row[name]) for row in history if name in row] for name in names},
    }


def assert_each_has_each_step_once(out: Path) -> None:
    found = curves(out)
    assert [step for step, _ in found["jsonl"]["loss"]] == list(range(1, STEPS + 1))
    assert [step for step, _ in found["jsonl"]["eval_loss"]][-3:] == [4, 8, 12]
    for writer, mine in found.items():
        for name, curve in mine.items():
            assert [step for step, _ in curve] == [step for step, _ in found["jsonl"][name]], (writer, name)
            assert [value for _, value in curve] == pytest.approx(
                [value for _, value in found["jsonl"][name]], rel=1e-6
            )
    drawn = [json.loads(line)["step"] for line in (out / "histograms.jsonl").read_text().splitlines()]
    assert drawn == [2, 4, 6, 8, 10, 12]
    name = "weights/layer1.0.conv1.weight"
    assert [event.step for event in events(out).Histograms(name)] == drawn
    assert [row["_step"] for row in wandb_history(out) if f"{name}/values" in row] == drawn


@pytest.mark.slow
def test_curves_go_on_without_a_gap_or_a_step_twice(tmp_path: Path) -> None:
    out = tmp_path / "run"
    execute(ddp.train, out, 2, *WORDS, "max_steps=6")
    shutil.rmtree(out / "checkpoints" / "step-00000006")  # as if killed after step 6 was logged and before it was saved
    with (out / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 7, "lo')
    execute(ddp.train, out, 2, *WORDS)
    assert_each_has_each_step_once(out)
    assert len({path.name.rpartition("-")[2] for path in (out / "wandb").glob("*run-*")}) == 1, "one run, by its id"


def killed(world: World, config: Any, out: str, pid: str) -> None:
    """Train, and be killed in step 7: no handler runs, and nothing is flushed."""
    from torch import optim

    step = optim.SGD.step
    run = Run("single", config, world, Path(out))

    def fatal(self: Any, closure: Callable[[], float] | None = None) -> Any:
        if run.step == 6:
            Path(pid).write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, closure)

    optim.SGD.step = fatal  # type: ignore[assignment, method-assign]
    single.train(run)


@pytest.mark.slow
def test_a_killed_run_s_curves_are_whole_in_the_end_and_its_service_is_gone(tmp_path: Path) -> None:
    config = compose_config(single.train, *WORDS, f"out={tmp_path / 'run'}")
    validate(config, single.train, 1)
    out = freeze(config, "single")
    with pytest.raises(AssertionError, match="died without a word"):
        run_ranks(killed, 1, config, str(out), str(tmp_path / "pid"))
    service = f"--pid\0{(tmp_path / 'pid').read_text()}\0".encode()

    wait_until(lambda: not any(service in read(path) for path in Path("/proc").glob("[0-9]*/cmdline")), 30)
    execute(single.train, tmp_path / "run", 1, *WORDS)
    assert_each_has_each_step_once(tmp_path / "run")


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.slow_except("logger=[tensorboard,csv]", "logger=[]", "seed=0")
@pytest.mark.parametrize(
    ("words", "written"),
    [
        ("logger=csv", {"metrics.csv"}),
        ("logger=wandb", {"wandb"}),
        ("logger=[tensorboard,csv]", {"metrics.csv", "tensorboard"}),
        ("logger=[]", set()),
        ("seed=0", {"metrics.csv"}),
    ],
)
def test_what_is_asked_for_is_written_and_nothing_else(words: str, written: set[str], tmp_path: Path) -> None:
    execute(single.train, tmp_path / "run", 1, *DATA, "max_steps=1", words)
    found = {path.name for path in (tmp_path / "run").iterdir()}
    assert found & {"metrics.csv", "tensorboard", "wandb"} == written
    assert {"metrics.jsonl", "misclassified.png"} <= found


@pytest.mark.slow
def test_wandb_with_a_key_and_no_server_goes_on_offline_and_keeps_the_key_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "0123456789" * 4
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    out = tmp_path / "run"
    execute(single.train, out, 1, *DATA, "max_steps=1", "log_every=1", "logger=wandb", "timeout_seconds=4")
    log = (out / "ranks" / "0.log").read_text()
    assert re.search(r"wandb: .*; going on offline, to be sent later with wandb sync", log)
    assert [row["_step"] for row in wandb_history(out) if "loss" in row] == [1]
    assert not [path for path in out.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    with pytest.raises(
        UserError, match=r"^logger=wandb needs the package wandb, .* pip install '\.\[wandb\]' in lockstep's folder$"
    ):
        validate(compose_config(single.train, "logger=[csv,wandb]"), single.train, 1)


@pytest.mark.slow
def test_the_same_mistakes_are_shown_on_any_number_of_ranks(tmp_path: Path) -> None:
    """The first of the evaluation set, with what they are and what the exported weights take them for."""
    words = (
        "global_batch_size=24",
        "max_steps=1",
        "optim.lr=0",
        "eval_batch_size=7",
        "model.norm=group",
        "logger.images=5",
    )
    found = []
    for ranks in (1, 3):
        execute(ddp.train, tmp_path / str(ranks), ranks, *words, "logger=[csv,tensorboard]")
        found.append(result(tmp_path / str(ranks))["misclassified"])
    assert found[0] == found[1]
    config = shared_part((tmp_path / "1" / "config.yaml").read_text())
    _, images = load_data(config.data, 8, 0)
    model = build_model(config.model).eval()
    model.load_state_dict(torch.load(tmp_path / "1" / "model.pt", weights_only=True))
    pixels, labels = images.fetch(torch.arange(len(images)), None)
    with torch.no_grad():
        predicted = model(pixels.float() / 127.5 - 1).argmax(1)
    wrong = (predicted != labels).nonzero().flatten()[:5].tolist()
    expected = [(sample, int(labels[sample]), int(predicted[sample])) for sample in wrong]
    assert [tuple(each.values()) for each in found[0]] == expected
    assert (tmp_path / "3" / "misclassified.png").read_bytes() == (tmp_path / "1" / "misclassified.png").read_bytes()
    board = events(tmp_path / "3")
    assert len(board.Tags()["images"]) == 5
    sample, label, prediction = expected[4]
    (text,) = board.Tensors("misclassified/4/text_summary")
    assert text.tensor_proto.string_val[0].decode() == f"sample {sample}: {label}, predicted {prediction}"


@pytest.mark.slow
def test_the_config_and_the_memory_are_there(tmp_path: Path) -> None:
    out = tmp_path / "run"
    execute(ddp.train, out, 2, *DATA, "max_steps=2", "log_every=1", "logger=[tensorboard,wandb]")
    (text,) = events(out).Tensors("config/text_summary")
    assert "batch_size: 12" in text.tensor_proto.string_val[0].decode()
    peaks = [json.loads(line)["peak_memory_bytes"] for line in (out / "metrics.jsonl").read_text().splitlines()[:2]]
    assert 2**26 < peaks[0] <= peaks[1] <= result(out)["peak_memory_bytes"]  # type: ignore[operator]


@pytest.mark.slow
def test_make_board_serves_the_curves(tmp_path: Path) -> None:
    execute(single.train, tmp_path / "outputs" / "run", 1, *DATA, "max_steps=1", "logger=tensorboard")
    words = [
        "make",
        "-f",
        str(ROOT / "Makefile"),
        "-o",
        ".venv/installed",
        f"BIN={Path(sys.executable).parent}",
        "board",
    ]
    board = as_a_shell(words, tmp_path)
    try:
        assert board.stdout is not None
        (address,) = [m[1] for m in (re.search(r" at (http://\S+) ", line) for line in started(board.stdout)) if m]
        wait_until(lambda: "run/tensorboard" in urllib.request.urlopen(f"{address}data/runs").read().decode(), 60)
    finally:
        os.killpg(board.pid, signal.SIGKILL)
        board.wait()


def started(stream: Any) -> Iterator[str]:
    """The lines of a TensorBoard's until it says where it is."""
    for line in stream:
        yield line
        if " at http://" in line:
            return


def test_a_csv_that_goes_on_with_other_columns_keeps_its_rows(tmp_path: Path) -> None:
    before = CsvLogger(tmp_path, 0, ["gradient_norm"])
    for step in (1, 2, 3):
        before.log({"step": step, "loss": 0.5, "gradient_norm": float(step)})
    before.close()
    after = CsvLogger(tmp_path, 2, ["gradient_norm/fc"])
    after.log({"step": 3, "loss": 0.25, "gradient_norm/fc": 7.0})
    after.close()
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [(row["step"], row["gradient_norm"], row["gradient_norm/fc"]) for row in rows] == [
        ("1", "1.0", ""),
        ("2", "2.0", ""),
        ("3", "", "7.0"),
    ]
