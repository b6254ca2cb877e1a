"""`recipes.tune`: what is drawn, what a trial is, and a search that is killed and goes on, on a real Ray."""

from __future__ import annotations

import json
import multiprocessing
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lockstep import UserError
from lockstep.config import compose
from lockstep.config.keys import walk
from lockstep.config.schema import Config
from lockstep.launch import recipe_process
from lockstep.tune.config import TuneConfig
from lockstep.tune.search_space import SearchSpace
from lockstep.tune.trial import make_trainable, plan_trials, trial_words, unused_words
from lockstep.tune.tuner import make_scheduler
from recipes import ddp, pipeline_parallel, tune
from tests.helpers.harness import clean_environment, command, compose_config, result, validate
from tests.helpers.processes import as_a_shell, wait_until

quoted = partial(compose.quoted, texts=("tune.space.",))
SPACE = [
    "tune.space.global_batch_size=choice(12, 24)",
    "tune.space.optim.warmup_steps=sample_from(48 // global_batch_size)",
]

# The space --------------------------------------------------------------------------------------------------------


def test_every_word_of_a_space_draws_what_it_says() -> None:
    space = SearchSpace(
        {
            "optim": {"lr": "loguniform(1e-4, 1e-1)", "momentum": "uniform(0.8, 0.99)"},
            "optim.warmup_steps": "randint(2, 9)",
            "eval_batch_size": "lograndint(16, 1025)",
            "model.norm": "choice(batch, group)",
            "patience": "choice(null, 3)",
            "global_batch_size": "sample_from(2 ** randint(4, 7) * accumulate)",
            "seed": "sample_from(global_batch_size // 2 + max(1, -3))",
        },
        ddp.train,
    )
    found = [space.values(space.sample(0, number), Config(accumulate=3)) for number in range(200)]
    lr = sorted(each["optim.lr"] for each in found)
    assert 1e-4 <= lr[0] < 2e-4
    assert 0.002 < lr[100] < 0.005, "half of them are below the geometric mean"
    assert all(0.8 <= each["optim.momentum"] <= 0.99 for each in found)
    assert {each["optim.warmup_steps"] for each in found} == set(range(2, 9))
    assert all(16 <= each["eval_batch_size"] <= 1024 for each in found)
    assert {each["model.norm"] for each in found} == {"batch", "group"}
    assert {each["patience"] for each in found} == {None, 3}
    assert {each["global_batch_size"] for each in found} == {48, 96, 192}
    assert all(each["seed"] == each["global_batch_size"] // 2 + 1 for each in found)
    assert all(float(f"{each['optim.lr']:.4g}") == each["optim.lr"] for each in found), "short enough to be typed"


def test_a_trial_s_settings_depend_on_the_seed_and_its_number() -> None:
    space = SearchSpace({"optim.lr": "loguniform(1e-4, 1e-1)", "global_batch_size": "choice(48, 96)"}, ddp.train)
    assert space.sample(3, 1) == space.sample(3, 1)
    assert len({str(space.sample(seed, number)) for seed in range(3) for number in range(3)}) == 9


@pytest.mark.parametrize(
    ("key", "text", "said"),
    [
        ("global_batch_size", "__import__('os').system('true')", "allowed are uniform"),
        ("global_batch_size", "sample_from(open('x'))", "open is none of its functions"),
        ("global_batch_size", "sample_from(().__class__)", "is no config key"),
        ("global_batch_size", "sample_from([1][0])", "neither a number"),
        ("global_batch_size", "sample_from(size * 2)", "size is no config key"),
        ("global_batch_size", "choice()", "nothing to choose"),
        ("global_batch_size", "choice(1, 2", "cannot be read"),
        ("global_batch_size", "randint(0.5, 2)", "whole numbers"),
        ("optim.lr", "loguniform(0, 1)", "above 0"),
        ("optim.lr", "uniform(1, 1)", "lower one first"),
        ("optim.lr", 0.1, "a fixed value is set as optim.lr=0.1"),
    ],
)
def test_what_is_not_a_space_is_refused_by_name(key: str, text: Any, said: str) -> None:
    with pytest.raises(UserError, match=r"tune\.space") as refused:
        SearchSpace({key: text}, ddp.train)
    assert said in str(refused.value)


def test_expressions_that_need_each_other_or_have_no_value_are_named() -> None:
    around = SearchSpace(
        {"global_batch_size": "sample_from(2 * accumulate)", "accumulate": "sample_from(global_batch_size // 2)"},
        ddp.train,
    )
    with pytest.raises(UserError, match="global_batch_size needs accumulate needs global_batch_size"):
        around.values({}, Config())
    with pytest.raises(UserError, match="too large"):
        SearchSpace({"seed": "sample_from(9 ** 9 ** 9)"}, ddp.train).values({}, Config())
    with pytest.raises(UserError, match="zero"):
        SearchSpace({"seed": "sample_from(1 // seed)"} | {"seed": "sample_from(1 // (2 - 2))"}, ddp.train).values(
            {}, Config()
        )


def test_the_shell_s_words_become_hydra_s() -> None:
    assert quoted("tune.space.optim.lr=uniform(0, 1)") == '++tune.space.optim.lr="uniform(0, 1)"'
    assert quoted(quoted("tune.space.optim.lr=uniform(0, 1)")) == '++tune.space.optim.lr="uniform(0, 1)"'
    assert quoted("optim.lr=0.1") == "optim.lr=0.1"
    assert quoted("~tune.space.global_batch_size") == "~tune.space.global_batch_size"


def test_the_tuned_recipe_s_own_keys_can_be_set_and_drawn() -> None:
    wanted = ["tune.recipe=pipeline_parallel", "schedule=gpipe", quoted("tune.space.micro_batches=choice(2, 4)")]
    config = compose_config(tune.train, *wanted)
    validate(config, tune.train, 1)
    common = trial_words(
        config, tune.train, pipeline_parallel.train, plan_trials(config, pipeline_parallel.train, "cpu")
    )
    assert common == ["schedule=gpipe", "nproc=2", "threads=1"], "and nothing that the trial finds out by itself"


def test_a_trial_s_command_composes_what_was_typed() -> None:
    wanted = [
        "data=synthetic",
        "data.size=48",
        "optim=adamw",
        "optim.weight_decay=0.1",
        "global_batch_size=24",
        "patience=3",
    ]
    config = compose_config(
        tune.train,
        *wanted,
        "tune.nproc=1",
        "tune.concurrent=1",
        "threads=1",
        "model.norm=group",
        *map(quoted, SPACE),
    )
    validate(config, tune.train, 1)
    common = trial_words(config, tune.train, ddp.train, plan_trials(config, ddp.train, "cpu"))
    assert common[:3] == ["data=synthetic", "optim=adamw", "model.norm=group"]
    there = compose_config(ddp.train, *common, "global_batch_size=24")
    validate(there, ddp.train, 1)
    drawn = set(SearchSpace(config.tune.space, ddp.train).texts)
    mine, theirs = (
        {name: value for name, value, _ in walk(each) if name not in drawn and not name.startswith("tune.")}
        for each in (config, there)
    )
    assert mine | {"nproc": 1} == theirs
    assert unused_words(config, tune.train, ddp.train) == [
        "warning: global_batch_size=24 is not used: each trial draws its own, choice(12, 24); "
        "~tune.space.global_batch_size has it for all trials"
    ]


# A trial ----------------------------------------------------------------------------------------------------------

FAKE = """
import json, os, signal, sys, time
from pathlib import Path
words = dict(word.partition("=")[::2] for word in sys.argv[1:])
out = Path(words["out"])
out.mkdir(exist_ok=True)
def leave(*_):
    (out / "left").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, leave)
(out / "environ").write_text(json.dumps(dict(os.environ)))
if "fail" in words:
    sys.exit("error: fail=1: allowed is nothing\\nto resume: python")
with (out / "metrics.jsonl").open("a", buffering=1) as log:
    for step in (1, 2, 3):
        log.write(json.dumps({"step": step, "epoch": step, "loss": 1}) + "\\n")
        log.write(json.dumps({"step": step, "epoch": step, "eval_accuracy": step / 10}) + "\\n")
(out / "begun").touch()
time.sleep(float(words.get("sleep", 0)))
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes trials of a program that only pretends to train, in this process instead of one of Ray's."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.chdir(tmp_path)
    run: Any = SimpleNamespace(config=Config(epochs=3), out=tmp_path)
    each: Any = SimpleNamespace(target="fake")

    def make(*words: str) -> Any:
        return make_trainable(run, each)({"number": 0, "words": list(words), "values": {}})

    return make


def record(tmp_path: Path) -> dict[str, Any]:
    return dict(json.loads((tmp_path / "trials" / "0.json").read_text()))


def test_a_trial_reports_each_evaluation_once_and_the_last_at_its_end(fake: Any, tmp_path: Path) -> None:
    made = fake("sleep=2")
    found = [made.train()]
    while not found[-1]["done"]:
        found.append(made.train())
        if found[-1]["evaluations"] == 3:
            assert made.process.process.returncode == 0
    counts = [each["evaluations"] for each in found if each["evaluations"]]
    assert sorted(set(counts)) == [1, 2, 3]
    assert counts == sorted(counts)
    assert found[-1]["eval_accuracy"] == 0.3
    made.stop()
    assert record(tmp_path)["state"] == "finished"
    again = fake("sleep=2")
    assert again.process is None, "what has ended is not run again"
    assert [again.train()["evaluations"] for _ in range(3)] == [1, 2, 3]


def test_a_trial_that_is_stopped_is_asked_to_leave(fake: Any, tmp_path: Path) -> None:
    made = fake("sleep=60")
    wait_until((tmp_path / "trials" / "0" / "begun").exists, 20)
    assert made.train()["done"] is False
    made.stop()
    assert (tmp_path / "trials" / "0" / "left").exists()
    assert made.process.process.returncode == 75
    assert record(tmp_path)["state"] == "stopped"


def test_a_trial_that_had_ended_before_it_was_stopped_is_not_lost(fake: Any, tmp_path: Path) -> None:
    for word, state, problem in (
        ("sleep=0", "finished", ""),
        ("fail=1", "failed", "error: fail=1: allowed is nothing"),
    ):
        made = fake(word)
        made.process.process.wait(20)
        made.stop()
        assert (record(tmp_path)["state"], record(tmp_path)["problem"]) == (state, problem)


def test_a_trial_that_is_refused_ends_with_its_line(fake: Any, tmp_path: Path) -> None:
    made = fake("fail=1")
    found = made.train()
    while not found["done"]:
        found = made.train()
    assert (record(tmp_path)["state"], record(tmp_path)["problem"]) == ("failed", "error: fail=1: allowed is nothing")


def test_other_settings_under_the_same_number_begin_anew(fake: Any, tmp_path: Path) -> None:
    made = fake("sleep=60")
    wait_until((tmp_path / "trials" / "0" / "begun").exists, 20)
    made.stop()
    (tmp_path / "trials" / "0" / "old").touch()
    fake("sleep=61").stop()
    assert not (tmp_path / "trials" / "0" / "old").exists()
    assert len(list((tmp_path / "trials").glob("0.*.aside/old"))) == 1


def test_what_ray_sets_for_its_workers_does_not_reach_the_ranks(
    fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    make = make_trainable(SimpleNamespace(config=Config(epochs=3), out=tmp_path), SimpleNamespace(target="fake"))  # type: ignore[arg-type]
    ours = {"OMP_NUM_THREADS": "1", "RAY_JOB_ID": "1", "RANK": "0", "LOCKSTEP_RUN_DIR": "x", "PYTHONBREAKPOINT": "ray"}
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # but this is Ray's share of the GPUs
    made = make({"number": 0, "words": [], "values": {}})
    wait_until((tmp_path / "trials" / "0" / "begun").exists, 20)
    made.stop()
    seen = json.loads((tmp_path / "trials" / "0" / "environ").read_text())
    assert not set(ours) & set(seen)
    assert seen["CUDA_VISIBLE_DEVICES"] == "3"


def hold(folder: Path) -> None:
    recipe_process.RecipeProcess("fake", ["sleep=60"], folder / "0", str(folder), {})
    time.sleep(60)


def test_the_command_is_asked_to_leave_when_whoever_holds_it_is_killed(fake: Any, tmp_path: Path) -> None:
    holder = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path,))
    holder.start()
    wait_until((tmp_path / "0" / "begun").exists, 20)
    holder.kill()
    wait_until((tmp_path / "0" / "left").exists, 10)


def test_asha_knows_after_a_restart_what_the_trials_had_logged(tmp_path: Path) -> None:
    """Tune restores the trials only; an empty rung would let any trial pass."""
    from ray.tune.schedulers import TrialScheduler

    for number, accuracy in enumerate((0.9, 0.8)):
        (tmp_path / "trials" / str(number)).mkdir(parents=True)
        line = json.dumps({"step": 5, "epoch": 1, "eval_accuracy": accuracy})
        (tmp_path / "trials" / str(number) / "metrics.jsonl").write_text(line + "\n")
    asha = make_scheduler(SimpleNamespace(config=TuneConfig(epochs=4), out=tmp_path))  # type: ignore[arg-type]
    asha.set_search_properties("eval_accuracy", "max")
    trials = [SimpleNamespace(trial_id=str(number), config={"number": number}) for number in range(4)]
    for each in trials:
        asha.on_trial_add(None, each)
    decisions = [
        asha.on_trial_result(None, trials[number], {"evaluations": 1, "eval_accuracy": accuracy})
        for number, accuracy in ((2, 0.5), (3, 0.95))
    ]
    assert decisions == [TrialScheduler.STOP, TrialScheduler.CONTINUE]


# The search, on a real Ray -----------------------------------------------------------------------------------------

SMALL = "data=synthetic data.size=48 data.image_size=8 global_batch_size=24 max_steps=6 epochs=6".split()
SINGLE = ["-m", "recipes.tune", "tune.recipe=single", "tune.trials=4", "tune.concurrent=2", "out=run", *SMALL, *SPACE]


def rows(folder: Path) -> list[dict[str, Any]]:
    found = result(folder / "run")["trials"]
    return sorted(found, key=lambda row: int(row["number"]))


def ray_processes(folder: Path) -> list[int]:
    """All that a search in this folder has started, Ray's processes and the trials."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(entry / "cwd") == str(folder) or str(folder) in (entry / "environ").read_text():
                found.append(int(entry.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def states(folder: Path) -> list[str]:
    return [json.loads(file.read_text())["state"] for file in (folder / "run" / "trials").glob("?.json")]


def test_a_search_ends_with_a_table_and_the_best_settings_as_a_command(tmp_path: Path) -> None:
    done = command(*SINGLE, "tune.trials=2", cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    wait_until(lambda: not ray_processes(tmp_path), 10)  # a trial's launcher may end a moment after its ranks
    found = rows(tmp_path)
    assert [row["number"] for row in found] == [0, 1]
    best = result(tmp_path / "run")["best"]
    assert best["eval_accuracy"] == max(row["eval_accuracy"] for row in found if row["state"] == "finished")
    assert done.stdout.rstrip().endswith(result(tmp_path / "run")["command"])
    assert (tmp_path / "run" / "trials.csv").read_text().count("\n") == 3


@pytest.mark.soak
def test_a_search_that_is_killed_goes_on_and_its_best_command_trains_the_same_bits(tmp_path: Path) -> None:
    process = as_a_shell([sys.executable, *SINGLE], tmp_path)
    wait_until(lambda: "finished" in states(tmp_path), 240)
    assert len(ray_processes(tmp_path)) > 5
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not ray_processes(tmp_path), 60)
    done = [row for row in (tmp_path / "run" / "trials").glob("?.json") if "finished" in row.read_text()]
    before = {path: (path.with_suffix("") / "environment.json").stat().st_mtime_ns for path in done}

    second = command(*SINGLE, cwd=tmp_path, timeout=300)
    assert second.returncode == 0, second.stderr
    assert not ray_processes(tmp_path)
    assert "resuming the search" in second.stdout
    for path, seconds in before.items():
        assert (path.with_suffix("") / "environment.json").stat().st_mtime_ns == seconds, "not run again"
    found = rows(tmp_path)
    assert [row["number"] for row in found] == [0, 1, 2, 3]
    assert {row["state"] for row in found} <= {"finished", "stopped"}
    space = SearchSpace({"optim": {"lr": "loguniform(1e-4, 1e-1)"}, "global_batch_size": "choice(12, 24)"}, ddp.train)
    for row in found:
        drawn = space.values(space.sample(0, row["number"]), Config())
        assert {name: row["values"][name] for name in drawn} == drawn
        assert row["values"]["optim.warmup_steps"] == 48 // row["values"]["global_batch_size"]
        if row["state"] == "finished":
            there = result(tmp_path / "run" / "trials" / str(row["number"]))
            assert (row["steps"], row["eval_loss"]) == (there["steps"], there["eval_loss"]) == (6, row["eval_loss"])
    best = result(tmp_path / "run")["best"]
    assert best["eval_accuracy"] == max(row["eval_accuracy"] for row in found if row["state"] == "finished")
    assert (tmp_path / "run" / "trials.csv").read_text().count("\n") == 5

    words = shlex.split(result(tmp_path / "run")["command"])
    assert words[1:3] == ["-m", "recipes.single"]
    alone = command(*words[1:], "out=alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    mine = result(tmp_path / "alone")
    assert (mine["eval_loss"], mine["eval_accuracy"]) == (best["eval_loss"], best["eval_accuracy"])


@pytest.mark.soak
def test_a_search_with_several_ranks_a_trial_that_is_asked_to_leave_saves_and_goes_on(tmp_path: Path) -> None:
    """Steps enough that all trials are in the middle of it."""
    words = ["-m", "recipes.tune", "tune.recipe=ddp", "tune.nproc=2", "tune.trials=2", "tune.concurrent=1", "out=run"]
    words += [
        "tune=optuna",
        "data=synthetic",
        "data.size=48",
        "data.image_size=8",
        "global_batch_size=24",
        "max_steps=60",
    ]
    words += ["epochs=30", "eval_every=10", "tune.space.global_batch_size=choice(12, 24)"]
    process = as_a_shell([sys.executable, *words], tmp_path)
    wait_until((tmp_path / "run" / "trials" / "0" / "metrics.jsonl").exists, 240)
    os.kill(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 75, said
    assert "to resume: " in said
    assert not ray_processes(tmp_path)
    assert result(tmp_path / "run")["status"] == "preempted"
    assert list((tmp_path / "run" / "trials" / "0" / "checkpoints").glob("step-*")), "it has saved"
    done = command(*words, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [row["number"] for row in rows(tmp_path)] == [0, 1]
    assert result(tmp_path / "run" / "trials" / "0")["world_size"] == 2
    assert result(tmp_path / "run" / "trials" / "0")["resumed_from"]


@pytest.mark.soak
def test_on_an_existing_cluster(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray = str(Path(sys.executable).parent / "ray")
    start = f"start --head --block --port={port} --num-cpus=2 --include-dashboard=false --disable-usage-stats".split()
    # A short folder: the paths of sockets in it may have 107 characters.
    start += [f"--temp-dir=/tmp/ray-{port}", "--node-ip-address=127.0.0.1", "--object-store-memory=200000000"]
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # this cluster is for this test alone
    cluster = subprocess.Popen(
        [ray, *start], env=clean_environment() | own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        address = f"tune.address=127.0.0.1:{port}"
        words = [*SINGLE, address, "tune.trials=2", "tune.scheduler=none"]  # which one comes first must not matter

        def is_up() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        wait_until(is_up, 60)
        time.sleep(5)  # the port answers before the node has joined
        done = command(*words, cwd=tmp_path, timeout=300, **own)
        assert done.returncode == 0, done.stderr
        assert [row["steps"] for row in rows(tmp_path)] == [6, 6]
        assert cluster.poll() is None, "it is left as it was"
    finally:
        cluster.terminate()
        cluster.wait(30)
        shutil.rmtree(f"/tmp/ray-{port}", ignore_errors=True)
