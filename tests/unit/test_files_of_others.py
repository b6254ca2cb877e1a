"""A run directory where others can write: it is its owner's alone, and no link of theirs leads a writer elsewhere."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockstep.config import own_files, run_directory
from lockstep.errors import UserError
from lockstep.loggers.jsonl import JsonLinesLogger
from lockstep.utils import files, temporary
from recipes import ddp
from tests.helpers.harness import compose_config

NOBODY = 65534
AS_ROOT = os.geteuid() == 0
OTHER = "nobody" if AS_ROOT else own_files.owner_of(Path.home())


@pytest.fixture
def everyones() -> Iterator[Path]:
    """A folder where everyone can write, as /tmp."""
    folder = Path(tempfile.mkdtemp(prefix="everyone-"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


def as_another(code: str, *words: Path) -> None:
    """Run Python as another user, where root lets us be one."""
    user = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if AS_ROOT else {}
    subprocess.run(["/usr/bin/env", "python3", "-c", code, *map(str, words)], check=True, cwd="/", **user)  # type: ignore[call-overload]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_run_directory_is_its_owner_s_alone_where_everyone_can_write(everyones: Path, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        private = run_directory.make_run_directory(str(everyones / "mine/run"), "ddp")
        (tmp_path / "shared").mkdir(0o775)
        usual = run_directory.make_run_directory(str(tmp_path / "shared/a/run"), "ddp")
    finally:
        os.umask(before)
    assert mode(everyones / "mine") == 0o700, "nobody can come below it"
    assert [mode(path) for path in (usual.parent, usual, usual / "ranks")] == [0o755] * 3, "as the umask says"
    if AS_ROOT:
        with pytest.raises(subprocess.CalledProcessError):
            as_another("import os, sys; os.symlink('/etc/passwd', sys.argv[1])", private / "metrics.jsonl")


def plant(link: Path, target: Path) -> None:
    as_another("import os, sys; os.symlink(sys.argv[1], sys.argv[2])", target, link)


def test_nothing_is_written_through_a_planted_link(everyones: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text('{"step": 0}\n')
    out = everyones / "run"
    for folder in (out, out / "ranks"):
        folder.mkdir()
        folder.chmod(0o777)  # as an older version may have made it
    plant(everyones / ".lock", victim)
    for name in (
        ".lock",
        "metrics.jsonl",
        "ranks/0.log",
        "histograms.jsonl",
        "metrics.csv",
        f".config.yaml.{os.getpid()}",
    ):
        plant(out / name, victim)
    said = rf"is a link to {victim} that {OTHER} has made, and a run writes through none; remove it, or name another"
    with pytest.raises(UserError, match=rf"{out}/\.lock: {said}"):
        run_directory.lock(out)
    with pytest.raises(UserError, match=rf"{everyones}/\.lock: {said}"):  # where the kernel is in the way as well
        run_directory.lock(everyones)
    for write in (
        lambda: own_files.open_own(out / "ranks/0.log", "a"),
        lambda: own_files.descriptor_of(out / "ranks/0.log", os.O_RDWR | os.O_CREAT),
    ):
        with pytest.raises(UserError, match=said):
            write()
    files.append(out / "ranks/0.log", "a last word")
    files.write_atomically(out / "config.yaml", "ours")
    assert (out / "config.yaml").read_text() == "ours"
    assert not (out / "config.yaml").is_symlink()
    JsonLinesLogger(out, 0).log({"step": 1})
    assert not (out / "metrics.jsonl").is_symlink(), "what was there to be kept is written anew"
    assert victim.read_text() == '{"step": 0}\n'


def test_a_run_that_is_entered_again_has_no_links_of_others(everyones: Path, tmp_path: Path) -> None:
    config = compose_config(ddp.train, f"out={everyones / 'run'}")
    out = run_directory.freeze(config, "ddp")
    assert out
    (tmp_path / "scratch").mkdir()
    (out / "checkpoints").symlink_to(tmp_path / "scratch")  # one's own may be there: checkpoints on another disk
    assert run_directory.freeze(config, "ddp") == out
    (out / "checkpoints").unlink()
    if AS_ROOT:
        for folder in (everyones / "run", out):  # as an older version has made it
            folder.chmod(0o777)
        for link in (out / "checkpoints", out / "ranks" / "1.log"):
            link.parent.chmod(0o777)
            plant(link, tmp_path / "scratch")
            with pytest.raises(UserError, match=rf"{link}: is a link to {tmp_path}/scratch that nobody has made"):
                run_directory.freeze(config, "ddp")
            link.unlink()
    assert run_directory.freeze(config, "ddp") == out


def test_another_s_compile_cache_is_not_used(
    everyones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(everyones))
    monkeypatch.setenv("USER", "me")
    monkeypatch.setenv("LOGNAME", "me")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    usual, own = everyones / "torchinductor_me", tmp_path / ".cache/lockstep/torchinductor"
    temporary.own_compile_cache()
    assert (mode(usual), os.environ.get("TORCHINDUCTOR_CACHE_DIR")) == (0o700, None), "made before somebody else can"
    temporary.own_compile_cache()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ, "one's own is found again"
    assert capfd.readouterr().err == ""
    usual.rmdir()
    as_another("import os, sys; os.mkdir(sys.argv[1]); os.chmod(sys.argv[1], 0o777)", usual)
    temporary.own_compile_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(own)
    assert mode(own) == 0o700
    assert capfd.readouterr().err == f"{usual} is writable by others: torch.compile keeps its code in {own}\n"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/where/I/want")
    temporary.own_compile_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/where/I/want"


def test_what_slurm_s_job_unpickles_lies_where_nobody_else_can_write(everyones: Path) -> None:
    from lockstep.launchers.slurm import new_folder

    before = os.umask(0o000)
    try:
        folder = new_folder(everyones / "slurm")
    finally:
        os.umask(before)
    assert mode(folder) == 0o700
    assert new_folder(everyones / "slurm").name == "2"
