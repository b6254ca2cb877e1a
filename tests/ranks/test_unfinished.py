"""A run without `out` that was killed: the same command says how to continue it, and resume=last does, bit by bit."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lockstep.config import run_directory
from lockstep.config.unfinished import offer_or_continue
from lockstep.errors import UserError
from lockstep.launch.validate import validate
from recipes import ddp
from tests.helpers.command_line import assert_one_line, run_main
from tests.helpers.harness import command, compose_config, execute, lines, result
from tests.helpers.processes import TORCHRUN, as_a_shell

WORDS = ("data=synthetic", "data.size=48", "data.image_size=8", "global_batch_size=12", "epochs=6", "log_every=1")
WORDS += ("threads=1",)  # 4 steps an epoch, 24 in all
QUICK = [sys.executable, "-m", "tests.helpers.quick", "recipes.ddp", *WORDS]
OFFER = re.compile(r"an unfinished run of these settings is at step (\d+) of 24: add resume=last\n")


def run_killed_at(step: int, folder: Path) -> Path:
    """The run directory of a command all of whose processes were killed after this step, at once."""
    process = as_a_shell([sys.executable, "-m", "tests.helpers.killed", str(step), "recipes.ddp", *WORDS], folder)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == -signal.SIGKILL, said
    assert "to resume" not in said
    (out,) = folder.glob("outputs/ddp/*")
    assert not (out / "result.json").exists()
    return out


def continued(words: list[str], folder: Path) -> str:
    """What a command says that is to end well."""
    done = command(*words[1:], cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr + done.stdout


@pytest.mark.slow_except("6")
@pytest.mark.soak_for("4", "12")
@pytest.mark.parametrize("step", [4, 6, 12, 23])
@pytest.mark.usefixtures("narrow")
def test_killed_by_default_it_is_continued_by_last_bit_by_bit(step: int, tmp_path: Path) -> None:
    """After the first epoch, within the second, after the third, before the last step; nothing was asked for beforehand."""
    (tmp_path / "place").mkdir()
    out = run_killed_at(step, tmp_path / "place")
    said = continued([*QUICK, "resume=last"], tmp_path / "place")
    assert re.search(r"resuming from outputs/ddp/\S+/checkpoints/step-\d+, at step \d+ of 24", said), said
    execute(ddp.train, tmp_path / "whole", 2, *WORDS)
    assert list((tmp_path / "place" / "outputs" / "ddp").iterdir()) == [out]
    assert result(out)["status"] == "finished"
    assert result(out)["resumed_from"] is not None
    assert lines(out) == lines(tmp_path / "whole")
    mine, whole = (torch.load(each / "model.pt", weights_only=True) for each in (out, tmp_path / "whole"))
    assert all(torch.equal(mine[name], whole[name]) for name in whole)


@pytest.mark.soak
def test_the_same_command_says_it_first_and_ranks_by_hand_do_alike(tmp_path: Path) -> None:
    """torchrun's ranks go where rank 0 finds the run, all of them."""
    out = run_killed_at(6, tmp_path)
    new = continued([*QUICK, "max_steps=24"], tmp_path)
    assert not OFFER.search(new), "it was to end at another step"
    new = continued(QUICK, tmp_path)
    assert OFFER.match(new), new
    assert max(map(len, new.splitlines()[:1])) <= 80
    by_hand = [*TORCHRUN, "--standalone", "--nproc-per-node=2", *QUICK[1:]]
    said = continued([*by_hand, "resume=last"], tmp_path)
    assert f"resuming from outputs/ddp/{out.name}/" in said
    assert result(out)["status"] == "finished"
    assert "resume: auto" in (out / "config.yaml").read_text()
    assert len(list((tmp_path / "outputs" / "ddp").iterdir())) == 3


def a_run(*words: str, step: int = 5, manifest: str = '{"last_step": 24}') -> Path:
    """The run directory in the default place that a run killed after its checkpoint leaves."""
    config = compose_config(ddp.train, *WORDS, *words)
    validate(config, ddp.train, 2)
    out = run_directory.freeze(config, "ddp")
    assert out is not None
    checkpoint = out / "checkpoints" / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text(manifest)
    return out


def offered(*words: str) -> str | None:
    """`out` as it is after the start of a command; what it says is on stderr."""
    config = compose_config(ddp.train, *WORDS, *words)
    validate(config, ddp.train, 2)
    offer_or_continue(config, "ddp")
    assert config.resume != "last"
    return config.out


def test_one_of_the_same_settings_is_offered_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    old, new = a_run(), a_run(step=7, manifest="{}")
    os.utime(old / "config.yaml", (1, 1))
    other = [a_run(*words) for words in (("seed=1",), ("max_steps=20",), ("data.workers=2",))]

    def said(*words: str) -> str:
        offered(*words)
        return capfd.readouterr().err

    assert (
        said()
        == said("device=cpu", "checkpoint.every=3")
        == "an unfinished run of these settings is at step 7: add resume=last\n"
    )
    assert offered("resume=last") == str(new)
    assert (
        said("resume=never") == said("optim.lr=0.1") == said("max_steps=24") == said(f"out={tmp_path / 'mine'}") == ""
    )
    assert offered("seed=1", "resume=last") == str(other[0])
    (new / "result.json").write_text('{"status": "preempted"}')
    assert "step 7:" in said()
    (new / "result.json").write_text('{"status": "finished"}')
    assert said() == "an unfinished run of these settings is at step 5 of 24: add resume=last\n"
    theirs = a_run(f"resume={new}")  # from another run's state: that one alone may continue it
    assert "step 5 of 24" in said()
    assert offered("resume=last") == str(old)
    assert (
        said(f"resume={new}")
        == f"an unfinished run of these settings is at step 5 of 24: add out=outputs/ddp/{theirs.name}\n"
    )


def test_one_that_runs_is_not_offered_and_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lockstep.config.unfinished.ENDING_SECONDS", 0)
    out = a_run()
    hold = "import sys; from pathlib import Path; from lockstep.config.run_directory import lock\n"
    hold += "kept = lock(Path(sys.argv[1])); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", hold, out], stdin=-1, stdout=-1, env=dict(os.environ)) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        offered()
        assert capfd.readouterr().err == ""
        with pytest.raises(UserError, match=r"^resume=last: outputs/ddp/\S+ is still running; wait for its end, or .*"):
            offered("resume=last")
        holder.communicate(b"")
    assert offered("resume=last") == str(out)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["resume=last"], ["resume=last: outputs/ddp has no unfinished run of these settings"]),
        (["resume=last", "out=x"], ["resume=last: ", "out=x", "leave one out"]),
        (["-m", "seed=1,2", "resume=last"], ["resume=last: ", "sweep", "out=FOLDER"]),
    ],
)
def test_without_one_it_is_refused_in_a_line(
    words: list[str],
    parts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_main(ddp.train, [*WORDS, *words], monkeypatch) == 2
    assert_one_line(capfd, parts)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"^resume=last: is for the command line"):
        ddp.train.run(resume="last")
