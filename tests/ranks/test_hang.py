"""A rank that sleeps, stops, dies or does something else than the others: one message says who, and all end."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import re
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from launchers import torchrun
from lockstep.config.run_directory import freeze
from lockstep.diagnose.stacks import LOCKSTEP, keep_stack, user_line
from lockstep.diagnose.verdict import explain_wait
from lockstep.diagnose.watchdog import Watchdog, WatchdogTimeout
from lockstep.distributed import environment, interfaces
from lockstep.distributed.heartbeat import Beat, Heartbeat
from lockstep.distributed.host_memory import FINISHED, LINE_BYTES, folders, read_heartbeat
from lockstep.launch.validate import validate
from tests.helpers import hanging
from tests.helpers.harness import compose_config, renew_threads
from tests.helpers.processes import free_port

HERE = socket.gethostname()
LIMIT = 6
WORDS = ("global_batch_size=24", "max_steps=6", "log_every=1", "model.image_size=8", "eval_batch_size=360")


@dataclass
class Ended:
    code: int
    said: str  # on stderr
    seconds: float
    ranks: Path


def begin(folder: Path, how: str, who: int, words: tuple[str, ...], start: Any) -> Any:
    """`start(out)`, in a process of its own, for a fresh run of the recipe; what it says goes to `said`."""
    config = compose_config(hanging.train, f"out={folder / 'run'}", f"timeout_seconds={LIMIT}", *WORDS, *words)
    validate(config, hanging.train, 2)
    out = freeze(config, hanging.train.name)
    assert out is not None

    def child() -> None:
        renew_threads()
        os.setsid()
        for number, name in ((1, "printed"), (2, "said")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        os.environ |= {"HOW": how, "WHO": str(who), "SAID": str(folder / "said"), environment.RUN_DIRECTORY: str(out)}
        code = start(out)
        sys.stderr.flush()
        (folder / "ended").write_text(str(time.time()))
        os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def launched(out: Path) -> int:
    variables = {environment.RUN_DIRECTORY: str(out), environment.LAUNCHER: str(os.getpid())}
    return torchrun.launch("tests.helpers.hanging", variables, nproc=2, start="fork")


def by_hand(out: Path) -> int:
    """Two ranks that no launcher holds together; rank 0 serves the store."""
    os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for number in ("0", "1"):
        os.environ["RANK"] = number
        ranks.append(multiprocessing.get_context("fork").Process(target=hanging.train.main))
        ranks[-1].start()
    for process in ranks:
        process.join(50)
    return max(process.exitcode or 0 for process in ranks)


WORKER = ("data.workers=1", "max_steps=30")
CASES: dict[str, tuple[tuple[str, ...], Any]] = {  # further words, how the ranks are started
    **dict.fromkeys(("sleep", "exit", "raise", "stop", "skip", "other", "group"), ((), launched)),
    **dict.fromkeys(("one step less", "one batch less", "shape", "slow everywhere"), ((), launched)),
    "disk": (("checkpoint.every=3",), launched),
    "worker dies": (WORKER, launched),
    "worker hangs": (WORKER, launched),
    "by hand: stop": ((), by_hand),
    "by hand: raise": ((), by_hand),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Of all cases, started together: most of the time each only waits."""
    began, running = time.time(), {}
    for case, (words, start) in CASES.items():
        folder, who = tmp_path_factory.mktemp("hang"), int(start is launched)
        running[case] = folder, begin(folder, case.removeprefix("by hand: "), who, words, start)
    return {case: ended(process, folder, began) for case, (folder, process) in running.items()}


