"""What a run that was killed leaves in TMPDIR and in shared memory, and who takes it away."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest

from lockstep.distributed import host_memory
from lockstep.utils.temporary import own_folder
from tests.helpers.harness import command
from tests.helpers.processes import as_a_shell, processes_in, read, wait_until

RUN = ["-m", "recipes.ddp", "nproc=2", "data=synthetic", "data.size=48", "data.image_size=8", "global_batch_size=12"]
RUN += ["data.workers=1", "log_every=1", "eval_every=0", "threads=1"]


@pytest.mark.slow
def test_the_next_start_removes_what_a_killed_one_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Launcher, ranks and DataLoader workers are killed at once; another run that lives keeps its folder."""
    place, work = Path(tempfile.mkdtemp(dir="/tmp")), tmp_path / "work"  # a socket's path has at most 107 characters
    request.addfinalizer(lambda: shutil.rmtree(place))
    work.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    cache = "torchinductor_"  # torch's, which is there to be found again

    def there() -> set[Path]:
        return {path for path in place.iterdir() if not path.name.startswith(cache)}

    with own_folder() as living:
        words = [sys.executable, *RUN, "epochs=1000", "out=one"]
        with as_a_shell(words, work, TMPDIR=str(place)) as process:
            wait_until(lambda: len(read(work / "one" / "metrics.jsonl").splitlines()) > 1, 300)
            left = there() - {Path(living)}
            assert len(left) == 3, "the launcher's folder, and one of sockets in each rank"
            assert any(path.is_socket() for folder in left for path in folder.iterdir())
            while processes_in(work):
                for pid in processes_in(work):
                    os.kill(pid, signal.SIGKILL)
            process.communicate()
        assert there() == left | {Path(living)}
        ranks = work / "one" / "ranks"
        memory = host_memory.folders(ranks)[0]
        assert {path.name for path in memory.iterdir()} >= {"0", "1"}
        step = host_memory.read_heartbeat(ranks, 1)["step"]
        done = command(*RUN, "max_steps=2", "out=two", cwd=work, TMPDIR=str(place))
        assert done.returncode == 0, done.stderr
        assert there() == {Path(living)}
        assert not memory.exists()
        assert host_memory.read_heartbeat(ranks, 1)["step"] == step, "what it held has gone to the run it was of"
        assert Path(living, ".held").exists()
