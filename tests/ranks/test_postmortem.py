"""`recipes.doctor run=FOLDER` says what became of a run: of real ones that ended in each way, and of damaged ones."""

from __future__ import annotations

import fcntl
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lockstep import Run
from lockstep.config.declared import read_config
from lockstep.config.run_directory import freeze
from lockstep.config.schema import to_yaml
from lockstep.data.loader import Samples
from lockstep.diagnose.config import DoctorConfig
from lockstep.diagnose.evidence import collect_evidence, error_in
from lockstep.diagnose.findings import Finding
from lockstep.diagnose.postmortem import judge_run
from lockstep.diagnose.stacks import VERDICT_MARK
from lockstep.distributed.heartbeat import DATA_WAIT_SHARE, Heartbeat
from lockstep.distributed.host_memory import read_heartbeat
from lockstep.distributed.process_group import World
from lockstep.errors import UserError
from lockstep.launch.validate import validate
from lockstep.tasks.images import Images
from recipes import ddp, doctor, fsdp
from tests.helpers.command_line import run_main
from tests.helpers.harness import command, compose_config, execute, result, run_ranks
from tests.helpers.processes import wait_until
from tests.helpers.warm_interpreter import ROOT
from tests.ranks.test_failures import CRASHING

SHORT = ["global_batch_size=24", "max_steps=4", "log_every=1", "eval_every=0", "eval_batch_size=360"]


def read(out: Path) -> dict[str, Finding]:
    """The first finding of each check."""
    found: dict[str, Finding] = {}
    for each in judge_run(collect_evidence(out)):
        found.setdefault(each.check, each)
    return found


# Real runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("narrow")
def test_a_finished_run_and_one_that_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    execute(ddp.train, tmp_path / "run", 2, *SHORT, "checkpoint.every=2")
    found = read(tmp_path / "run")
    of_the_machine = {"speed", "slowest", "data"}  # which other work may slow down
    assert {each.verdict for name, each in found.items() if name not in of_the_machine} == {"ok"}, found
    assert found["end"].figure.startswith("finished at step 4, accuracy ")
    assert found["steps"].figure.startswith("rank 0 logged step 4 last")
    assert found["checkpoints"].figure.startswith("step-00000004 is intact")
    assert run_main(doctor.train, [f"run={tmp_path / 'run'}"], monkeypatch) == 0
    said = " ".join(capfd.readouterr().out.split())  # a long path breaks the title
    assert "a run of recipes.ddp" in said
    assert "next: nothing to do; raise max_steps" in said
    report = json.loads((tmp_path / "run" / "postmortem.json").read_text())
    assert report["next"].startswith("nothing to do")
    ours, theirs = os.pipe()
    if not os.fork():  # somebody else holds the lock, which this process's own would not show
        os.close(theirs)
        lock = (tmp_path / "run" / ".lock").open("w")
        fcntl.lockf(lock, fcntl.LOCK_EX)
        (tmp_path / "held").touch()
        os.read(ours, 1)
        os._exit(0)
    wait_until((tmp_path / "held").exists)
    found = read(tmp_path / "run")
    os.close(theirs)
    assert found["end"].figure.startswith("it is running")