def ended(process: Any, folder: Path, began: float) -> Ended:
    process.join(60)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    assert process.exitcode is not None, f"still running: {(folder / 'said').read_text()}"
    end = float((folder / "ended").read_text())
    said = re.sub(r"^\[rank\d\]:\[W.*\n", "", (folder / "said").read_text(), flags=re.MULTILINE)  # c10d's own log
    return Ended(process.exitcode, said, end - began, folder / "run" / "ranks")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (
            "sleep",
            f"error: rank 1 ({HERE}) has not reached all_reduce no. # of [490], in which rank 0 ({HERE}) waited for "
            f"timeout_seconds={LIMIT}\n"
            f"  rank 0 ({HERE}): step 3, training, loss.backward() (hanging.py:#), last collective all_reduce no. # of "
            "[490]\n"
            f"  rank 1 ({HERE}): step 3, training, time.sleep(600) (hanging.py:#), last collective all_reduce no. # of "
            "…\n"
            "stack traces: ranks/0.stack, 1.stack\n",
        ),
        (
            "exit",
            f"error: rank 1 ({HERE}) ended without an error message in step 3 (training)\n"
            f"  rank 0 ({HERE}): step 3, training, loss.backward() (hanging.py:#), last collective all_reduce no. # of "
            "[490]\n"
            f"  rank 1 ({HERE}): step 3, training, gone\n"
            "stack traces: ranks/0.stack\n",
        ),
        (
            "stop",
            f"error: rank 1 ({HERE}) is stopped in step 3 (training): by SIGSTOP, Ctrl-Z or a debugger\n",
        ),
        (
            "skip",
            f"rank 1 was killed by SIGABRT on {HERE} in step # (…); its last words are in ranks/1.log\n"
            f"  rank 0 ({HERE}): step 3, training, loss.backward() (hanging.py:#), last collective all_reduce no. # of "
            "[490]\n"
            f"  rank 1 ({HERE}): step #, … (hanging.py:#), in a collective of another size than the others'\n",
        ),
        (
            "other",
            f"error: the ranks are in different collectives (timeout_seconds={LIMIT}): rank 0 ({HERE}) in all_reduce "
            f"no. # of [490], rank 1 ({HERE}) in broadcast no. # of [500]\n",
        ),
        ("group", f"error: rank 0 ({HERE}) waited too long for ranks that are elsewhere (timeout_seconds={LIMIT})\n"),
        (
            "one step less",
            f"error: rank 1 ({HERE}) has 5 steps to take, and rank 0 ({HERE}) has 6; data=",
        ),
        ("one batch less", f"rank 1 failed on {HERE} in step 6 (waiting for data)\nTraceback"),
        ("shape", f"rank 1 failed on {HERE} in step 0 (starting)\nTraceback"),
        ("raise", f"rank 1 failed on {HERE} in step 3 (training)\nTraceback"),
        ("worker dies", f"rank 1 failed on {HERE} in step # (…)\nTraceback"),
        ("worker hangs", f"error: rank 1 ({HERE})"),
        (
            "disk",
            f"error: rank 1 ({HERE}) has not reached all_gather no. # of [1], in which rank 0 ({HERE}) waited for "
            f"timeout_seconds={LIMIT}\n"
            f"  rank 0 ({HERE}): step 6, saving, for batch in run.steps(model=model, optimizer=optimizer): "
            "(hanging.py:#), last collective …\n"
            f"  rank 1 ({HERE}): step 6, saving, for batch in run.steps(model=model, optimizer=optimizer): "
            "(hanging.py:#), writing a checkpoint at os.fsync = lambda file: time.sleep(600)",
        ),
    ],
)
def test_one_message_says_who_and_where(how: str, words: str, outcomes: dict[str, Ended]) -> None:
    found = outcomes[how]
    pattern = re.escape(words).replace(r"\#", r"\d+").replace("…", ".*")
    assert re.match(pattern, found.said), found.said
    if how == "worker hangs":  # either rank may be the first whose time is over
        assert re.search(r"rank 1 .*(its DataLoader workers|step \d+, waiting for data)", found.said)
    assert found.code == (134 if "SIGABRT" in words else 2 if how == "one step less" else 1)
    messages = re.findall(r"^(error: |rank \d+ failed|rank \d+ was killed)", found.said, re.MULTILINE)
    assert len(messages) == 1, found.said  # a traceback may quote a source line that has such words
    assert ("Traceback" in found.said) == ("Traceback" in words)


def test_ranks_started_by_hand_know_as_much(outcomes: dict[str, Ended]) -> None:
    """Rank 0 stands still, and with it the store where the ranks meet: only the heartbeat files can tell."""
    found = outcomes["by hand: stop"]
    assert found.code == 1
    words = f"error: rank 0 ({HERE}) is stopped in step 3 (training): by SIGSTOP, Ctrl-Z or a debugger\n"
    assert found.said.startswith(words), found.said
    assert found.said.count("error: ") == 1, "woken up, rank 0 finds what was said of it"


def test_the_one_that_raised_is_named_by_the_other_too(outcomes: dict[str, Ended]) -> None:
    found = outcomes["by hand: raise"]
    assert found.said.startswith(f"rank 0 failed on {HERE} in step 3 (training)\nTraceback"), found.said
    assert f"\nerror: rank 0 ({HERE}) failed in step 3 (training): KeyError: 'the cause'\n" in found.said


