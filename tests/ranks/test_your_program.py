"""`recipes.verify program=…` says of a program that calls lockstep.verify.watch whether it computes what another does."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from lockstep.distributed.process_group import World
from lockstep.errors import UserError
from lockstep.verify import record, watch, watching
from lockstep.verify.judge import ProgramVerdict, judge_programs
from lockstep.verify.programs import Program, ProgramRecords, load_files
from recipes import verify
from tests.helpers.command_line import run_main
from tests.helpers.harness import ROOT, command, run_ranks

EXAMPLES = ROOT / "examples" / "strangers"
STEPS = 3


def by_command(program: str, against: str, *words: str, timeout: float = 200) -> tuple[int, str]:
    """(exit code, what was said) of recipes.verify on two programs."""
    done = command("-m", "recipes.verify", f"program={program}", f"against={against}", *words, timeout=timeout)
    return done.returncode, done.stdout + done.stderr


# The command ----------------------------------------------------------------------------------------------------------

PYTHON = shlex.quote(sys.executable)


@pytest.mark.slow_except("clip")
@pytest.mark.soak_for("tokens", "rate", "epoch")
@pytest.mark.parametrize(
    ("bug", "steps", "first"),
    [
        ("clip", 2, r"step 1: grads: 3\.bias, off by 1e-01 "),
        ("tokens", 2, r"step 1: loss: 2\.9905\d+ and not 2\.9899\d+, off by 2e-04 "),
        ("missing", 2, r"step 1: ranks: rank 1 has another gradient of 3\.bias, off by 1e\+00 "),
        ("rate", 2, r"step 1: weights: the way since the start of \d\.\w+, off by 1e\+00 "),
        ("epoch", 5, r"step 5: loss: 2\.\d+ and not 2\.\d+, off by 2e-02 "),
        (None, 5, ""),
    ],
)
def test_a_broken_program_is_named_by_its_row(bug: str | None, steps: int, first: str) -> None:
    script = EXAMPLES / "broken.py"
    program = f"python -m tests.helpers.forked 2 {script}" + (f" --bug {bug}" if bug else "")
    code, said = by_command(program, f"python {script}", f"steps={steps}")
    if bug is None:
        assert code == 0, said
        assert said.count(" equal ") == steps + 1
    else:
        assert code == 1, said
        assert re.search(f"^error: program: not the training that against computes: {first}", said, re.M), said
        assert "often: " in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "against"),
    [
        ("torchrun --nproc-per-node=2 {}/plain_ddp.py", "python {}/plain_ddp.py"),
        ("torchrun --nproc-per-node=2 {}/with_accelerate.py", "python {}/with_accelerate.py"),
        ("torchrun --nproc-per-node=2 {}/with_trainer.py", "python {}/with_trainer.py"),
        ("python {}/with_lightning.py --devices=2", "python {}/with_lightning.py"),
    ],
    ids=["DDP", "Accelerate", "Trainer", "Lightning"],
)
def test_programs_of_other_libraries_are_equal(program: str, against: str) -> None:
    code, said = by_command(program.format(EXAMPLES), against.format(EXAMPLES))
    assert code == 0, said
    assert "2 ranks" in said
    losses = re.findall(r"^\d +(\S+) .* equal", said, re.M)
    assert len(losses) == STEPS
    assert all(float(figure) < 1e-5 for figure in losses)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain_ddp", "with_accelerate", "with_trainer", "with_lightning", "broken"])
def test_an_example_runs_alone(name: str, tmp_path: Path) -> None:
    """Without recipes.verify the two lines do nothing."""
    done = command(str(EXAMPLES / f"{name}.py"), cwd=tmp_path, fresh=True)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


# Bad input: one line, after what the program has said -----------------------------------------------------------------

ONLY_TWO_STEPS = """
import torch, lockstep.verify
model = torch.nn.Linear(1, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
lockstep.verify.watch(model)
for _ in range(2):
    model(torch.ones(1)).backward()
    optimizer.step()
"""
# As mpirun starts two, when nothing joins them.
TRAIN_ALONE = f"import os\nif os.fork() and os.fork(): os.wait(); os.wait(); os._exit(0)\n{ONLY_TWO_STEPS}"


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (
            ["program=python -c 'pass'", "against=python x"],
            2,
            ["never called lockstep.verify.watch; write", "import lockstep.verify; lockstep.verify.watch(model, opt"],
        ),
        (
            ["""program=python -c 'print("no data"); exit(3)'""", "against=python x"],
            2,
            ["  no data", "failed with exit code 3 after 0 of 3 steps"],
        ),
        (
            ["program=python -c 'import os; os.kill(os.getpid(), 9)'", "against=python x"],
            2,
            ["program said nothing", "was killed by SIGKILL after 0 of 3 steps"],
        ),
        (
            ["program=sleep 60", "against=python x", "limit_seconds=1"],
            2,
            ["took longer than limit_seconds=1, and was ended in step 1 of 3; set limit_seconds larger"],
        ),
        (["program=no-such-launcher x.py", "against=python x"], 2, ["there is no command no-such-launcher; set it to"]),
        (["program=python 'x", "against=python x"], 2, ["is not a command that can be read: No closing quotation"]),
        (["program=python x"], 2, ["lacks what it must equal; set against='python train.py'"]),
        (["program=python x", "against=y", "optim.lr=0.5"], 2, ["optim.lr=0.5: means nothing to program=python x"]),
        (["program=python x", "against=y", "steps=0"], 2, ["steps=0: allowed are numbers from 1 up"]),
        (["steps=5"], 2, ["steps=5: goes with program=…; leave it out, or set max_steps for recipes"]),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], code: int, parts: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_main(verify.train, words, monkeypatch) == code
    said = capfd.readouterr()
    for part in parts:
        assert part in said.err
    assert said.err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in said.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "steps", "code", "part"),
    [
        (ONLY_TWO_STEPS, 3, 2, "ended after 2 steps; set steps=2, or let it train longer"),
        (
            ONLY_TWO_STEPS.replace("watch(model)", "watch(torch.nn.Linear(1, 1))"),
            3,
            2,
            "and then no step of an optimizer",
        ),
        (TRAIN_ALONE, 2, 1, "2 processes each are rank 0: they train alone, and not together"),
        (f"import os\nos.environ['WORLD_SIZE'] = '2'\n{ONLY_TWO_STEPS}", 3, 2, "ended after 2 steps"),
    ],
    ids=["ends early", "another model", "alone", "a rank is missing"],
)
def test_a_program_that_does_not_say_enough_is_told_what_is_missing(
    script: str, steps: int, code: int, part: str, tmp_path: Path
) -> None:
    (tmp_path / "short.py").write_text(script)
    found, said = by_command(f"python {tmp_path}/short.py", "python x", f"steps={steps}")
    assert found == code, said
    assert part in said.splitlines()[-1]


@pytest.mark.slow
def test_of_a_failed_torchrun_the_rank_s_own_words_are_shown(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text("import os\nif os.environ['RANK'] == '1':\n    raise ValueError('no such data')")
    code, said = by_command(f"torchrun --nproc-per-node=2 {tmp_path}/fails.py", "python x")
    assert code == 2, said
    assert "ValueError: no such data" in said.splitlines()[-2]
    assert said.splitlines()[-1].endswith("failed with exit code 1 after 0 of 3 steps; mend it, or set another")


def test_the_import_loads_neither_torch_nor_hydra() -> None:
    done = command(
        "-c", "import sys, lockstep.verify; print({'torch', 'hydra', 'omegaconf'} & set(sys.modules))", fresh=True
    )
    assert done.stdout == "set()\n", done.stderr


# What is recorded and how it is judged, on forked ranks ---------------------------------------------------------------


class Left(Exception):
    """Stands for the end of the process."""


def leave(watcher: Any) -> None:
    raise Left


def train_watched(world: World, make: Callable[..., Any], folder: str) -> None:
    """Train by `make` as a program does that recipes.verify has started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(watching.RECORDS, folder)
        patch.setenv(watching.RECORDED_STEPS, str(STEPS))
        patch.setattr(watching.ProgramWatcher, "leave", leave)
        with pytest.raises(Left):
            make(world.rank, world.world_size)


def records_of(make: Callable[..., Any], ranks: int, folder: Path) -> ProgramRecords:
    folder.mkdir()
    run_ranks(train_watched, ranks, make, str(folder))
    steps = [load_files(folder, step) for step in range(1, STEPS + 1)]
    return ProgramRecords(Program("program", make.__name__, []), steps, 0)


def judged(mine: Callable[..., Any], theirs: Callable[..., Any], folder: Path) -> ProgramVerdict:
    """The first on two ranks against the second on one."""
    return judge_programs(records_of(mine, 2, folder / "mine"), records_of(theirs, 1, folder / "theirs"), None, None)


def small_model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def batches(rank: int, ranks: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """Each rank's share of STEPS batches of 8."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(STEPS, 8, 6, generator=generator).to(dtype)
    targets = torch.randint(2, (STEPS, 8), generator=generator)
    return [(inputs[step, rank::ranks], targets[step, rank::ranks]) for step in range(STEPS)]


def plain(rank: int, ranks: int) -> None:
    model = small_model()
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    watch(wrapped, optimizer)
    for inputs, targets in batches(rank, ranks):
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(inputs), targets).backward()
        optimizer.step()


def sharded(rank: int, ranks: int) -> None:
    """FSDP2 by block, one of them compiled (eagerly), watched before it is sharded and with no optimizer named."""
    model = small_model()
    watch(model)
    for block in (model[0], model[2], model):
        fully_shard(block)
    model[0].compile(backend="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for inputs, targets in batches(rank, ranks):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def flattened(rank: int, ranks: int) -> None:
    """The older FSDP, whose shards are flat, and cut through parameters."""
    model = FullyShardedDataParallel(small_model(), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    watch(model, optimizer)
    for inputs, targets in batches(rank, ranks):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def zero_redundancy(rank: int, ranks: int) -> None:
    """An optimizer that calls another one's step, and a closure."""
    model = DistributedDataParallel(small_model())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)
    watch(model)
    for inputs, targets in batches(rank, ranks):

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            return loss

        optimizer.step(closure)


def accumulated(rank: int, ranks: int) -> None:
    """Two micro-batches of uneven length, weighted by hand; the loss is said, since what backward gets is a part of it."""
    model = DistributedDataParallel(small_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    watch(model, optimizer)
    for inputs, targets in batches(rank, ranks):
        optimizer.zero_grad()
        for part in (slice(0, 1), slice(1, None)):
            loss = nn.functional.cross_entropy(model(inputs[part]), targets[part])
            record(loss, weight=len(targets[part]))
            share = len(targets[part]) / len(targets)
            (1024 * loss * share).backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad /= 1024
        optimizer.step()


@pytest.mark.parametrize("make", [plain, sharded, flattened, zero_redundancy, accumulated])
def test_however_it_is_wrapped_it_is_equal(make: Callable[..., Any], tmp_path: Path) -> None:
    verdict = judged(make, plain, tmp_path)
    assert verdict.first == ""
    assert verdict.precision == "fp64"
    assert verdict.rows[1].loss is not None
    assert verdict.rows[1].grads is not None
    assert verdict.rows[-1].weights is not None
    assert 0 < verdict.rows[-1].weights < 1e-10


def alone(rank: int, ranks: int) -> None:
    """Two ranks that never speak with each other."""
    plain_on = small_model()
    optimizer = torch.optim.AdamW(plain_on.parameters(), lr=0.01)
    watch(plain_on, optimizer)
    for inputs, targets in batches(rank, ranks):
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain_on(inputs), targets).backward()
        optimizer.step()


def other_seed(rank: int, ranks: int) -> None:
    model = small_model()
    with torch.no_grad():
        model[2].bias += 0.1
    watch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for inputs, targets in batches(rank, ranks):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def other_decay(rank: int, ranks: int) -> None:
    """DDP whose optimizer decays weights more: a few steps hardly move weights, and it must be seen nevertheless."""
    model = DistributedDataParallel(small_model(torch.float32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001, weight_decay=1.0)
    watch(model, optimizer)
    for inputs, targets in batches(rank, ranks, torch.float32):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def usual_decay(rank: int, ranks: int) -> None:
    model = small_model(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001)
    watch(model, optimizer)
    for inputs, targets in batches(rank, ranks, torch.float32):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("mine", "theirs", "first", "hint"),
    [
        (alone, plain, "step 1: ranks: rank 1 has another gradient of ", "replicas have parted"),
        (other_seed, plain, "before step 1: weights: 2.bias, off by ", "seed both alike"),
        (other_decay, usual_decay, "step 1: weights: the way since the start of ", "weight decay"),
    ],
)
def test_what_is_off_first_is_named(mine: Any, theirs: Any, first: str, hint: str, tmp_path: Path) -> None:
    verdict = judged(mine, theirs, tmp_path)
    assert verdict.first.startswith(first)
    assert hint in verdict.hint


def autocast(rank: int, ranks: int) -> None:
    model = small_model(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    watch(wrapped, optimizer)
    for inputs, targets in batches(rank, ranks, torch.float32):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(wrapped(inputs), targets)
        loss.backward()
        optimizer.step()


def test_what_autocast_computes_in_is_what_it_is_judged_by(tmp_path: Path) -> None:
    verdict = judged(autocast, autocast, tmp_path)
    assert verdict.precision == "bf16"
    assert verdict.first == ""


def longer(rank: int, ranks: int) -> None:
    model = nn.Sequential(*small_model(), nn.Linear(2, 2, dtype=torch.float64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    watch(model, optimizer)
    for inputs, targets in batches(rank, ranks):
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def test_an_optimizer_of_another_model_is_refused() -> None:
    copies = [each.detach().clone().requires_grad_() for each in small_model().parameters()]
    optimizer = torch.optim.SGD(copies, lr=0.1)
    watcher = watching.ProgramWatcher.__new__(watching.ProgramWatcher)
    watcher.model, watcher.optimizer, watcher.step = small_model(), optimizer, 0
    with pytest.raises(RuntimeError, match="updates no parameter of the model"):
        watcher.counts(optimizer)
    watcher.optimizer = None
    assert not watcher.counts(optimizer)


def test_other_parameters_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"2 names only one has, the first: 3\.weight, only program has it"):
        judged(longer, plain, tmp_path)