@pytest.mark.slow_except("kill")
@pytest.mark.parametrize(
    ("how", "words", "remedy"),
    [
        ("raise", "rank 1 (HOST): KeyError: 'the cause' at crash.py:LINE", "ranks/"),
        ("kill", "rank 1 (HOST) left no error message in step 2 (training), and rank 0 (HOST) waited for it", "dmesg"),
    ],
)
def test_a_run_that_died_is_read(how: str, words: str, remedy: str, tmp_path: Path) -> None:
    (tmp_path / "crash.py").write_text(CRASHING)
    options = ["global_batch_size=24", "log_every=1", "checkpoint.every=1", "checkpoint.asynchronous=false", "out=run"]
    done = command("crash.py", *options, cwd=tmp_path, HOW=how)
    assert done.returncode
    found = read(tmp_path / "run")
    assert found["end"].verdict == found["error"].verdict == "fails"
    host = json.loads((tmp_path / "run" / "environment.json").read_text())["hosts"][0]
    line = str(1 + CRASHING.splitlines().index('                raise KeyError("the cause")'))
    assert found["error"].figure == words.replace("HOST", host).replace("LINE", line)
    assert remedy in found["error"].remedy
    assert "step-00000001 is intact" in found["checkpoints"].figure
    done = command("-m", "recipes.doctor", "run=run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "resumes at step 1" in done.stdout


# Made up -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """What four ranks on two hosts leave when they are gone at step 40, without a word."""
    (tmp_path / "ranks").mkdir()
    config = compose_config(ddp.train, "optim.lr=0.3", "max_steps=50")
    (tmp_path / "config.yaml").write_text(f"# recipe: ddp\n{to_yaml(config)}")
    (tmp_path / "environment.json").write_text(json.dumps({"hosts": ["node1", "node1", "node2", "node2"]}))
    lines = [
        {"step": step, "loss": 2 / step, "images_per_second": 100.0, "peak_memory_bytes": 2**30}
        for step in range(1, 41)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 4')
    for rank in range(4):
        begun = "11:00:00 ddp: 4 ranks on 2 hosts · cpu · gloo · fp32 · 1 thread per rank\n"
        before = (
            f"{begun}11:01:00 step 38/50  epoch 1  loss 0.1\nTraceback (most recent call last):\nOldError: before\n"
        )
        now = f"{begun}11:02:00 step 40/50  epoch 1  loss 0.1\n"
        (tmp_path / "ranks" / f"{rank}.log").write_text(before + now)
    return tmp_path


def say(out: Path, rank: int, *lines: str) -> None:
    with (out / "ranks" / f"{rank}.log").open("a") as log:
        log.write("".join(f"{line}\n" for line in lines))


TRACE = ["Traceback (most recent call last):", '  File "/a/site-packages/torch/x.py", line 3, in f', "    g()"]


def test_a_run_that_vanished(out: Path) -> None:
    found = read(out)
    assert found["end"].figure.startswith("ended without an error message")
    assert "error" not in found, "what an earlier start said is over"
    assert found["steps"].figure == "rank 0 logged step 40 last; in their logs rank 1 40, rank 2 40, rank 3 40"
    assert found["speed"].figure == "100 images/s (median of 40 logged lines)"
    assert found["loss"].figure == "2 in step 1, 0.05 in step 40"
    assert found["checkpoints"] == Finding(
        "checkpoints", "warning", "none", "set checkpoint.every, or checkpoint.minutes"
    )


def test_what_earlier_attempts_said_is_told(out: Path) -> None:
    agreed = f"Traceback\n\n{VERDICT_MARK}rank 1 (node1) ended without an error message in step 3 (training)\n  rank 0: step 3\n"
    stacks = {
        "0.stack.1": agreed,
        "2.stack.1": agreed,
        "1.stack.1": "Fatal Python error: Segmentation fault\n\nCurrent thread 0x1 (most recent call first):\n"
        '  File "/home/me/mine.py", line 7 in f\n',
        "0.stack.2": "Traceback (most recent call last):\nRuntimeError: Timed out waiting 300000ms\n\nThread 0x2\n",
    }
    for number, (name, text) in enumerate(stacks.items()):
        (out / "ranks" / name).write_text(text)
        os.utime(out / "ranks" / name, (1000 + number, 1000 + number))
    told = [each for each in judge_run(collect_evidence(out)) if each.check == "earlier"]
    assert [each.remedy for each in told] == [
        "ranks/0.stack.1, 2.stack.1 have the stacks",
        "ranks/1.stack.1 has the stacks",
        "ranks/0.stack.2 has the stacks",
    ]
    assert told[0].figure.endswith(": rank 1 (node1) ended without an error message in step 3 (training)")
    assert told[1].figure.endswith(": rank 1 (node1): crashed at mine.py:7, Segmentation fault")
    assert told[2].figure.endswith(": rank 0 (node1): RuntimeError: Timed out waiting 300000ms")


def test_the_first_cause_is_not_the_rank_that_only_lost_another_one(out: Path) -> None:
    (out / "result.json").write_text('{"status": "failed"}')
    lost = "RuntimeError: [../gloo/pair.cc:525] Connection closed by peer [10.0.0.2]:4711"
    say(out, 0, *TRACE, lost)
    say(out, 3, *TRACE, lost)
    os.utime(out / "ranks" / "0.log", (1, 1))
    found = read(out)
    assert (
        found["error"].figure
        == "ranks 1 (node1), 2 (node2) left no error message, and ranks 0 (node1), 3 (node2) waited for them"
    )
    say(
        out,
        2,
        *TRACE,
        '  File "/home/me/train.py", line 47, in <module>',
        "OSError: [Errno 28] No space left on device",
    )
    found = read(out)
    assert found["error"].figure == "rank 2 (node2): OSError: [Errno 28] No space left on device at train.py:47"
    assert "make room" in found["error"].remedy


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "recipes.doctor memory"),
        ("error: gradients.stop_on_nan: in step 31, the output of fc is not finite", "gradients.clip_norm"),
        ("RuntimeError: Timed out waiting 300000ms for recv operation to complete", "compare the ranks' steps"),
        ("error: ranks 1, 3 of 4 did not join within timeout_seconds=300", "the host that is named"),
        ("error: MASTER_ADDR=a MASTER_PORT=29500: the port is in use on a", "MASTER_PORT"),
        ("torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered", "leave that host out"),
        ("ValueError: something else", "ranks/"),
    ],
)
def test_an_error_has_its_remedy(error: str, remedy: str, out: Path) -> None:
    (out / "result.json").write_text('{"status": "failed"}')
    say(out, 1, *([] if error.startswith("error: ") else TRACE), error)
    found = read(out)["error"]
    assert found.figure == f"rank 1 (node1): {error.removeprefix('error: ')}"
    assert remedy in found.remedy


