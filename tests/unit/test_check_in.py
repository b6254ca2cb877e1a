"""Check-in: rounds of ranks that are dead, one that comes twice, a thousand that are missing."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from lockstep.distributed.rendezvous import check_in, describe_ranks, pack
from lockstep.distributed.store import absent_keys, await_everyone, get_many
from lockstep.errors import UserError


@pytest.fixture
def store() -> dist.Store:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))


def come(store: dist.Store, rank: int, size: int = 3, seconds: float = 60) -> tuple[list[str], list[str]]:
    return check_in(store.clone(), rank, size, seconds, f"note of {rank}")[1:]


def test_all_get_the_hosts_and_rank_0_the_notes(store: dist.Store) -> None:
    with ThreadPoolExecutor(3) as ranks:
        first, *others = ranks.map(lambda rank: come(store, rank), range(3))
    assert first[1] == [f"note of {rank}" for rank in range(3)]
    assert all((hosts, notes) == (first[0], []) for hosts, notes in others)
    assert len(first[0]) == 3


@pytest.mark.parametrize("answered", [True, False])
def test_a_round_of_dead_ranks_leads_on_to_the_next(answered: bool, store: dist.Store) -> None:
    """As under an agent, whose store outlives the ranks that it restarts."""
    old = dist.PrefixStore("old", store)
    store.set("round", "old")
    for rank in range(3):
        old.set(str(rank), json.dumps([old.add("come", 1), "dead", ""]))
    if answered:
        old.set("answer", pack({"come": 3, "missing": [], "hosts": [["dead", 3]]}))
    there = threading.Barrier(2)

    def early(rank: int) -> list[str]:
        there.wait()
        return come(store, rank)[0]

    with ThreadPoolExecutor(3) as ranks:
        waiting = [ranks.submit(early, rank) for rank in (1,)]
        there.wait()
        # It is in the old round, and in no other, before rank 0 comes.
        while old.add("come", 0) < 4:
            pass
        hosts = ranks.submit(come, store, 0)
        last = ranks.submit(come, store, 2)
        assert waiting[0].result()[0:3] == hosts.result()[0] == last.result()[0]
    assert "dead" not in hosts.result()[0]


def test_the_missing_one_is_named_and_a_crowd_is_summed_up(store: dist.Store) -> None:
    with ThreadPoolExecutor(2) as ranks:
        ends = [ranks.submit(come, store, rank, 3, 1.0) for rank in (0, 2)]
        for end in ends:
            with pytest.raises(UserError, match=r"^rank 1 of 3 did not join within timeout_seconds=1: start it"):
                end.result()
    nodes = [f"node{rank // 8}" for rank in range(1000)]
    assert describe_ranks([7, 9], nodes) == "ranks 7 (node0), 9 (node1)"
    assert describe_ranks(list(range(1000)), nodes).endswith("7 (node0), … (1000 ranks on 125 hosts)")
    assert describe_ranks(list(range(1000)), ()) == "ranks 0, 1, 2, 3, 4, 5, 6, 7, … (1000 ranks)"


def test_absent_keys_are_found_by_halves(store: dist.Store) -> None:
    keys = [str(number) for number in range(2500)]
    for key in keys:
        if key not in ("0", "613", "2499"):
            store.set(key, f"of {key}")
    assert absent_keys(store, keys) == ["0", "613", "2499"]
    assert absent_keys(store, []) == []
    there = [key for key in keys if key not in ("0", "613", "2499")]
    assert get_many(store, there) == [f"of {key}".encode() for key in there]


def test_ranks_that_have_finished_leave_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first waits for the last; for one that never comes, a moment only."""
    store, gone = dist.HashStore(), []

    def finish(rank: int) -> None:
        for _ in range(2):  # two runs of one name, as of a trial that is taken again
            await_everyone(store, "finished", 3)
            gone.append(rank)

    ranks = [threading.Thread(target=finish, args=(rank,)) for rank in range(3)]
    for rank in ranks[:2]:
        rank.start()
    time.sleep(0.1)
    assert gone == []
    ranks[2].start()
    for rank in ranks:
        rank.join(30)
    assert sorted(gone[:3]) == [0, 1, 2]
    assert len(gone) == 6
    monkeypatch.setattr("lockstep.distributed.store.BRIEFLY_SECONDS", 0.05)
    await_everyone(store, "alone", 3)
