"""What happens when a rank waits for others in vain: all ranks say where they are, and the run ends with one sentence.

What notices is the collective itself, which gives up after timeout_seconds, or at once where the other end is gone. So
ranks that are slow all alike, in compiling, evaluating or saving, never end a run: nobody waits for anybody. The rank
that has waited in vain rings a bell in the store where the ranks have met. On every other rank a thread listens to it,
even while the main thread hangs: it writes down all stacks, answers where the main thread is and which collective was
its last, and ends the rank when the verdict is there. Of a rank that cannot answer, its heartbeat file tells.

NCCL does not raise in the main thread, but aborts the process from a thread of its own. There the listening thread also
looks into torch's flight recorder for a collective that has been under way for timeout_seconds, and NCCL's own limit
comes later (world.NCCL_SPARE_SECONDS).
Source: https://docs.pytorch.org/tutorials/unstable/flight_recorder_tutorial.html
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist

from lockstep.distributed import heartbeat
from lockstep.distributed.heartbeat import Facts, Heartbeat
from lockstep.distributed.process_group import lost_link
from lockstep.distributed.rendezvous import within
from lockstep.distributed.signals import alone_under_srun
from lockstep.errors import CheckFailed

LISTEN_SECONDS = 0.5  # between two looks at the bell
ANSWER_SECONDS = 5.0  # in which a rank that lives answers it
SLOW_SECONDS = 20.0  # in which it does on the asking rank's host, whose processes can be seen to live
STOPPED_SECONDS = 1.0  # for which a rank of this host must stand still to count as stopped
STORE_SECONDS = 3.0  # after which a store that says nothing is taken for lost
CALL, VERDICT, READ = "hang/call", "hang/verdict", "hang/read"
STORAGE = heartbeat.MINE + "storage.py"  # what the thread that writes checkpoints is in
COLLECTIVES_SHOWN = 30  # in a rank's stack file

LOST = (
    "Connection reset by peer",
    "Connection closed by peer",
    "Broken pipe",
    "NCCL error",
    "connectFullMesh failed",
    "Connection was likely closed",
)
IN_VAIN = ("Timed out waiting", "wait timeout after", "Socket Timeout", "Application timeout caused pair closure")


class Stuck(CheckFailed):
    """The verdict: shown as it is, without a traceback; the exit code is 1.

    Attributes:
        speaks: whether this rank is the one whose words it is.
        stopped: ranks of this host that were stopped, by their process numbers.
    """

    def __init__(self, text: str, speaks: bool = False) -> None:
        super().__init__(text)
        self.speaks = speaks
        self.stopped: list[int] = []

    def wake(self) -> None:
        """Let ranks that were stopped go on, when the verdict has been told: they find it, and leave by themselves."""
        for pid in self.stopped:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGCONT)


def lost_a_peer(error: BaseException) -> bool:
    """Whether an exception only says that another rank has gone."""
    return says(error, LOST)


def waited_in_vain(error: BaseException) -> bool:
    """Whether an exception only says that another rank has not come."""
    return says(error, IN_VAIN)


def says(error: BaseException, signs: tuple[str, ...]) -> bool:
    """Whether torch has raised it with one of these signs; a checkpoint's errors hold those of its collectives."""
    torch_s = isinstance(error, RuntimeError) or type(error).__module__.startswith("torch.")
    return torch_s and any(sign in str(error) for sign in signs)