def test_heartbeats_say_which_rank_is_behind(out: Path) -> None:
    for rank, step in enumerate([41, 41, 40, 41]):
        beat = {
            "rank": rank,
            "host": f"node{rank // 2 + 1}",
            "step": step,
            "phase": "training" if step > 40 else "saving",
        }
        (out / "ranks" / f"{rank}.heartbeats").write_text(json.dumps(beat).ljust(200) + "\n")
    found = read(out)["steps"]
    assert found.verdict == "warning"
    assert found.figure == (
        "ranks 0 (node1), 1 (node1), 3 (node2) in step 41 (training); rank 2 (node2) in step 40 (saving)"
    )
    assert "rank 2 (node2)" in found.remedy


def test_heartbeats_say_who_is_slow_and_who_waits_for_data(out: Path) -> None:
    for rank, (busy, waited) in enumerate([(10.0, 0.1), (10.2, 0.2), (16.0, 0.0), (9.9, 6.0)]):
        beat = {"rank": rank, "host": "h", "step": 40, "phase": "training", "busy": busy, "taken": 40}
        beat["spent"] = {"training": 20 - waited, "waiting for data": waited}
        (out / "ranks" / f"{rank}.heartbeats").write_text(json.dumps(beat))
    found = read(out)
    assert found["slowest"].figure == "rank 2 (h) computed for 400 ms per step, 58% more than the ranks' median"
    assert found["data"].figure == "rank 3 (h) waited longest for data: 30% of its steps' time, the ranks' median 1%"
    assert found["slowest"].verdict == found["data"].verdict == "warning"
    assert "data.workers" in found["data"].remedy
    (out / "ranks" / "2.heartbeats").write_text(json.dumps(beat | {"rank": 2, "busy": 10.4, "end": "ValueError: why"}))
    (out / "result.json").write_text('{"status": "failed"}')
    found = read(out)
    assert found["slowest"].verdict == "ok"
    assert found["error"].figure == "rank 2 (h): ValueError: why"


def trained(world: World, config: str, out: str, how: str) -> None:
    """Train with heartbeats, and a rank 1 that computes 50 ms more in each step, or whose images come 20 ms later."""
    Heartbeat._delayed = lambda self: 0.0  # type: ignore[method-assign]  # what others do on this machine is not the question
    world = replace(world, heartbeat=Heartbeat(Path(out) / "ranks", world.rank))
    if world.rank == 1 and how == "slow":
        loss = Images.loss

        def burning(*given: Any) -> Any:
            until = time.process_time() + 0.05
            while time.process_time() < until:
                pass
            return loss(*given)

        Images.loss = burning  # type: ignore[method-assign]
    if world.rank == 1 and how == "data":
        fetch = Samples.__getitem__
        Samples.__getitem__ = lambda *given: (time.sleep(0.02), fetch(*given))[1]  # type: ignore[method-assign]
    ddp.train(Run("ddp", read_config(ddp.train, config), world, Path(out)))
    world.heartbeat.close()


