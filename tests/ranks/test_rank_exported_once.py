"""RANK exported once for all processes, in a script or by hand: each of them says so, at once, and nothing is made."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import HashStore

from lockstep.distributed.devices import compare_devices
from lockstep.distributed.environment import discover
from lockstep.distributed.rendezvous import Claims, check_in
from lockstep.distributed.store import wait_for_keys
from lockstep.distributed.twins import twins_here
from lockstep.errors import UserError
from tests.helpers.harness import ROOT, clean_environment
from tests.helpers.processes import free_port

SAYS = "RANK is exported once for all; let the launcher set it"
# What a rank does before anything else, without the seconds that a recipe takes to load. It leaves as a recipe does: an
# interpreter that ends while a thread of torch's waits for the store can be aborted.
COMES = """
import os, sys
from lockstep.distributed.environment import discover
from lockstep.distributed.rendezvous import check_in, open_store
place = discover(os.environ)
try:
    check_in(open_store(place, 120), place.rank, place.world_size, 120, served_by_rank_0=True)
except Exception as error:
    print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(1)
"""


def start_as(ranks: list[int], world_size: int, words: list[str], cwd: Path) -> tuple[list[int], list[tuple[int, str]]]:
    """Start a process as each of these ranks; return their numbers, and the exit code and stderr of each."""
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = clean_environment() | shared | {"PYTHONPATH": f"{ROOT}/src:{ROOT}"}
    started = [
        subprocess.Popen(
            [sys.executable, *words],
            cwd=cwd,
            env=environment | {"RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ranks
    ]
    said = [process.communicate(timeout=100)[1] for process in started]
    return [process.pid for process in started], [
        (process.returncode, text) for process, text in zip(started, said, strict=True)
    ]


@pytest.mark.slow
def test_two_processes_that_are_rank_0(tmp_path: Path) -> None:
    """As a user meets it; the wait for a rank that does not come would be 300 s."""
    pids, ends = start_as([0, 0], 2, ["-m", "recipes.ddp", "max_steps=1", f"out={tmp_path / 'run'}"], tmp_path)
    for code, text in ends:
        assert (code, text.count("\n")) == (2, 1), text
        assert text.startswith("error: 2 processes say that they are rank 0 ("), text
        assert all(f" pid {pid}" in text for pid in pids), text
        assert text.endswith(f"{SAYS}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ranks", [[1, 1], [0, 1, 1]], ids=["nobody is rank 0", "rank 0 waits for rank 2"])
@pytest.mark.slow
def test_two_processes_that_are_rank_1(ranks: list[int], tmp_path: Path) -> None:
    pids, ends = start_as(ranks, 3, ["-c", COMES], tmp_path)
    for code, text in ends:
        assert (code, text.count("\n")) == (1, 1), text
        assert text.startswith("error: 2 processes say that they are rank 1 ("), text
        assert all(f" pid {pid}" in text for pid in pids[-2:]), text
        assert text.endswith(f"{SAYS}\n")


@pytest.mark.slow_except("1")
@pytest.mark.parametrize("rank", [0, 1])
def test_on_several_hosts_they_meet_in_the_store(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names = iter("abc")
    monkeypatch.setattr("lockstep.distributed.rendezvous.named", lambda process: f"{next(names)} pid 7")
    store = HashStore()
    first = Claims(store, rank, 3)
    first.check()  # alone: nothing to say
    with ThreadPoolExecutor() as pool:
        second = pool.submit(check_in, store, rank, 3, 60, served_by_rank_0=True)
        found = rf"2 processes say that they are rank {rank} \(a pid 7, b pid 7\): {SAYS}"
        with pytest.raises(UserError, match=found):
            wait_for_keys(store, ["never"], 60, first.check)
        with pytest.raises(UserError, match=found):
            second.result()
        with pytest.raises(UserError, match=found):  # and all others, whichever rank they are
            check_in(store, 2, 3, 60, served_by_rank_0=True)


def test_one_that_comes_when_all_are_there_is_told_who_has_its_place() -> None:
    store = HashStore()
    with ThreadPoolExecutor() as pool:
        places = [pool.submit(check_in, store, rank, 2, 60, served_by_rank_0=True) for rank in (0, 1)]
        assert [place.result()[1][0] for place in places]
        for rank in (0, 1):
            with pytest.raises(UserError, match=rf"2 processes say that they are rank {rank} \(.* pid .*\): {SAYS}"):
                check_in(store, rank, 2, 60, served_by_rank_0=True)


def test_a_rank_that_was_ended_and_started_again_is_no_other() -> None:
    store = HashStore()
    Claims(store, 1, 2)  # ended while it waited: nobody looks for it any more
    with ThreadPoolExecutor() as pool:
        places = [pool.submit(check_in, store, rank, 2, 60, served_by_rank_0=True) for rank in (0, 1)]
        assert len({place.result()[1][0] for place in places}) == 1


def test_copies_and_workers_of_a_process_are_no_others(tmp_path: Path) -> None:
    """In /proc's words: 7 is this one, 8 its worker, 9 the other, 10 the other's worker; 11 came much later."""

    def process(number: int, parent: int, rank: int, start: int) -> None:
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "environ").write_bytes(f"HOME=/\0RANK={rank}\0WORLD_SIZE=4\0".encode())
        (folder / "cmdline").write_bytes(b"python\0-m\0recipes.ddp\0")
        fields = ["S", str(parent), *["0"] * 17, str(start), "0"]
        (folder / "stat").write_text(f"{number} (a) name) {' '.join(fields)}\n")
        (folder / "comm").write_text("python\n")

    for row in [(7, 1, 2, 100), (8, 7, 2, 150), (9, 1, 2, 120), (10, 9, 2, 180), (11, 1, 2, 10**6), (12, 1, 3, 100)]:
        process(*row)
    assert twins_here(7, tmp_path) == {9: "python"}
    assert twins_here(8, tmp_path) == {9: "python"}, "as one of its copies sees it"
    assert twins_here(12, tmp_path) == {}
    assert twins_here(13, tmp_path) == {}


def test_a_local_rank_for_all_is_named_where_they_share_a_gpu() -> None:
    one = {"device": "cuda", "backend": "nccl", "gpu": "GPU-7"}
    said = compare_devices([one | {"local_rank": "0"}, one | {"local_rank": "0"}], ["a", "a"], "auto")
    assert "each needs its own: all have LOCAL_RANK=0; let the launcher set it, or start no more ranks" in said
    assert "LOCAL_RANK" not in compare_devices([one | {"local_rank": each} for each in "01"], ["a", "a"], "auto")


def test_a_local_rank_that_is_no_number_is_refused() -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    with pytest.raises(UserError, match="LOCAL_RANK=one: allowed are whole numbers from 0 up"):
        discover(place | {"LOCAL_RANK": "one"})
