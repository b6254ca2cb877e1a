"""Runs that are killed, signalled and damaged at random end as if nothing had happened; and the fuzzer would see it
if they did not."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep.checkpoint import directory
from lockstep.checkpoint.directory import folder_name
from lockstep.checkpoint.saver import CheckpointSaver
from lockstep.checkpoint.state import TrainingState
from lockstep.data import batches
from lockstep.distributed.signals import SIGNALS, Agreement
from tests.helpers.fuzz import results, starts
from tests.helpers.fuzz.judging import place_of, play
from tests.helpers.fuzz.launched import Blow, play_launched
from tests.helpers.fuzz.plans import DAMAGES, OWN, OWN_RECIPE, RANKS, SIZE, TASKS, Damage, Fault, Plan, Setup, draw
from tests.helpers.fuzz.record import PAGE, fuzz_page, recorded_series, series_of
from tests.helpers.fuzz.series import Tally, fuzz

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _warm() -> Iterator[None]:
    with starts.warm():
        yield


def assert_nothing_is_lost(runs: int, seed: int, way: str = "forked", variants: int = 1) -> Counter[str]:
    said: list[str] = []
    counts = fuzz(runs, seed, way, said.append, variants=variants).counts
    assert counts["runs"] == runs * variants
    assert not counts["lost"] + counts["differing bits"], "\n".join(said)
    return counts


def test_nothing_is_lost() -> None:
    """Two seeds whose faults come at calls of the file system, early in the run: on any machine it is not over before."""
    counts = assert_nothing_is_lost(1, seed=11180) + assert_nothing_is_lost(1, seed=12627)
    assert counts["kills in a save"] >= 2
    assert all(counts[what] for what in ("kills", "preemptions", "damages", "resumes")), counts


def test_an_undisturbed_run_that_hangs_is_none_to_compare_with(monkeypatch: Patch) -> None:
    """Seed 200005, on a machine that was busy: it was cut off in step 14, and its kills were said to differ from it."""
    monkeypatch.setattr(starts, "START_SECONDS", 1)
    monkeypatch.setattr(Agreement, "ask", lambda *_: time.sleep(60))
    with pytest.raises(AssertionError, match=r"ranks \[0\] hung"):
        results.reference(Setup("single", 1, SIZE))


@pytest.mark.soak
def test_a_run_that_is_slow_and_not_hanging_is_waited_for(tmp_path: Path, monkeypatch: Patch) -> None:
    ask = Agreement.ask

    def slowly(self: Agreement, *given: Any) -> Any:
        time.sleep(1.5)
        return ask(self, *given)

    monkeypatch.setattr(starts, "START_SECONDS", 15)
    monkeypatch.setattr(Agreement, "ask", slowly)
    ended = starts.start(Setup("single", 1, SIZE), tmp_path / "out")
    assert (ended.codes, ended.hung) == ([0], "")
    assert ended.seconds > starts.START_SECONDS


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_nothing_is_lost_in_many_runs() -> None:
    assert_nothing_is_lost(25, seed=1000)


def test_a_seed_decides_all_that_is_drawn() -> None:
    plans = [draw(seed) for seed in range(1000)]
    assert plans == [draw(seed) for seed in range(1000)]
    drawn = {(plan.setup.recipe, plan.setup.ranks) for plan in plans}
    own = {(recipe, ranks) for recipe, ranks in drawn if recipe == OWN_RECIPE}
    usual = {(recipe, ranks) for recipe, choices in RANKS.items() for ranks in choices}
    usual |= {("lora", ranks) for ranks in RANKS["transfer_learning"]}
    usual |= {("parallel_mesh", ranks) for ranks in RANKS["fsdp"]}
    usual |= {("comm_hooks", ranks) for ranks in RANKS["ddp"]}
    assert drawn - own == usual | {("tensor_parallel", 2), ("context_parallel", 2), ("expert_parallel", 2)}
    assert {ranks for _, ranks in own} == {1, 2, 3, 4}
    assert {plan.setup.task for plan in plans} == {plan.setup.task for plan in plans if plan.sizes} == set(TASKS)
    assert {word for plan in plans for word in plan.setup.words if word.startswith("task.per_rank")}
    assert not any(word.startswith("task.per_rank") for plan in plans if plan.sizes for word in plan.setup.words)
    faults = [fault for plan in plans for fault in plan.faults]
    assert {fault.sign for fault in faults} == {signal.SIGKILL, *SIGNALS}
    assert {damage.kind for plan in plans for damage in plan.damages if damage} == set(DAMAGES)
    in_saves = [fault for fault in faults if fault.share is None]
    assert 0.4 < len(in_saves) / len(faults) < 0.8, "deaths inside saving, committing and pruning must be common"


def test_a_seed_s_variants_train_the_same_and_are_struck_otherwise() -> None:
    for seed in range(300):
        first, plans = draw(seed), [draw(seed, variant) for variant in (1, 2, 3)]
        assert plans == [draw(seed, variant) for variant in (1, 2, 3)]
        kept = {(plan.setup.recipe, plan.setup.ranks, plan.setup.words, bool(plan.sizes)) for plan in [first, *plans]}
        assert len(kept) == 1
        assert len({plan.faults for plan in [first, *plans]}) == 4
        for plan in plans:
            assert 3 <= len(plan.faults) == len(plan.damages) <= 6
            assert not plan.sizes or len(plan.sizes) == len(plan.faults) + 1
            ranks = plan.sizes or (plan.setup.ranks,) * len(plan.faults)
            assert all(fault.rank < size for fault, size in zip(plan.faults, ranks, strict=False))


def test_places_are_worded_without_steps_and_ranks() -> None:
    assert place_of("a moment") == "a moment of training"
    assert place_of("before rename .writing-step-00000012") == "before rename: a checkpoint's folder"
    assert place_of("within .writing-step-00000012/__1_0.distcp") == "within: a shard"
    assert place_of("after fsync .writing-step-00000012/.__1_hash.json.77") == "after fsync: a rank's hashes"
    assert place_of("before open .LATEST.321") == "before open: LATEST"
    assert place_of("before mkdir .") == "before mkdir: a checkpoint's folder"


def test_the_record_s_page_is_what_its_series_say() -> None:
    assert PAGE.read_text() == fuzz_page(recorded_series())


def test_a_series_is_summed_with_the_others_and_its_failures_are_named() -> None:
    tally = Tally(9)
    tally.counts.update({"runs": 10, "kills": 1234, "lost": 1})
    tally.places["within: a shard"], tally.trained["ddp"] = 1200, 1234
    tally.failed.append("seed 7: ranks [0, 1] hung")
    one = series_of(tally, "forked", 0, 4, 600)
    page = fuzz_page([one, one])
    assert "| forked | 0–9, 4 variants | 10 | 10 | 1,234 |" in page
    assert "**In all: 20 runs, 2,468 kills, 2 lost, 0 with differing bits.**" in page
    assert "\n- seed 7: ranks [0, 1] hung\n" in page
    assert "| within: a shard | 2,400 |" in page


@pytest.mark.slow
def test_a_rank_that_dies_on_its_way_to_the_first_save_leaves_nobody_waiting(tmp_path: Path) -> None:
    setup = killed_in_the_third_save("ddp", 2).setup
    outcome = play(Plan(setup, (Fault(signal.SIGKILL, 0, call=1, at="mkdir ."),), (None,)), tmp_path)
    assert outcome.wrong == ""
    assert outcome.counts["kills"] == 1


# Whether it would be seen -----------------------------------------------------------------------------------------


def killed_in_the_third_save(recipe: str = "single", ranks: int = 1, damage: Damage | None = None) -> Plan:
    saving = ("checkpoint.every=4", "checkpoint.keep=3")
    setup = Setup(recipe, ranks, (*SIZE, *OWN.get(recipe, ()), "optim=sgd"), saving)
    return Plan(setup, (Fault(signal.SIGKILL, 0, call=1, at="rename .writing-step-00000012"),), (damage,))


def after_restore(patch: Patch, change: Callable[[TrainingState], Any]) -> None:
    """Have every resume do something more than to restore."""
    restore = TrainingState.restore

    def broken(self: TrainingState, *args: Any) -> None:
        restore(self, *args)
        change(self)

    patch.setattr(TrainingState, "restore", broken)


def no_momentum(patch: Patch) -> None:
    after_restore(patch, lambda state: state.optimizer.state.clear())


def one_last_bit(patch: Patch) -> None:
    def change(state: TrainingState) -> None:
        weight = next(state.module.parameters()).data.view(-1)
        weight[0] = torch.nextafter(weight[0], torch.tensor(float("inf")))

    after_restore(patch, change)


def no_running_statistics(patch: Patch) -> None:
    def change(state: TrainingState) -> None:
        for name, buffer in state.module.named_buffers():
            if name.endswith("running_mean"):
                buffer.zero_()

    after_restore(patch, change)


def other_random_numbers(patch: Patch) -> None:
    after_restore(patch, lambda state: torch.manual_seed(1))


def samples_shifted(patch: Patch) -> None:
    sampler = batches.StepSampler

    def shifted(size: int, batch_size: int, seed: int, rank: int, ranks: int, first: int, last: int, *more: Any) -> Any:
        return sampler(size, batch_size, seed, rank, ranks, first + bool(first), last + bool(first), *more)

    patch.setattr(batches, "StepSampler", shifted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (None, ""),
        (no_momentum, "metrics.jsonl line 1"),
        (one_last_bit, "metrics.jsonl line 1"),
        (no_running_statistics, "metrics.jsonl line 15"),
        (other_random_numbers, "checkpoint: rng."),
        (samples_shifted, "metrics.jsonl line 1"),
    ],
)
def test_a_restore_that_forgets_is_reported(
    broken: Callable[[Patch], None] | None, words: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    if broken:
        broken(monkeypatch)
    outcome = play(killed_in_the_third_save(), tmp_path)
    assert outcome.counts == {"kills": 1, "kills in a save": 1, "resumes": 1}
    assert words in outcome.wrong, outcome.wrong
    assert bool(outcome.wrong) is bool(broken)


@pytest.mark.slow
def test_a_damaged_checkpoint_that_is_taken_is_reported(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(directory, "find_damage", lambda *_: "")
    plan = killed_in_the_third_save(damage=Damage("flip", file=0.5, place=0.5))
    outcome = play(plan, tmp_path)
    assert outcome.counts["damages"] == 1
    assert outcome.wrong.startswith(("resumed from step-00000008, not from", "undisturbed, and yet exit codes [1]"))


@pytest.mark.slow
def test_a_save_that_is_not_atomic_is_reported(tmp_path: Path, monkeypatch: Patch) -> None:
    """Written under the final name, a half-saved checkpoint looks like one that broke."""
    monkeypatch.setattr(CheckpointSaver, "_temporary", lambda self, step: self.folder / folder_name(step))
    plan = killed_in_the_third_save()
    early = Fault(signal.SIGKILL, 0, call=1, at="fsync step-00000012/.metadata")
    outcome = play(Plan(plan.setup, (early,), plan.damages), tmp_path)
    assert outcome.wrong.startswith("resumed from step-00000008, not from step-00000012"), outcome.wrong


@pytest.mark.slow
def test_a_checkpoint_written_twice_is_reported(tmp_path: Path, monkeypatch: Patch) -> None:
    def touch(self: TrainingState) -> None:
        for file in (tmp_path / "out" / "checkpoints").glob("step-00000008/*"):
            file.write_bytes(file.read_bytes())

    after_restore(monkeypatch, touch)
    outcome = play(killed_in_the_third_save(), tmp_path)
    assert outcome.wrong.endswith("was written again")


@pytest.mark.slow
def test_a_signal_that_only_one_rank_obeys_is_reported(tmp_path: Path, monkeypatch: Patch) -> None:
    """Without the agreement a signalled rank would leave the others in a collective."""

    def alone(self: Agreement, step: int, save: bool) -> tuple[int, bool]:
        return self._listener.received, save

    plan = killed_in_the_third_save("ddp", 2)
    results.reference(Setup(plan.setup.recipe, plan.setup.ranks, plan.setup.words))  # while it does not hang
    monkeypatch.setattr(starts, "START_SECONDS", 8)
    monkeypatch.setattr(Agreement, "ask", alone)
    fault = Fault(signal.SIGUSR1, 1, call=1, at="fsync .writing-step-00000004/__1_0.distcp")
    outcome = play(Plan(plan.setup, (fault,), plan.damages), tmp_path)
    assert outcome.wrong, outcome.events


@pytest.mark.slow
def test_a_hang_is_reported_with_the_line_where_it_stands(tmp_path: Path, monkeypatch: Patch) -> None:
    plan = killed_in_the_third_save("ddp", 2)
    results.reference(Setup(plan.setup.recipe, plan.setup.ranks, plan.setup.words))  # while it does not hang
    monkeypatch.setattr(starts, "START_SECONDS", 3)
    monkeypatch.setattr(Agreement, "ask", lambda *_: time.sleep(1000))
    outcome = play(Plan(plan.setup, (Fault(),), (None,)), tmp_path)
    assert outcome.wrong.startswith("ranks [0, 1] hung")
    assert "test_fuzz.py" in outcome.wrong


# The real launcher ------------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_the_command_a_user_types_loses_nothing(tmp_path: Path) -> None:
    """Preempted; started again, loses a rank, and starts its ranks again by itself."""
    blows = (Blow(signal.SIGTERM, -1, 4, 0.0), Blow(signal.SIGKILL, 1, 11, 0.0))
    outcome = play_launched(blows, tmp_path)
    assert not outcome.wrong, outcome.wrong
    assert outcome.counts == {"signals": 1, "preemptions": 1, "kills": 1, "resumes": 2}, outcome.events


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_the_launcher_loses_nothing_whoever_is_killed(tmp_path: Path) -> None:
    assert_nothing_is_lost(3, seed=1, way="launched")


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_cluster_s_jobs_lose_nothing_whatever_goes_down_there() -> None:
    counts = assert_nothing_is_lost(1, seed=1, way="slurm")
    assert counts["kills"] == 2, counts
