"""Another user of the same machine reaches every port that a run listens on, and gets nothing run by it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from tests.helpers.harness import ROOT

NOBODY = 65534
WORDS = (
    "data=synthetic data.size=48 data.image_size=8 global_batch_size=24 model.norm=group epochs=10000 max_steps=120 "
    "eval_every=0 log_every=1 timeout_seconds=10 nproc=2"
).split()


class Command:
    """What a pickle of an attacker's is: unpickled, it runs."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


def descendants(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in task.read_text().split():
                yield from descendants(int(child))


def listening(pids: Iterable[int]) -> set[tuple[str, int]]:
    """(address, port) of every TCP socket on which any of the processes listens."""
    inodes = set()
    for each in pids:
        for descriptor in Path(f"/proc/{each}/fd").glob("*"):
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(descriptor))
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:  # linux/tcp_states.h: TCP_LISTEN
                address, port = fields[1].split(":")
                words = bytes.fromhex(address)
                raw = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
                found.add((socket.inet_ntop(family, raw), int(port, 16)))
    return found


def attack(ports: list[int], store_port: int, marker: Path, seconds: float, heard: Connection) -> None:
    """As another user: garbage and a pickle to every port; a pickle into every key of the store, and keys deleted."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # torch's client complains at length when the run has ended
    if os.getuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    poison = pickle.dumps(Command(marker))
    store = TCPStore("127.0.0.1", store_port, is_master=False, timeout=timedelta(seconds=2))
    heard.send(store.list_keys())
    deadline = time.monotonic() + seconds
    with contextlib.suppress(Exception):
        while time.monotonic() < deadline:
            for port in ports:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as peer:
                    peer.sendall(poison + os.urandom(64))
            for key in store.list_keys():
                store.set(key, poison)
            store.set("attacked", poison)
            store.delete_key("attacked")
    os._exit(0)


@pytest.mark.slow
@pytest.mark.soak_for("spawn")
@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_no_stranger_gets_anything_run(start: str, tmp_path: Path) -> None:
    """Nothing listens beyond this machine; what is written into ports and store makes nothing run, and at most ends the
    run with one line."""
    marker = Path(tempfile.gettempdir()) / f"attacked-{os.getpid()}-{start}"
    words = ["-m", "recipes.ddp", *WORDS, f"start={start}", f"out={tmp_path}/run"]
    run = subprocess.Popen([sys.executable, *words], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 90
        while not (metrics.exists() and metrics.stat().st_size):
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        reachable = listening(descendants(run.pid))
        assert {address for address, _ in reachable} == {"127.0.0.1"}
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe()
        ((_, store),) = listening([run.pid])  # the launcher serves it
        ports = [port for _, port in reachable]
        stranger = context.Process(target=attack, args=(ports, store, marker, 3.0, theirs))
        stranger.start()
        assert mine.poll(60)
        assert mine.recv(), "the store is where it was looked for"
        _, err = run.communicate(timeout=120)
        stranger.join(60)
    finally:
        run.kill()
    assert not marker.exists()
    if run.returncode:
        assert "Traceback" not in err
        assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1, err