def test_stacks_are_left_of_ranks_that_hung(outcomes: dict[str, Ended]) -> None:
    ranks = outcomes["sleep"].ranks
    assert "Timed out waiting" in (ranks / "0.stack").read_text()
    assert "in go_wrong" in (ranks / "1.stack").read_text()
    assert re.search(r"all_reduce no\. \d+ of \[490\]", (ranks / "0.stack").read_text())


def test_ranks_that_are_slow_all_alike_are_left_alone(outcomes: dict[str, Ended]) -> None:
    found = outcomes["slow everywhere"]
    words = rf"rank 0 is in one phase for {2 * LIMIT} s; the run continues: step 3, training, .* \(hanging\.py:\d+\)\n"
    assert found.code == 0, found.said
    assert re.match(words, found.said), found.said
    assert found.said.count("\n") == 1, found.said
    assert found.seconds > 2 * LIMIT
    assert [read_heartbeat(found.ranks, rank)["end"] for rank in range(2)] == [FINISHED] * 2
    assert not list(found.ranks.glob("*.stack"))


# The words --------------------------------------------------------------------------------------------------------


def facts(rank: int, number: int = 7, *, step: int = 3, call: str = "loss.backward() (ddp.py:50)") -> Beat:
    collectives = {"0": [number, "all_reduce", "[490]"]}
    place = {"step": step, "phase": "training", "call": call, "collectives": collectives, "last": "0"}
    return {"rank": rank, "host": f"node{rank // 8}", **place}


def verdict(everyone: list[Beat], folder: Path, **states: str) -> list[str]:
    """Asked for by rank 0; of the ranks `r3=...` that did not answer, the state."""
    found = [states.get(f"r{rank}", "answered") for rank in range(len(everyone))]
    return explain_wait(everyone, found, asker=0, seconds=300, folder=folder).splitlines()


def test_of_a_thousand_ranks_the_one_that_is_missing_is_named(tmp_path: Path) -> None:
    everyone = [facts(rank) for rank in range(1000)]
    everyone[613] = facts(613, 6, call="evaluate() (mine.py:7)")
    head, *rows = verdict(everyone, tmp_path)
    assert head.startswith("rank 613 (node76) has not reached all_reduce no. 7 of [490], in which ranks 0 (node0), 1 (")
    assert head.endswith(" and 991 more waited for timeout_seconds=300")
    assert len(rows) == 2
    assert max(map(len, [head, *rows])) < 300


def test_whoever_cannot_answer_is_the_cause_and_not_who_is_behind(tmp_path: Path) -> None:
    everyone = [facts(0), facts(1, 6), facts(2), {"rank": 3}]
    head, *rows = verdict(everyone, tmp_path, r2="gone", r3="silent")
    assert head == (
        "rank 2 (node0) ended without an error message in step 3 (training); rank 3 does not answer: its host or its "
        "network is lost, or it is stopped"
    )
    assert rows[-1] == "  rank 3: left no heartbeat"


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (
            "silent",
            "do not answer, last heartbeat in step 3 (training): their host or their network is lost, or they are",
        ),
        ("stopped", "are stopped in step 3 (training): by"),
        ("finished", "ended in step 3 (training), while the others continue: they took fewer steps"),
    ],
)
def test_of_several_ranks_it_speaks_in_the_plural(state: str, said: str, tmp_path: Path) -> None:
    everyone = [facts(rank) for rank in range(4)]
    head, *_ = verdict(everyone, tmp_path, r1=state, r3=state)
    assert head.startswith(f"ranks 1 (node0), 3 (node0) {said}")


def test_ranks_in_the_same_place_are_said_to_be(tmp_path: Path) -> None:
    head, row = verdict([facts(0), facts(1)], tmp_path)
    assert head.endswith("though all ranks are in the same place: look at their network")
    assert row.startswith("  ranks 0 (node0), 1 (node0): step 3, training, ")


def test_of_ranks_that_live_those_are_named_that_no_word_comes_from(tmp_path: Path) -> None:
    everyone = [facts(0), facts(8) | {"rank": 1, "cut": True}]
    head, _ = verdict(everyone, tmp_path)
    assert (
        head
        == "rank 1 (node1) can no longer be reached from rank 0 (node0), which serves the store (timeout_seconds=300)"
    )
    everyone[0]["lost_link"] = "ib0"
    assert verdict(everyone, tmp_path)[0] == "rank 0 (node0) lost the network in step 3 (training): ib0 has no link"


class Deaf(dist.HashStore):
    """A store to which nobody's word comes but this process's own."""

    def clone(self) -> dist.Store:
        return self


