"""`logger=mllog`: MLPerf's own compliance checker passes the log of a run of images, also of one that was killed and
resumed, and refuses one that is broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlperf_logging import mllog  # noqa: F401  once here, not once in every forked rank
from mlperf_logging.compliance_checker import mlp_compliance

from lockstep.config.run_directory import freeze
from lockstep.distributed import signals
from lockstep.launch.validate import validate
from recipes import ddp, single
from tests.helpers.harness import compose_config, execute, result, run_ranks
from tests.ranks.test_resume import interrupted

pytestmark = pytest.mark.usefixtures("narrow")

RULES = "4.0.0"  # the last rules with a benchmark of images that are classified: resnet
SUBMITTED = "benchmark=resnet division=open status=research org=us platform=laptop"
WORDS = ("data=synthetic", "data.size=48", "data.image_size=8", "global_batch_size=12", "epochs=3", "logger=mllog")
WORDS += (
    *(f"logger.mlperf.submission_{word}" for word in SUBMITTED.split()),
    "log_every=1",
    "checkpoint.every=2",
    "optim.momentum=0.8",
)
Line = dict[str, Any]


def passes(path: Path) -> bool:
    """Whether MLPerf's checker takes the log, warnings counted as errors."""
    checker = mlp_compliance.make_checker("training", RULES, False, True)
    return bool(mlp_compliance.main(str(path), f"training_{RULES}/common.yaml", checker)[0])


def read(path: Path) -> list[Line]:
    return [json.loads(line.removeprefix(":::MLLOG ")) for line in path.read_text().splitlines()]


def values(found: list[Line], key: str) -> list[Any]:
    return [line["value"] for line in found if line["key"] == key]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory, narrow: None) -> Path:
    out = tmp_path_factory.mktemp("mllog") / "run"
    execute(ddp.train, out, 2, *WORDS)
    return out / "mllog.txt"


def test_mlperf_s_checker_passes_the_log_of_two_ranks(log: Path) -> None:
    assert passes(log)
    found = read(log)
    moments = [line["key"] for line in found if line["event_type"] != "POINT_IN_TIME"]
    epoch = ["epoch_start", "epoch_stop", "eval_start", "eval_stop"]
    assert moments == ["init_start", "init_stop", "run_start", *epoch * 3, "run_stop"]
    times = [line["time_ms"] for line in found]
    assert times == sorted(times)
    facts = {line["key"]: line["value"] for line in found if line["event_type"] == "POINT_IN_TIME"}
    assert (facts["global_batch_size"], facts["train_samples"], facts["opt_name"]) == (12, 48, "sgd")
    assert (facts["opt_momentum"], facts["submission_org"], facts["seed"]) == (0.8, "us", 0)
    assert values(found, "eval_accuracy")[-1] == result(log.parent)["eval_accuracy"]
    assert not any(line["metadata"]["file"].startswith("/") for line in found), "folders of this machine"


def without(key: str) -> Callable[[list[str]], list[str]]:
    return lambda lines: [line for line in lines if f'"key": "{key}"' not in line]


BROKEN: dict[str, Callable[[list[str]], list[str]]] = {
    **{f"no {key}": without(key) for key in ("submission_org", "cache_clear", "init_stop", "epoch_stop", "run_stop")},
    "begun twice": lambda lines: [*lines[:-1], next(line for line in lines if "run_start" in line), lines[-1]],
    "an end before its beginning": lambda lines: [lines[-1], *lines[:-1]],
    "an evaluation of no epoch": lambda lines: [line.replace("epoch_num", "epoch") for line in lines],
    "an empty name": lambda lines: [line.replace('"us"', '""') for line in lines],
    "half a line": lambda lines: [*lines[:-1], lines[-1][:40]],
}


@pytest.mark.parametrize("how", BROKEN)
def test_it_refuses_one_that_is_broken(how: str, log: Path, tmp_path: Path) -> None:
    lines = log.read_text().splitlines()
    (tmp_path / "whole.txt").write_text("\n".join(lines))
    (tmp_path / "broken.txt").write_text("\n".join(BROKEN[how](lines)))
    assert passes(tmp_path / "whole.txt")
    assert not passes(tmp_path / "broken.txt")


def test_a_run_that_was_cut_off_has_one_log(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "AGREE_SECONDS", 0)  # these steps are so short that the run would be over
    config = compose_config(single.train, *WORDS, f"out={tmp_path / 'run'}")
    validate(config, single.train, 1)
    out = freeze(config, "single")
    assert run_ranks(interrupted, 1, single.train.target, config, str(out), 0, 6) == ["SIGTERM"]
    assert read(out / "mllog.txt")[-1]["metadata"]["status"] == "aborted"
    shutil.rmtree(out / "checkpoints" / "step-00000006")  # as if killed before it was saved, and in a line
    with (out / "mllog.txt").open("a") as stream:
        stream.write(':::MLLOG {"namespace": "", "time')
    execute(single.train, out, 1, *WORDS)
    assert passes(out / "mllog.txt")
    assert [line["key"] for line in read(out / "mllog.txt")] == [line["key"] for line in read(log)]
    before = (out / "mllog.txt").read_bytes()
    (out / "result.json").unlink()  # cut off once more, with nothing left to train
    execute(single.train, out, 1, *WORDS)
    assert (out / "mllog.txt").read_bytes() == before
