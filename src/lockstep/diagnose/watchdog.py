"""What happens when a rank waits too long for others: all ranks say where they are, and the run ends with one message.

The collective itself notices: it gives up after timeout_seconds, or at once where the other rank is gone. So ranks that
are all slow alike, in compiling, evaluating or saving, never end a run: none waits for another. The rank that has
waited too long sets a key in the store where the ranks have met. On every other rank a thread looks for this key, even
while the main thread hangs: it writes down all stacks, answers where the main thread is and which collective was its
last, and ends the rank when the verdict is there. If a rank cannot answer, its heartbeat says where it was.

NCCL does not raise in the main thread, but aborts the process from a thread of its own. With NCCL, therefore, the
watchdog's thread also looks into torch's flight recorder for a collective that has been under way for timeout_seconds,
and NCCL's own limit comes later (process_group.NCCL_SPARE_SECONDS).
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

from lockstep.config.own_files import open_own
from lockstep.diagnose.flight_recorder import (
    collective_summary,
    group_name,
    has_overdue_collective,
    recorded_collectives,
)
from lockstep.diagnose.stacks import LOCKSTEP, VERDICT_MARK, Frame, has_content, keep_stack, source_line, user_line
from lockstep.diagnose.unheeded import unheeded_signal
from lockstep.diagnose.verdict import at_step, explain_wait, list_ranks, position, rank_state
from lockstep.distributed.heartbeat import FAILED, Beat, Heartbeat
from lockstep.distributed.host_memory import FINISHED, read_heartbeat, read_heartbeats, read_here
from lockstep.distributed.interfaces import lost_link
from lockstep.distributed.signals import alone_under_srun
from lockstep.distributed.store import run_within
from lockstep.errors import CheckFailed

LISTEN_SECONDS = 0.5  # between two looks for the call
ANSWER_SECONDS = 5.0  # in which a rank that is alive answers it
SLOW_SECONDS = 20.0  # the same on the asking rank's host, where a process can be seen to be alive
STOPPED_SECONDS = 1.0  # for which a rank of this host must have been stopped to count as stopped
SPARE_SECONDS = 3.0  # in which what waits with a time-out of its own may say more
STORE_SECONDS = 3.0  # after which a store that does not answer counts as lost
CALL_KEY, VERDICT_KEY, READ_KEY = "hang/call", "hang/verdict", "hang/read"
CHECKPOINT = os.path.join(LOCKSTEP, "checkpoint", "")  # where the thread that writes checkpoints is
COLLECTIVES_SHOWN = 30  # in a rank's stack file


class WatchdogTimeout(CheckFailed):
    """The verdict: shown as it is, without a traceback; the exit code is 1.

    Attributes:
        prints: whether this rank is the one that shows it to the user.
        stopped: process numbers of the stopped ranks of this host.
    """

    def __init__(self, text: str, prints: bool = False) -> None:
        super().__init__(text)
        self.prints = prints
        self.stopped: list[int] = []

    def continue_stopped(self) -> None:
        """Let stopped ranks continue when the verdict has been shown: they find it, and leave by themselves."""
        for pid in self.stopped:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGCONT)


class Watchdog:
    """One rank's watchdog.

    Args:
        heartbeat: this rank's heartbeat.
        folder: the run's ranks/.
        store: where the ranks have met.
        end: called with the verdict, in the watchdog's thread; it ends the process.
        say: shows a line to the user; rank 0's does.
        overdue: whether to look into the flight recorder for collectives that take too long.
        signalled: the number of a signal that asked this rank to leave; 0: none has.
    """

    def __init__(
        self,
        heartbeat: Heartbeat,
        folder: Path,
        store: dist.Store,
        world_size: int,
        timeout_seconds: float,
        end: Callable[[WatchdogTimeout], None],
        say: Callable[[str], None],
        overdue: bool = False,
        signalled: Callable[[], int] = lambda: 0,
    ) -> None:
        self.heartbeat, self._folder, self._world_size = heartbeat, folder, world_size
        self._rank: int = heartbeat.facts["rank"]
        self._timeout, self._end, self._say, self._overdue = timeout_seconds, end, say, overdue
        self._store = store.clone()  # the main thread may hang within the other connection
        self._over, self._ending = threading.Event(), threading.Lock()  # the thread with the lock ends this process
        self._store_lost, self._signalled = False, signalled
        self._stack_file = folder / f"{self._rank}.stack"
        self._stacks: IO[str] | None = None
        with contextlib.suppress(OSError):
            keep_stack(folder, self._rank)
            self._stacks = open_own(self._stack_file, "w", encoding="utf-8")
            faulthandler.enable(self._stacks)  # for crashes: gloo aborts where a message is larger than was expected
        # A thousand ranks are not to ask five hundred times a second.
        self._pause = LISTEN_SECONDS * (1 + world_size / 256)
        threading.Thread(target=self._listen, daemon=True, name="watchdog").start()

    def close(self, end: str = FINISHED) -> None:
        """Stop listening; `end`: how this rank ends, as far as it says that."""
        self._over.set()
        if end:
            self.heartbeat.update(end=end.partition("\n")[0][:300])
        if self._stacks is not None and not has_content(self._stack_file):
            faulthandler.disable()
            with contextlib.suppress(OSError):
                self._stack_file.unlink()

    def tell(self) -> None:
        """After `close`: have all other ranks leave because this one has failed, where they would not notice: over NCCL
        they would wait in their collective for timeout_seconds. Returns when they have read it, or after STORE_SECONDS.
        """
        if not self._overdue:
            return
        first = self._try_store(lambda: self._store.compare_set(CALL_KEY, "", str(self._rank)))
        if first is not None and int(first) == self._rank:
            mine = self.heartbeat.facts
            text = f"{list_ranks([mine])} failed{at_step(mine)}: {mine['end']}"
            told = json.dumps({"by": self._rank, "text": text, "readers": self._world_size})
            self._try_store(lambda: self._store.set(VERDICT_KEY, told))
            self._leave_last(self._world_size, waits=True)

    def ask(self, error: BaseException | None, patience: float = 0.0, why: str = "") -> WatchdogTimeout:
        """Ask all ranks where they are; return the verdict, the same on all ranks that ask.

        Args:
            error: the exception that this rank has met.
            patience: seconds to wait for a rank or launcher that may know more; a launcher ends this process meanwhile.
            why: the reason, where no rank is missing and it is not that the ranks disagree.
        """
        self._claim_end()
        self._report(error, asks=True)
        began = time.monotonic()
        first = self._try_store(lambda: self._store.compare_set(CALL_KEY, "", str(self._rank)))
        if first is not None and int(first) != self._rank:  # one rank asks: a thousand would overload the store
            verdict = self._await_verdict(int(first), patience + SLOW_SECONDS + ANSWER_SECONDS)
            if verdict:
                return self._conclude(verdict)
        answers: dict[int, Beat] = {}
        while True:
            self._try_store(lambda: self._collect_answers(answers))
            everyone, states = self._all_ranks(answers)
            if found := self._verdict_of_another(everyone):  # by ranks that only the files tell of
                return found
            unheard = [] if self._store_lost else self._unheard(everyone, states, answers)
            waited = time.monotonic() - began
            # A stopped rank may have been stopped for a moment only, and one that is alive on this host may be slow.
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
        there = read_heartbeats(self._folder)
        if found := self._verdict_of_another([there[rank] for rank in askers if rank in there]):
            return found
        for facts in unheard:  # its file is here, and its answer is not in the store
            facts["cut"] = True
        text = explain_wait(everyone, states, asker=self._rank, seconds=self._timeout, folder=self._folder, why=why)
        mine = json.dumps({"by": self._rank, "text": text, "readers": states.count("answered")})
        stored = self._try_store(lambda: self._store.compare_set(VERDICT_KEY, "", mine))
        if stored is None:  # the rank that served the store is lost: the first of those that ask prints
            prints = min(facts["rank"] for facts in everyone if facts.get("asked")) == self._rank
        else:
            agreed = json.loads(stored)
            prints, text = agreed["by"] == self._rank, agreed["text"]
            self._leave_last(agreed["readers"], waits=prints)
        found = self._conclude(text, prints)
        if alone_under_srun() and set(states) == {"answered", FAILED}:
            found.prints = False  # srun's tasks share a console, where that rank's own error is
        found.stopped = [facts["pid"] for facts, what in zip(everyone, states, strict=True) if what == "stopped"]
        return found

    # In the watchdog's thread

    def _listen(self) -> None:
        mentioned = seen = watched = stood = unheeded = 0.0
        moves = 0
        while not self._over.wait(self._pause):
            try:
                if not self._store_lost and self._store.check([CALL_KEY]):
                    break
            except RuntimeError:
                self._store_lost = True  # the rank that served it is gone
            since, now = self.heartbeat.facts["at"], time.monotonic()
            # Seconds in which this process was itself stopped do not count.
            passed = min(now - watched, 2 * self._pause)
            stood = stood + passed if since == seen else 0.0
            unheeded = unheeded + passed if moves == self.heartbeat.moves and self._signalled() else 0.0
            seen, watched, moves = since, now, self.heartbeat.moves
            if unheeded >= self._timeout + SPARE_SECONDS:
                self._end(self.ask(None, why=unheeded_signal(self._signalled(), self._timeout, self._folder.parent)))
            if stood < self._timeout:
                continue
            if self._overdue and has_overdue_collective(self._timeout):
                self._end(self.ask(None))
            # No rank has waited too long: this one may compile, or all wait for a disk. Worth a line, but no end.
            if since != mentioned and stood > 2 * self._timeout:
                mentioned = since
                at = position(self.heartbeat.facts | {"call": user_line(main_thread_frames())})
                self._say(f"rank {self._rank} is in one phase for {2 * self._timeout:g} s; the run continues: {at}")
        if self._over.is_set() or not self._ending.acquire(blocking=False):
            return
        self._report(None, asks=False)
        asker = int(self._try_store(lambda: self._store.get(CALL_KEY)) or 0)
        unanswered = f"rank {asker} asked rank {self._rank} where it is, and sent no verdict"
        self._end(self._conclude(self._await_verdict(asker, 2 * SLOW_SECONDS) or unanswered))

    # In either thread

    def _claim_end(self) -> None:
        """Keep the other thread from ending this process, or let it do so."""
        if not self._ending.acquire(blocking=False):
            time.sleep(3 * SLOW_SECONDS)  # it does

    def _report(self, error: BaseException | None, asks: bool) -> None:
        """Write down this rank's stacks and collectives, and tell the other ranks where its main thread is."""
        entries = recorded_collectives()
        if self._stacks is not None:
            with contextlib.suppress(OSError, ValueError):
                if error is not None:
                    self._stacks.write("".join(traceback.format_exception(error)) + "\n")
                    self._stacks.flush()
                faulthandler.dump_traceback(self._stacks)
                self._stacks.write("\nThe last collectives that torch's flight recorder has:\n")
                for entry in entries[-COLLECTIVES_SHOWN:]:
                    (number, name, sizes), done = collective_summary(entry), "" if entry["retired"] else "  under way"
                    self._stacks.write(f"  group {group_name(entry)}: {name} no. {number} of {sizes}{done}\n")
                self._stacks.flush()
        frames = frames_of(traceback.extract_tb(error.__traceback__)) if error is not None else main_thread_frames()
        for thread, frame in sys._current_frames().items():
            others = frames_of(traceback.extract_stack(frame))
            if thread != threading.main_thread().ident and any(file.startswith(CHECKPOINT) for file, _ in others):
                self.heartbeat.update(writing=source_line(*others[-1]))
        said = {group_name(entry): collective_summary(entry) for entry in entries}
        last = group_name(entries[-1]) if entries else ""
        link = {"lost_link": lost_link()} if lost_link() else {}
        self.heartbeat.update(call=user_line(frames), collectives=said, last=last, asked=asks, **link)
        self._try_store(lambda: self._store.set(f"hang/{self._rank}", json.dumps(self.heartbeat.facts)))

    def _try_store(self, work: Callable[[], Any]) -> Any:
        """What `work` returns, or None: a store whose server is stopped never answers, and is not asked again."""
        if self._store_lost:
            return None
        try:
            return run_within(STORE_SECONDS, work)
        except (RuntimeError, TimeoutError):
            self._store_lost = True
            self.heartbeat.update(cut=True)
            return None

    def _conclude(self, text: str, prints: bool = False) -> WatchdogTimeout:
        """Write the verdict down: its first line into the heartbeat, all of it into the stack file."""
        self.heartbeat.update(end=text.partition("\n")[0], stuck=True, spoke=prints)
        if self._stacks is not None:
            with contextlib.suppress(OSError, ValueError):
                self._stacks.write(f"\n{VERDICT_MARK}{text}\n")
                self._stacks.flush()
        return WatchdogTimeout(text, prints)

    def _await_verdict(self, asker: int, seconds: float) -> str:
        """The verdict; where the asker has lost the store, its first line; nothing where none comes in time, or the asker
        has ended, as by a launcher's SIGTERM.
        """
        # What other hosts have written is many files, and all ranks read them: a thousand do so less often.
        pause = 0.0 if read_here(self._folder, asker) else self._world_size / 50
        deadline, next_look = time.monotonic() + seconds, time.monotonic() + pause
        asked: Beat = {}
        while (now := time.monotonic()) < deadline:
            if now >= next_look:
                asked, next_look = read_heartbeat(self._folder, asker), now + pause
            gone = rank_state(asked, answered=False) == "gone"
            if self._try_store(lambda: self._store.check([VERDICT_KEY])):
                told = json.loads(self._store.get(VERDICT_KEY))
                self._leave_last(told["readers"], waits=False)
                return str(told["text"])
            if ending := self._store_lost or gone:
                asked = read_heartbeat(self._folder, asker)  # what it has written by its end
            if asked.get("spoke"):
                return str(asked["end"])
            if ending:
                break
            time.sleep(0.1)
        return ""

    def _leave_last(self, readers: int, waits: bool) -> None:
        """Wait until all have read the verdict: as rank 0, which may serve the store, and as the rank that prints it,
        after whose end a launcher ends the others."""
        self._try_store(lambda: self._store.add(READ_KEY, 1))
        deadline = time.monotonic() + STORE_SECONDS
        while (waits or self._rank == 0) and not self._store_lost and time.monotonic() < deadline:
            if self._try_store(lambda: self._store.add(READ_KEY, 0) >= readers):
                break
            time.sleep(0.05)

    def _collect_answers(self, answers: dict[int, Beat]) -> None:
        """Add the answers that have arrived."""
        for rank in range(self._world_size):
            if rank not in answers and self._store.check([f"hang/{rank}"]):
                answers[rank] = json.loads(self._store.get(f"hang/{rank}"))

    def _all_ranks(self, answers: dict[int, Beat]) -> tuple[list[Beat], list[str]]:
        """(what is known of each rank, its rank_state)."""
        everyone, states, there = [], [], read_heartbeats(self._folder)
        for rank in range(self._world_size):
            facts = answers.get(rank) or there.get(rank, {"rank": rank})
            everyone.append(self.heartbeat.facts if rank == self._rank else facts)
            states.append(rank_state(everyone[-1], rank in answers or "call" in everyone[-1]))
        return everyone, states

    def _verdict_of_another(self, others: list[Beat]) -> WatchdogTimeout | None:
        """The verdict that another rank has reached while this one was stopped."""
        spoke = [facts["end"] for facts in others if facts.get("spoke")]
        return self._conclude(spoke[0]) if spoke else None

    def _unheard(self, everyone: list[Beat], states: list[str], answers: dict[int, Beat]) -> list[Beat]:
        """Ranks that have answered in the shared files, but not in the store."""
        return [
            facts
            for facts, what in zip(everyone, states, strict=True)
            if what == "answered" and facts["rank"] not in (self._rank, *answers)
        ]


def frames_of(stack: traceback.StackSummary) -> list[Frame]:
    """The innermost last."""
    return [(frame.filename, frame.lineno or 0) for frame in stack]


def main_thread_frames() -> list[Frame]:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return frames_of(traceback.extract_stack(frame)) if frame else []