@pytest.mark.slow_except("slow")
@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("how", ["slow", pytest.param("data", marks=pytest.mark.soak)])  # on a quiet machine
def test_real_heartbeats_name_the_slow_rank(how: str, tmp_path: Path) -> None:
    config = compose_config(ddp.train, f"out={tmp_path / 'run'}", *SHORT, "max_steps=20")
    validate(config, ddp.train, 2)
    run_ranks(trained, 2, to_yaml(config), str(freeze(config, "ddp")), how)
    found = read(tmp_path / "run")
    check = {"slow": "slowest", "data": "data"}[how]
    assert found[check].verdict == "warning", found
    assert found[check].figure.startswith("rank 1 ("), found
    beat = read_heartbeat(tmp_path / "run" / "ranks", 1)
    assert beat["spent"]["waiting for data" if how == "data" else "training"] > 20 * 0.02
    assert found["steps"].figure.count("step 20") == 1
    mine, theirs = result(tmp_path / "run")["data_wait_share_by_rank"]
    said = (tmp_path / "run" / "ranks" / "0.log").read_text()
    if how == "data":
        assert theirs > max(mine, DATA_WAIT_SHARE)
        assert f"rank 1 waited for data for {theirs:.0%} of its steps' time: each rank prepares its own" in said


def metrics(out: Path, **columns: Any) -> None:
    lines = [{"step": step + 1} | {name: each(step) for name, each in columns.items()} for step in range(40)]
    (out / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def test_slow_growing_and_broken_trainings_are_seen_in_their_curves(out: Path) -> None:
    metrics(out, images_per_second=lambda step: 100 if step < 30 else 40)
    assert "40 in the last quarter, 100 before" in read(out)["speed"].figure
    metrics(out, peak_memory_bytes=lambda step: 2**30 + step * 2**26, images_per_second=lambda step: 100)
    found = read(out)
    assert (found["memory"].verdict, found["speed"].verdict) == ("warning", "ok")
    assert "1,664 MiB early, 3,520 in the end" in found["memory"].figure
    metrics(out, loss=lambda step: float("nan") if step >= 20 else 1.0)
    assert (read(out)["loss"].verdict, read(out)["loss"].figure) == ("fails", "not finite from step 21 on")
    (out / "result.json").write_text('{"status": "finished", "step_seconds_p50": 0.1, "step_seconds_p95": 0.9}')
    metrics(out, sequences_per_second=lambda step: 100, tokens_per_second=lambda step: 6400)
    assert "100 sequences/s" in read(out)["speed"].figure
    assert "a step takes 100 ms, one in twenty more than 900" in read(out)["speed"].figure
    (out / "out_of_memory.json").write_text('{"rank": 3, "step": 7}')
    (out / "result.json").write_text('{"status": "failed"}')
    assert read(out)["memory"].figure == "out of memory on rank 3 in step 7"


@pytest.mark.usefixtures("narrow")
def test_damaged_and_unfinished_checkpoints_are_named(tmp_path: Path) -> None:
    execute(ddp.train, tmp_path / "run", 1, *SHORT, "checkpoint.every=2")
    folder = tmp_path / "run" / "checkpoints"
    (tmp_path / "run" / "result.json").unlink()
    (folder / ".writing-step-00000006").mkdir()
    tensors = next((folder / "step-00000004").glob("*.distcp"))
    tensors.write_bytes(tensors.read_bytes()[:-1])
    found = read(tmp_path / "run")["checkpoints"]
    assert found.verdict == "warning"
    for words in (
        "step-00000002 is intact",
        "1 save was under way",
        "2 steps will be repeated",
        "step-00000004: __0_0.distcp has",
    ):
        assert words in found.figure
    (folder / "step-00000002" / "manifest.json").unlink()
    assert read(tmp_path / "run")["checkpoints"].figure.startswith("none is intact: ")


def test_a_job_s_log_is_quoted(out: Path) -> None:
    (out / "result.json").write_text('{"status": "failed"}')
    (out / "slurm" / "1").mkdir(parents=True)
    log = out / "slurm" / "1" / "7_0_log.out"
    log.write_text("hello\nslurmstepd: error: Detected 1 oom_kill event in StepId=7.0.\nbye\n")
    assert read(out)["job"].figure.endswith("7_0_log.out: slurmstepd: error: Detected 1 oom_kill event in StepId=7.0.")


def test_a_tool_ends_with_its_report(out: Path) -> None:
    (out / "metrics.jsonl").unlink()
    config = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(config.replace("# recipe: ddp", "# recipe: doctor"))
    assert read(out)["end"].verdict == "fails"
    (out / "preflight.json").write_text("{}")
    assert {each.verdict for each in read(out).values()} == {"ok"}
    (out / "result.json").write_text('{"status": "failed"}')
    assert (read(out)["end"].verdict, read(out)["end"].remedy) == ("warning", "read preflight.json")
    os.utime(out / "preflight.json", (1, 1))
    assert read(out)["end"].verdict == "fails", "an earlier start's report"


def test_an_error_is_found_in_a_log() -> None:
    assert error_in(["x", "error: global_batch_size=3: …"]) == ("global_batch_size=3: …", "")
    assert error_in([*TRACE, '  File "/b/mine.py", line 9', "    h()", "    ^^^", "E: what", "more"]) == (
        "E: what",
        "mine.py:9",
    )
    assert error_in(["all is well"]) == ("", "")


def test_the_way_to_go_on_is_the_command(out: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    assert run_main(doctor.train, [f"run={out}"], monkeypatch) == 0
    report = json.loads((out / "postmortem.json").read_text())
    assert report["next"] == f"python -m recipes.ddp optim.lr=0.3 max_steps=50 out={out}    starts again at step 0"
    assert f"next: {report['next']}\n" in capfd.readouterr().out
    (out / "config.yaml").write_text((out / "config.yaml").read_text().replace("max_steps", "most_steps"))
    assert run_main(doctor.train, [f"run={out}"], monkeypatch) == 0, "of another version's config the rest is said"
    assert "the command that started it" in json.loads((out / "postmortem.json").read_text())["next"]
    own = compose_config(fsdp.train, "replicate=2", "max_steps=50")
    (out / "config.yaml").write_text(f"# recipe: fsdp\n{to_yaml(own)}")
    assert run_main(doctor.train, [f"run={out}"], monkeypatch) == 0
    assert "recipes.fsdp max_steps=50 replicate=2" in json.loads((out / "postmortem.json").read_text())["next"]
    own_task = to_yaml(compose_config(ddp.train, f"task={ROOT / 'examples' / 'tabular.py'}:Diabetes", "task.hidden=8"))
    for text, words in (
        (own_task, "task.hidden=8 "),
        (own_task.replace("tabular.py", "gone.py"), "the command that started ddp, with out="),
    ):
        (out / "config.yaml").write_text(f"# recipe: ddp\n{text}")
        assert run_main(doctor.train, [f"run={out}"], monkeypatch) == 0
        assert words in json.loads((out / "postmortem.json").read_text())["next"]


def test_saves_that_failed_are_said(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"# recipe: ddp\n{to_yaml(compose_config(ddp.train))}")
    (tmp_path / "result.json").write_text(json.dumps({"status": "finished", "steps": 9, "checkpoints_failed": 6}))
    found = read(tmp_path)["checkpoints"]
    assert (found.verdict, found.figure) == ("warning", "none; 6 saves failed")


def test_what_is_no_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("ddp/one", "empty"):
        Path(folder).mkdir(parents=True)
    Path("ddp/one/config.yaml").write_text("# recipe: ddp\n")
    Path("other").mkdir()
    Path("other/config.yaml").write_text("a: 1\n")
    cases = {
        "run=nowhere": ["run=nowhere: no such folder", "outputs/ddp/"],
        "run=empty": ["run=empty: is not a run's folder", "config.yaml"],
        "run=ddp": ["run=ddp: is not a run's folder", "ddp/one"],
        "run=other": ["run=other", "not one that a run writes"],
        "run=ddp/one/config.yaml": ["no such folder"],
        "memory run=ddp/one": ["run=ddp/one", "leave check=memory out"],
        "run=ddp/one +cluster=slurm": ["run=ddp/one", "leave +cluster out"],
    }
    for words, parts in cases.items():
        assert run_main(doctor.train, words.split(), monkeypatch) == 2, words
        said = capfd.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1, said.err
        assert all(part in said.err for part in parts), said.err
    assert sorted(path.name for path in tmp_path.rglob("*.json")) == []


def test_ranks_do_not_read_a_run() -> None:
    with pytest.raises(UserError, match="run=x: is read by one process"):
        doctor.check(DoctorConfig(run="x"), 48)