def test_a_word_that_came_by_the_files_alone_is_that_of_a_rank_that_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1's network is lost, and the file system is another one's: seen from rank 0, which serves the store."""
    there = Heartbeat(tmp_path, 1)
    there.enter("training", 3)
    there.update(call="loss.backward()", collectives={}, last="", asked=True, host="node9")
    monkeypatch.setattr("lockstep.diagnose.watchdog.ANSWER_SECONDS", 0.2)
    monkeypatch.setattr("lockstep.diagnose.watchdog.STORE_SECONDS", 0.2)
    heartbeat = Heartbeat(tmp_path, 0)
    heartbeat.enter("training", 3)
    watchdog = Watchdog(heartbeat, tmp_path, Deaf(), 2, LIMIT, end=lambda _: None, say=print)
    found = watchdog.ask(RuntimeError("Timed out waiting 6000ms"))
    assert found.prints
    words = f"rank 1 (node9) can no longer be reached from rank 0 ({HERE}), which serves the store (timeout_seconds={LIMIT})\n"
    assert str(found).startswith(words)
    watchdog.close()
    assert f"the verdict: {words}" in (tmp_path / "0.stack").read_text()


def test_a_rank_that_was_stopped_takes_over_what_was_found_meanwhile(tmp_path: Path) -> None:
    """Its own store hands it the other rank's testimony, which is older than the verdict in that rank's file."""
    there = Heartbeat(tmp_path, 1)
    there.enter("training", 3)
    there.update(call="loss.backward()", collectives={}, last="", asked=True)
    store = Deaf()
    store.set("hang/1", json.dumps(there.facts))
    there.update(end="rank 0 is stopped", stuck=True, spoke=True)
    watchdog = Watchdog(Heartbeat(tmp_path, 0), tmp_path, store, 2, LIMIT, end=lambda _: None, say=print)
    found = watchdog.ask(RuntimeError("Connection closed by peer"))
    watchdog.close()
    assert (str(found), found.prints) == ("rank 0 is stopped", False)


def test_an_asker_that_is_killed_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher's SIGTERM may end the rank that asks before it has come to a verdict."""
    monkeypatch.setattr("lockstep.diagnose.watchdog.SLOW_SECONDS", 1000.0)
    asker = multiprocessing.get_context("fork").Process(target=lambda: Heartbeat(tmp_path, 1).update(asked=True))
    asker.start()
    asker.join()
    store, verdicts = Deaf(), queue.SimpleQueue[WatchdogTimeout]()
    store.set("hang/call", "1")
    watchdog = Watchdog(Heartbeat(tmp_path, 0), tmp_path, store, 2, LIMIT, end=verdicts.put, say=print)
    assert str(verdicts.get(timeout=60)) == "rank 1 asked rank 0 where it is, and sent no verdict"
    watchdog.close()


def test_what_an_earlier_attempt_left_is_kept(tmp_path: Path) -> None:
    for words in ("first", "second", ""):
        keep_stack(tmp_path, 0)
        (tmp_path / "0.stack").write_text(words)
    keep_stack(tmp_path, 0)  # an empty one is not
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "0.stack.1": "first",
        "0.stack.2": "second",
        "0.stack": "",
    }


def test_a_recipe_of_an_installed_wheel_is_the_user_s_code() -> None:
    frames = [(f"{LOCKSTEP}launch/worker.py", 9), (f"{LOCKSTEP}recipes/ddp.py", 40), (f"{LOCKSTEP}run.py", 7)]
    assert user_line(frames) == "ddp.py:40"
    assert user_line([frames[0], frames[2]]).endswith("(run.py:7)")


def test_a_link_that_is_lost_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The box pulls a real one, in test_slurm_trouble."""
    for name in ("lo", "nothing-there", "lo,eth0"):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", name)
        assert interfaces.lost_link() == ""


def test_a_full_disk_costs_the_heartbeat_and_not_the_run(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path / "nowhere", 0)
    heartbeat.enter("training", 1)
    assert heartbeat.facts["step"] == 1
    assert read_heartbeat(tmp_path / "nowhere", 0) == {"rank": 0}


def test_a_heartbeat_never_outgrows_its_file(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, 0)
    heartbeat.update(collectives={str(group): [1, "all_reduce", "[1]"] for group in range(1000)}, last="7", call="here")
    assert (folders(tmp_path)[0] / "0").stat().st_size == LINE_BYTES
    assert read_heartbeat(tmp_path, 0)["call"] == "here"
    heartbeat.close()
