"""Heartbeats in a host's memory: who sees them, what a killed rank leaves, and who brings it to the run and removes it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lockstep.diagnose.evidence import rank_records
from lockstep.distributed import heartbeat as beats
from lockstep.distributed import host_logs, host_memory
from lockstep.distributed.heartbeat import Heartbeat
from lockstep.distributed.host_memory import FINISHED, collect, folders, read_heartbeat, read_heartbeats
from lockstep.utils import temporary
from tests.helpers.processes import wait_until


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    left = [folder for ranks in tmp_path.iterdir() for folder in folders(ranks) if folder.exists()]
    assert not left


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    folder = tmp_path / "ranks"
    folder.mkdir()
    return folder


def on(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: host)


def killed(ranks: Path, rank: int, say: Callable[[Heartbeat], None] = lambda heartbeat: None) -> None:
    """Be a rank in a process of its own, and end by SIGKILL."""

    def live() -> None:
        heartbeat = Heartbeat(ranks, rank)
        heartbeat.enter("training", 7)
        say(heartbeat)
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=live)
    process.start()
    process.join()


def test_a_change_of_phase_writes_to_memory_alone(ranks: Path) -> None:
    first, second = Heartbeat(ranks, 0), Heartbeat(ranks, 1)
    before = (ranks / "0.heartbeats").read_text()
    first.enter("training", 3)
    assert (ranks / "0.heartbeats").read_text() == before
    assert [path.name for path in ranks.iterdir()] == ["0.heartbeats"]
    assert [beat["step"] for beat in read_heartbeats(ranks).values()] == [3, 0]
    (folder,) = (each for each in folders(ranks) if each.exists())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    first.close()
    assert folder.exists(), "another rank is there"
    second.close()
    assert not folder.exists()
    assert [json.loads(line)["step"] for line in (ranks / "0.heartbeats").read_text().splitlines()] == [3, 0]


def test_a_host_has_one_summary_whichever_rank_comes_first(ranks: Path) -> None:
    late, first = Heartbeat(ranks, 3), Heartbeat(ranks, 2)
    assert [path.name for path in ranks.iterdir()] == ["2.heartbeats"]
    late.close()
    first.close()
    assert [path.name for path in ranks.iterdir()] == ["2.heartbeats"]


def test_another_host_sees_the_summary(ranks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beats, "SUMMARY_SECONDS", 0.05)
    on("node1", monkeypatch)
    heartbeat = Heartbeat(ranks, 4)
    heartbeat.enter("training", 9)
    on("node2", monkeypatch)
    wait_until(lambda: read_heartbeat(ranks, 4).get("step") == 9, 30)
    assert not [folder for folder in folders(ranks) if folder.exists()], "its memory is not node2's"
    monkeypatch.setattr(beats, "SUMMARY_SECONDS", 1000.0)
    heartbeat.update(end="KeyError: 'why'")
    assert read_heartbeat(ranks, 4)["end"] == "KeyError: 'why'", "said at once"
    assert read_heartbeat(ranks, 5) == {"rank": 5}
    heartbeat.close()


def test_what_a_rank_wrote_last_is_taken_where_it_has_moved(ranks: Path) -> None:
    for first, lines in {0: [(0, 5.0), (1, 3.0)], 1: [(1, 4.0)], 2: [(2, 1.0)]}.items():
        text = "".join(json.dumps({"rank": rank, "at": at}) + "\n" for rank, at in lines)
        (ranks / f"{first}.heartbeats").write_text(text + '{"rank": 9, "at"')  # and one that was cut short
    assert [(rank, beat["at"]) for rank, beat in read_heartbeats(ranks).items()] == [(0, 5.0), (1, 4.0), (2, 1.0)]


def test_of_a_killed_rank_the_last_line_is_kept(ranks: Path) -> None:
    killed(ranks, 1)
    assert read_heartbeat(ranks, 1)["step"] == 7, "in memory"
    assert '"step": 0' in (ranks / "1.heartbeats").read_text()
    collect(ranks)
    assert '"step": 7' in (ranks / "1.heartbeats").read_text()
    assert not folders(ranks)[0].exists()
    assert read_heartbeat(ranks, 1)["step"] == 7, "as the launcher brought it"


def test_the_next_start_on_the_host_brings_it_too(ranks: Path, tmp_path: Path) -> None:
    """One that lives is left alone, and so is the memory of a run whose folder is gone, but for its removal."""
    for name in ("living", "deleted", "next"):
        (tmp_path / name).mkdir()
    living = Heartbeat(tmp_path / "living", 0)
    killed(ranks, 0)
    killed(tmp_path / "deleted", 0)
    (lost,) = (each for each in folders(tmp_path / "deleted") if each.exists())
    for path in (tmp_path / "deleted").iterdir():
        path.unlink()
    (tmp_path / "deleted").rmdir()
    following = Heartbeat(tmp_path / "next", 0)
    assert '"step": 7' in (ranks / "0.heartbeats").read_text()
    assert not folders(ranks)[0].exists()
    assert not lost.exists()
    assert folders(tmp_path / "living")[0].exists()
    living.close()
    following.close()


def test_ranks_of_the_next_attempt_do_not_find_the_end_of_the_last(ranks: Path) -> None:
    killed(ranks, 0, lambda heartbeat: heartbeat.update(end="KeyError: 'why'", asked=True))
    assert read_heartbeat(ranks, 0)["end"]
    heartbeat = Heartbeat(ranks, 0)
    assert "end" not in json.loads((ranks / "0.heartbeats").read_text())
    assert "end" not in read_heartbeat(ranks, 0)
    heartbeat.close()


@pytest.mark.parametrize("why", ["not there", "full", "another's"])
def test_without_shared_memory_the_folder_for_temporary_files_is_taken(
    why: str, ranks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    monkeypatch.setattr(host_memory, "SHARED_MEMORY", str(shared))
    if why != "not there":
        shared.mkdir()
    if why == "another's":
        folders(ranks)[0].mkdir()
        folders(ranks)[0].chmod(0o777)
    if why == "full":
        write = os.pwrite

        def without_room(file: int, data: bytes, offset: int) -> int:
            if os.readlink(f"/proc/self/fd/{file}").startswith(str(shared)):
                raise OSError(28, "No space left on device")
            return write(file, data, offset)

        monkeypatch.setattr(os, "pwrite", without_room)
    heartbeat = Heartbeat(ranks, 0)
    heartbeat.enter("training", 2)
    assert (folders(ranks)[1] / "0").is_file()
    assert read_heartbeat(ranks, 0)["step"] == 2
    heartbeat.close()
    if why != "not there":
        for path in shared.glob("*/*"):
            path.unlink()
        for path in shared.iterdir():
            path.rmdir()


def test_copies_of_a_rank_do_not_leave_in_its_place(ranks: Path) -> None:
    heartbeat = Heartbeat(ranks, 0)
    process = multiprocessing.get_context("fork").Process(target=heartbeat.close)
    process.start()
    process.join()
    assert process.exitcode == 0
    heartbeat.enter("training", 5)
    assert read_heartbeat(ranks, 0)["step"] == 5
    heartbeat.close()


def logged(ranks: Path, rank: int, words: str, end: str | None, hosts: tuple[str, ...] = ("a", "a", "a")) -> None:
    """Be a rank of logs=first in a process of its own; `end`: how it says that it ended, None: it is killed."""

    def live() -> None:
        log = host_logs.begin_log(ranks, rank, "first", list(hosts))
        heartbeat = Heartbeat(ranks, rank)
        with log.open("a") as stream:
            stream.write(words)
        if end is None:
            os.kill(os.getpid(), signal.SIGKILL)
        heartbeat.update(end=end)
        temporary.exit_at_once(0)

    process = multiprocessing.get_context("fork").Process(target=live)
    process.start()
    process.join()


@pytest.mark.parametrize(
    ("logs", "hosts", "kept"),
    [
        ("all", ["a"] * 2000, set()),
        ("auto", ["a"] * 64, set()),
        ("auto", ["a"] * 64 + ["b"] * 2, {*range(1, 64), 65}),
        ("first", ["a", "b", "b", "a"], {2, 3}),
    ],
)
def test_logs_stay_on_the_host_but_for_its_first_rank(logs: str, hosts: list[str], kept: set[int]) -> None:
    assert host_logs.kept_on_hosts(logs, hosts) == kept


def test_the_log_of_a_rank_that_finished_does_not_leave_its_host(ranks: Path) -> None:
    logged(ranks, 0, "first\n", FINISHED)
    logged(ranks, 1, "well\n", FINISHED)
    assert sorted(path.name for path in ranks.iterdir()) == ["0.heartbeats", "0.log", "1.heartbeats"]


def test_the_log_of_a_rank_that_failed_is_brought(ranks: Path) -> None:
    logged(ranks, 1, "before\n", "KeyError: 'why'")
    assert (ranks / "1.log").read_text() == "before\n"


def test_the_log_of_a_killed_rank_is_found_and_brought(ranks: Path) -> None:
    logged(ranks, 1, "before\n", None)
    assert not (ranks / "1.log").exists()
    assert host_logs.find_log(ranks, 1).read_text() == "before\n", "on its host"
    assert rank_records(ranks, ["a", "a"])[0]["log_modified"]
    temporary.sweep()
    collect(ranks)
    assert (ranks / "1.log").read_text() == "before\n"
    assert host_logs.find_log(ranks, 1) == ranks / "1.log"


def test_the_log_of_a_killed_attempt_is_brought_though_the_next_finishes(ranks: Path) -> None:
    living = Heartbeat(ranks, 0)  # the folder is in use all the time
    logged(ranks, 1, "killed\n", None)
    logged(ranks, 1, "finished\n", FINISHED)
    living.close()
    assert (ranks / "1.log").read_text() == "killed\n"


def test_last_words_bring_the_log_at_once(ranks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temporary, "_last_works", [])
    log = host_logs.begin_log(ranks, 1, "first", ["a", "a"])
    log.write_text("step 3\n")
    host_logs.end_log(ranks, 1, "KeyError: 'why'\n")
    assert (ranks / "1.log").read_text() == "step 3\nKeyError: 'why'\n"
    assert not log.exists()
    for work in temporary._last_works:
        work()