class Watchdog:
    """One rank's part in it.

    Args:
        heart: this rank's heartbeat.
        folder: the run's ranks/.
        store: where the ranks have met.
        end: called, in the thread that listens, with the verdict; it ends the process.
        say: puts a line before the user; the first rank's does.
        overdue: whether the flight recorder is to be asked for collectives that take too long.
    """

    def __init__(
        self,
        heart: Heartbeat,
        folder: Path,
        store: dist.Store,
        world_size: int,
        timeout_seconds: float,
        end: Callable[[Stuck], None],
        say: Callable[[str], None],
        overdue: bool = False,
    ) -> None:
        self.heart, self._folder, self._world_size = heart, folder, world_size
        self._rank: int = heart.facts["rank"]
        self._timeout, self._end, self._say, self._overdue = timeout_seconds, end, say, overdue
        self._store = store.clone()  # the main thread may hang within the other connection
        self._over, self._mine = threading.Event(), threading.Lock()  # whoever has the lock ends this process
        self._lost = False  # the store
        self._stacks: IO[str] | None = None
        with contextlib.suppress(OSError):
            heartbeat.keep_stack(folder, self._rank)
            self._stacks = (folder / f"{self._rank}.stack").open("w")
            faulthandler.enable(self._stacks)  # for crashes: gloo aborts where a message is larger than was expected
        # A thousand ranks are not to ask five hundred times a second.
        self._pause = LISTEN_SECONDS * (1 + world_size / 256)
        threading.Thread(target=self._listen, daemon=True, name="inquest").start()

    def close(self, end: str = "") -> None:
        """Stop listening; `end`: how this rank ends."""
        self._over.set()
        if end:
            self.heart.tell(end=end.partition("\n")[0][:300])
        if self._stacks is not None and not heartbeat.has_content(self._folder / f"{self._rank}.stack"):
            faulthandler.disable()
            with contextlib.suppress(OSError):
                (self._folder / f"{self._rank}.stack").unlink()

    def ask(self, error: BaseException | None, patience: float = 0.0) -> Stuck:
        """Hear all ranks; return the verdict, the same on all that ask.

        Args:
            error: what this rank has met with.
            patience: seconds to wait for whoever may have more to say: the launcher ends this process meanwhile.
        """
        self._take_over()
        self._testify(error, asks=True)
        began = time.monotonic()
        first = self._in_store(lambda: self._store.compare_set(CALL, "", str(self._rank)))
        if first is not None and int(first) != self._rank:  # one hears all: a thousand that do would choke the store
            verdict = self._await_verdict(int(first), patience + SLOW_SECONDS + ANSWER_SECONDS)
            if verdict:
                return self._conclude(verdict)
        answers: dict[int, Facts] = {}
        while True:
            self._in_store(lambda: self._collect(answers))
            everyone, states = self._hear(answers)
            if found := self._found_meanwhile(everyone):  # by those of whom only the files tell
                return found
            unheard = [] if self._lost else self._unheard(everyone, states, answers)
            waited = time.monotonic() - began
            # Whoever is stopped may have been for a moment only, and who is alive on this host may only be slow.
            awaits = "silent" in states or not all(facts.get("cut") for facts in unheard)
            grace = ANSWER_SECONDS if awaits else STOPPED_SECONDS if "stopped" in states else 0
            late = [facts for facts, what in zip(everyone, states, strict=True) if what == "silent"]
            late += [facts for facts in unheard if not facts.get("cut")]
            if any(facts.get("host") == socket.gethostname() for facts in late):
                grace = SLOW_SECONDS
            if waited >= max(patience, grace):
                break
            time.sleep(0.1)
        askers = [facts["rank"] for facts in everyone if facts.get("asked") and facts["rank"] != self._rank]
        # What the others have told the store may be older than their files, which are many to read.
        if found := self._found_meanwhile([heartbeat.read(self._folder, rank) for rank in askers]):
            return found
        for facts in unheard:  # its file has come here, and its word has not come to the store
            facts["cut"] = True
        text = heartbeat.verdict(everyone, states, asker=self._rank, seconds=self._timeout, folder=self._folder)
        mine = json.dumps({"by": self._rank, "text": text, "readers": states.count("answered")})
        stored = self._in_store(lambda: self._store.compare_set(VERDICT, "", mine))
        if stored is None:  # whoever served the store is lost: the first of those that ask speaks
            speaks = min(facts["rank"] for facts in everyone if facts.get("asked")) == self._rank
        else:
            speaks = json.loads(stored)["by"] == self._rank
            text = json.loads(stored)["text"]
            self._part(json.loads(stored)["readers"], waits=speaks)
        found = self._conclude(text, speaks)
        if alone_under_srun() and set(states) == {"answered", heartbeat.FAILED}:
            found.speaks = False  # srun's tasks share a console, where that rank's own words are
        found.stopped = [facts["pid"] for facts, what in zip(everyone, states, strict=True) if what == "stopped"]
        return found

    # In the thread

    def _listen(self) -> None:
        mentioned = seen = watched = stood = 0.0
        while not self._over.wait(self._pause):
            try:
                if self._store.check([CALL]):
                    break
            except RuntimeError:
                return  # whoever served the store has gone
            since, now = self.heart.facts["at"], time.monotonic()
            # Seconds in which this process was itself stopped do not count: nobody has been at anything.
            stood = stood + min(now - watched, 2 * self._pause) if since == seen else 0.0
            seen, watched = since, now
            if stood < self._timeout:
                continue
            if self._overdue and pending(self._timeout):
                self._end(self.ask(None))
            # Nobody has waited in vain: it may compile, or all wait for a disk. No reason to end, but to say so.
            if since != mentioned and stood > 2 * self._timeout:
                mentioned = since
                at = heartbeat.where(self.heart.facts | {"call": heartbeat.spot(main_thread())})
                self._say(f"rank {self._rank} has been at it for {2 * self._timeout:g} s, and goes on: {at}")
        if self._over.is_set() or not self._mine.acquire(blocking=False):
            return
        self._testify(None, asks=False)
        asker = int(self._in_store(lambda: self._store.get(CALL)) or 0)
        lonely = f"rank {self._rank} was asked where it is by rank {asker}, and heard no more of it"
        verdict = self._await_verdict(asker, 2 * SLOW_SECONDS) or lonely
        self._end(self._conclude(verdict))

    # On both sides

    def _take_over(self) -> None:
        """Keep the other thread from ending this process, or let it."""
        if not self._mine.acquire(blocking=False):
            time.sleep(3 * SLOW_SECONDS)  # it does

    def _testify(self, error: BaseException | None, asks: bool) -> None:
        """Write down this rank's stacks and collectives, and tell the others where its main thread is."""
        entries = recorded()
        if self._stacks is not None:
            with contextlib.suppress(OSError, ValueError):
                if error is not None:
                    self._stacks.write("".join(traceback.format_exception(error)) + "\n")
                    self._stacks.flush()
                faulthandler.dump_traceback(self._stacks)
                self._stacks.write("\nThe last collectives that torch's flight recorder has:\n")
                for entry in entries[-COLLECTIVES_SHOWN:]:
                    (number, name, sizes), done = brief(entry), "" if entry["retired"] else "  under way"
                    self._stacks.write(f"  group {group_of(entry)}: {name} no. {number} of {sizes}{done}\n")
                self._stacks.flush()
        frames = lines(traceback.extract_tb(error.__traceback__)) if error is not None else main_thread()
        for thread, frame in sys._current_frames().items():
            others = lines(traceback.extract_stack(frame))
            if thread != threading.main_thread().ident and any(file == STORAGE for file, _ in others):
                self.heart.tell(writing=heartbeat.quoted(*others[-1]))
        said = {group_of(entry): brief(entry) for entry in entries}
        last = group_of(entries[-1]) if entries else ""
        link = {"lost_link": lost_link()} if lost_link() else {}
        self.heart.tell(call=heartbeat.spot(frames), collectives=said, last=last, asked=asks, **link)
        self._in_store(lambda: self._store.set(f"hang/{self._rank}", json.dumps(self.heart.facts)))

    def _in_store(self, work: Callable[[], Any]) -> Any:
        """What `work` returns, or None: a store whose server is stopped never answers, and is asked no more."""
        if self._lost:
            return None
        try:
            return within(STORE_SECONDS, work)
        except (RuntimeError, TimeoutError):
            self._lost = True
            self.heart.tell(cut=True)
            return None

    def _conclude(self, text: str, speaks: bool = False) -> Stuck:
        """The verdict, written down: its first line in the heartbeat, all of it beside the stacks."""
        self.heart.tell(end=text.partition("\n")[0], stuck=True, spoke=speaks)
        if self._stacks is not None:
            with contextlib.suppress(OSError, ValueError):
                self._stacks.write(f"\n{heartbeat.VERDICT}{text}\n")
                self._stacks.flush()
        return Stuck(text, speaks)

    def _await_verdict(self, asker: int, seconds: float) -> str:
        """The verdict, or nothing where there is none in time; of an asker that lost the store, its first line."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._in_store(lambda: self._store.check([VERDICT])):
                told = json.loads(self._store.get(VERDICT))
                self._part(told["readers"], waits=False)
                return str(told["text"])
            found = heartbeat.read(self._folder, asker)
            if found.get("spoke"):
                return str(found["end"])
            if self._lost:
                break
            time.sleep(0.1)
        return ""

    def _part(self, readers: int, waits: bool) -> None:
        """Leave last where others still read: as rank 0, which may serve the store, and as the one who speaks, after
        whose end a launcher ends the rest."""
        self._in_store(lambda: self._store.add(READ, 1))
        deadline = time.monotonic() + STORE_SECONDS
        while (waits or self._rank == 0) and not self._lost and time.monotonic() < deadline:
            if self._in_store(lambda: self._store.add(READ, 0) >= readers):
                break
            time.sleep(0.05)

    def _collect(self, answers: dict[int, Facts]) -> None:
        """Add the answers that have come."""
        for rank in range(self._world_size):
            if rank not in answers and self._store.check([f"hang/{rank}"]):
                answers[rank] = json.loads(self._store.get(f"hang/{rank}"))

    def _hear(self, answers: dict[int, Facts]) -> tuple[list[Facts], list[str]]:
        """(what is known of each rank, what has become of it)."""
        everyone, states = [], []
        for rank in range(self._world_size):
            facts = answers.get(rank) or heartbeat.read(self._folder, rank)
            everyone.append(self.heart.facts if rank == self._rank else facts)
            states.append(heartbeat.state(everyone[-1], rank in answers or "call" in everyone[-1]))
        return everyone, states

    def _found_meanwhile(self, others: list[Facts]) -> Stuck | None:
        """The verdict of another rank, to which the others have come while this one was stopped."""
        spoke = [facts["end"] for facts in others if facts.get("spoke")]
        return self._conclude(spoke[0]) if spoke else None

    def _unheard(self, everyone: list[Facts], states: list[str], answers: dict[int, Facts]) -> list[Facts]:
        """Ranks that have answered in the shared files, and not in the store."""
        return [
            facts
            for facts, what in zip(everyone, states, strict=True)
            if what == "answered" and facts["rank"] not in (self._rank, *answers)
        ]


def lines(stack: traceback.StackSummary) -> list[tuple[str, int]]:
    """(file, line) of each frame, the innermost last."""
    return [(frame.filename, frame.lineno or 0) for frame in stack]


def main_thread() -> list[tuple[str, int]]:
    """Where it is."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return lines(traceback.extract_stack(frame)) if frame else []


# torch's flight recorder ------------------------------------------------------------------------------------------


def recorded() -> list[dict[str, Any]]:
    """The collectives that this process has begun, the last one last. On gloo they are `retired` when they are over."""
    try:
        from torch._C._distributed_c10d import _dump_fr_trace_json

        return list(json.loads(_dump_fr_trace_json())["entries"])
    except (ImportError, RuntimeError, ValueError, KeyError):
        return []


def pending(seconds: float) -> bool:
    """Whether a collective has been under way for so long."""
    before = 1e9 * (time.time() - seconds)
    return any(not entry["retired"] and entry["time_created_ns"] < before for entry in recorded())


def group_of(entry: dict[str, Any]) -> str:
    return str(entry["process_group"][0])


def brief(entry: dict[str, Any]) -> tuple[int, str, str]:
    """(its number within its group, its name, its sizes)."""
    number = entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]
    sizes = ", ".join(str(size) for size in entry["input_sizes"])
    return number, str(entry["profiling_name"]).partition(":")[2], sizes if len(sizes) < 100 else sizes[:97] + "..."
