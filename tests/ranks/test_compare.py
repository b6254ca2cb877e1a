"""`recipes.compare` runs recipes as they are, sets their figures side by side, and makes a page of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import signal
import time
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401  once here, not once in every forked rank
import pytest

from lockstep import UserError
from lockstep.compare import plots, tables
from lockstep.compare.cases import Case, common_words, plan_cases
from lockstep.compare.figures import ComparisonRow, RunPlan, comparison_rows
from lockstep.compare.html_report import html_report
from lockstep.compare.measure import run_to_end
from lockstep.compare.report import ComparisonReport
from lockstep.compare.verdicts import verdicts
from lockstep.distributed.signals import Preempted
from lockstep.launch import recipe_process
from lockstep.launch.validate import validate
from lockstep.utils.system import OtherWork, busy_seconds, own_seconds, system_info
from lockstep.verify.rows import COMPARED
from recipes import compare, ddp
from tests.helpers.browser import Browser
from tests.helpers.harness import command, compose_config, execute, result

MIB = 2**20


def made_up(speed: float, ranks: int = 1, **more: Any) -> dict[str, Any]:
    """What a run of batches of 96 reports."""
    found: dict[str, Any] = {
        "samples_per_second": speed,
        "step_seconds_p50": 96 / speed,
        "step_seconds_p95": 100 / speed,
        "peak_memory_bytes_by_rank": [700 * MIB] * ranks,
        "state_bytes_by_rank": [128 * MIB] * ranks,
        "eval_accuracy": 0.97,
        "setup_seconds": 3.0,
        "wall_seconds": 9.0,
        "start_seconds": 4.0,
    }
    return found | more


SINGLE, DDP, PIPELINE = Case("single", 1, 1), Case("ddp", 2, 2), Case("pipeline_parallel", 2, 2)
THREADS = Case("data_parallel", 2, 2, unit="replica")
TALK = {"communication_seconds_by_rank": [0.08, 0.10], "exposed_communication_seconds_by_rank": [0.02, 0.04]}
CPU = {"cores_busy_by_rank": [0.9, 1.0], "main_thread_busy_by_rank": [0.5, 0.7], "data_wait_share_by_rank": [0.0, 0.02]}
FOUND = {
    SINGLE: [made_up(100), made_up(50), made_up(110)],
    DDP: [made_up(180, 2, **TALK, **CPU), made_up(100, 2, **TALK, **CPU), made_up(200, 2, **TALK, **CPU)],
    PIPELINE: [
        made_up(120, 2, peak_memory_bytes_by_rank=[600 * MIB, 300 * MIB], idle_shares=[0.1, 0.3], **TALK)
        for _ in range(3)
    ],
    THREADS: [
        made_up(90, thread_seconds=3.0, forward_seconds=2.0, cores_busy_by_rank=[1.4], eval_accuracy=0.96)
        for _ in range(3)
    ],
}


def test_runs_on_sequences_have_tokens_and_mfu() -> None:
    runs = [made_up(speed, tokens_per_second=64 * speed, model_flops_per_second=2e9, mfu=0.41) for speed in (2, 1, 4)]
    (row,) = comparison_rows({SINGLE: runs}, unit="sequences")
    assert (row.tokens_per_second, row.model_flops_per_second, row.mfu) == (128, 2e9, 0.41)
    cells = tables.text_columns(tables.SPEED, [row])
    assert (cells["tokens/s"], cells["GFLOP/s"], cells["MFU"]) == (["128"], ["2"], ["41.0 %"])
    assert not {"tokens/s", "GFLOP/s", "MFU"} & tables.text_columns(tables.SPEED, made()).keys(), "images have none"


def made() -> list[ComparisonRow]:
    return comparison_rows(
        {
            case: [run | {"folder": f"runs/{case.name}-{number}"} for number, run in enumerate(runs, start=1)]
            for case, runs in FOUND.items()
        }
    )


# Figures --------------------------------------------------------------------------------------------------------------


def test_speedups_are_taken_within_a_round() -> None:
    """Over all rounds the medians would say 180 / 100; the second round was slow for both."""
    single, ddp = made()[:2]
    assert (ddp.samples_per_second, ddp.slowest, ddp.fastest) == (180, 100, 200)
    assert (single.against, single.speedup, single.efficiency) == (None, None, None)
    assert ddp.against == "single"
    assert (ddp.speedup_from, ddp.speedup, ddp.speedup_to) == (1.8, 200 / 110, 2.0)
    assert ddp.efficiency == pytest.approx(200 / 110 / 2)


def test_a_step_is_taken_apart() -> None:
    _, ddp, pipeline, threads = made()
    step = 96 / 180
    assert ddp.communication_seconds == pytest.approx(0.09)
    assert ddp.exposed_share == pytest.approx(0.03 / step)
    assert ddp.parts["waiting for data"] == pytest.approx(0.01 * step)
    assert ddp.parts["exposed communication"] == pytest.approx(0.03)
    assert sum(ddp.parts.values()) == pytest.approx(step)
    assert "exposed communication" not in pipeline.parts, "its ranks' waits for each other are idle time"
    assert pipeline.parts["idle"] == pytest.approx(0.2 * 96 / 120)
    assert threads.parts == {}, "nothing is known but its length"
    assert ddp.cores_busy == pytest.approx(1.9), "over all ranks"
    assert ddp.main_threads_busy == pytest.approx(0.6), "of a rank"
    assert threads.threads_busy == 1.5


def test_memory_is_by_rank() -> None:
    pipeline = made()[2]
    assert pipeline.memory_bytes == [600 * MIB, 300 * MIB]
    profiled = [made_up(100), made_up(100, peak_memory_bytes_by_rank=[900 * MIB], profiled_steps=5)]
    assert comparison_rows({SINGLE: profiled})[0].memory_bytes == [700 * MIB], "a profile is no part of a recipe"
    assert pipeline.memory_imbalance == pytest.approx(600 / 450)


def test_without_single_a_recipe_is_set_against_its_fewest_ranks() -> None:
    found = {Case("ddp", number, number): [made_up(60.0 * number, number)] for number in (2, 4)}
    found[PIPELINE] = FOUND[PIPELINE][:1]
    two, four, other = comparison_rows(found)
    assert (two.speedup, other.speedup) == (None, None)
    assert (four.against, four.speedup, four.efficiency) == ("ddp on 2 ranks", 2.0, 1.0)


def test_the_sentences_say_what_the_figures_mean() -> None:
    said = verdicts(made())
    assert said[0] == "ddp on 2 ranks is the fastest: 180 images/s (100 to 200 over 3 rounds)."
    assert said[1] == "single trains 100 images/s (50 to 110 over 3 rounds)."
    assert said[2] == (
        "ddp on 2 ranks is 1.82 × single (1.80 to 2.00 over 3 rounds), an efficiency of 91 %; "
        "6 % of a step is exposed communication."
    )
    assert said[3].endswith("its parts sit idle 10, 30 % of the time.")
    assert "a difference within the spread of the rounds" in said[4], "0.82, 0.90 and 1.80 times"
    assert "of its 2 threads, 1.50 compute at a time in the forward" in said[4]
    assert "its one process keeps 1.40 of 2 cores busy" in said[4]
    assert said[5] == "None of them waits for data for more than 1.0 % of a step."
    assert "pipeline_parallel on 2 ranks (1.33 × the mean)" in said[6]
    assert said[7].startswith("Accuracies go from 96.00 % (data_parallel with 2 replicas) to 97.00 % (")
    assert verdicts([]) == ["No run came to its end."]


def test_a_busy_machine_is_named_first() -> None:
    rows, cores = made(), len(os.sched_getaffinity(0))
    rows[1].cores_of_others = 0.05 * cores
    assert "busy" not in verdicts(rows)[0]
    rows[1].cores_of_others = 0.3 * cores
    assert verdicts(rows)[0].startswith(f"The machine was busy: other work had up to {0.3 * cores:.1f} of its ")


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_the_work_of_others_is_what_is_neither_this_process_s_nor_its_children_s() -> None:
    mine, stranger = OtherWork(), OtherWork()
    process = multiprocessing.get_context("fork").Process(target=spin, args=(1.0,))
    process.start()
    spin(0.5)
    process.join()
    seconds = time.perf_counter() - mine.began
    assert busy_seconds() - mine.all > 1.4
    stranger.own = own_seconds()  # as one to whom these processes are not known
    assert (stranger.cores() - mine.cores()) * seconds == pytest.approx(1.5, abs=0.2)


def test_what_is_planned_stands_beside_what_was_measured() -> None:
    single, ddp = comparison_rows(
        {case: [run | {"sent_bytes_by_rank": [4e6]} for run in FOUND[case]] for case in (SINGLE, DDP)}
    )
    single.planned = RunPlan(0.48, 0, 300 * MIB, 128 * MIB, "cpu")
    ddp.planned = RunPlan(96 / 180, 4_000_000, 350 * MIB, 64 * MIB, "cuda")
    assert single.planned_ratios == {"seconds": pytest.approx(0.5), "state": 1}, "a CPU's peak is the whole process's"
    assert ddp.planned_ratios == {"seconds": pytest.approx(1), "sent": 1, "state": 0.5, "peak": 0.5}
    cells = tables.text_columns(tables.PLAN, [single, ddp])
    assert (cells["plan ms"], cells["of step"], cells["of peak"]) == (["480", "533"], ["0.50", "1.00"], ["", "0.50"])
    said = verdicts([single, ddp])[-1]
    assert said == "recipes.plan predicts 0.50 to 1.00 of the steps' time, and the bytes sent of 1 of 1."
    assert tables.text_columns(tables.PLAN, made()) == {}, "nothing was planned"


@pytest.mark.soak
def test_real_runs_send_and_hold_what_is_planned(tmp_path: Path) -> None:
    words = ["recipes=[ddp,fsdp,data_parallel]", "task=language", "max_steps=8", "nproc=2", "rounds=1", "hardware=h100"]
    done = command("-m", "recipes.compare", *words, "out=run", cwd=tmp_path, timeout=500)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run" / "compare.json").read_text())
    rows = {row["recipe"]: row for row in found["rows"]}
    for name in ("ddp", "fsdp"):
        row = rows[name]
        assert row["planned"]["sent"] == pytest.approx(row["sent_bytes"], rel=1e-3), name
        assert row["planned"]["state"] == max(row["state_bytes"]), name
        assert row["planned"]["seconds"] > 0
    assert rows["data_parallel"]["planned"] is None
    assert "plan of data_parallel with 2 replicas: has no ranks, and a plan is made of a rank" in found["left_out"]
    assert "plan ms" in (tmp_path / "run" / "report.html").read_text()


def test_columns_that_say_nothing_are_left_out() -> None:
    found = tables.text_columns(tables.STEP_TIME, comparison_rows({SINGLE: FOUND[SINGLE]}))
    assert found == {}
    found = tables.text_columns(tables.STEP_TIME, made())
    assert found["idle"] == ["", "", "10, 30 %", ""]
    assert {"recipe", "ranks", "exposed", "threads busy"} <= set(found)
    everything = {name for columns in tables.COLUMN_GROUPS.values() for name in columns}
    assert everything | {"ranks"} == set(tables.MEANINGS), "each column is explained"


# What is run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "numbers"),
    [("nproc=1,2,4", [1, 2, 4]), ("nproc=[1,2]", [1, 2]), ("nproc=2", [2]), ("nproc=null", None), ("seed=0", None)],
)
def test_several_numbers_of_ranks_are_typed_as_they_are_said(typed: str, numbers: list[int] | None) -> None:
    config = compose_config(compare.train, typed)
    assert (config.nprocs, config.nproc) == (numbers, None)


def test_every_recipe_gets_the_number_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    names = "recipes=[single,data_parallel,ddp,model_parallel,pipeline_parallel,transfer_learning]"
    config = compose_config(compare.train, names, "nproc=4,1", "max_steps=7", "device=cpu")
    cases, left_out = plan_cases(config, compare.train, compare.chosen_recipes(config.recipes))
    assert [case.label for case in cases] == [
        "single",
        "data_parallel with 1 replica",
        "data_parallel with 4 replicas",
        "ddp on 1 rank",
        "ddp on 4 ranks",
        "model_parallel on 1 rank",
        "pipeline_parallel on 4 ranks",
    ]
    own = {case.label: set(case.words) - {"max_steps=7", "device=cpu", "checkpoint.minutes=0"} for case in cases}
    assert own["single"] == own["model_parallel on 1 rank"] == {"threads=1"}, "a rank is the same cores in all"
    assert own["data_parallel with 4 replicas"] == {"replicas=4", "threads=1"}
    assert own["ddp on 4 ranks"] == {"nproc=4", "threads=1"}
    assert {case.label: case.devices for case in cases}["ddp on 4 ranks"] == 4
    assert {case.profile for case in cases} == {5}, "of 7 steps the first is the warm-up"
    assert all("max_steps=7" in case.words for case in cases)
    assert left_out[0].startswith("pipeline_parallel on 1 rank: stages=2: a pipeline takes a rank for each stage")
    assert left_out[1:] == [
        f"transfer_learning on {ranks}: trains a part of a trained model, which is not the same work"
        for ranks in ("1 rank", "4 ranks")
    ]
    config = compose_config(compare.train, "recipes=[single,ddp]", "nproc=2", "device=cpu")
    alone, _ = plan_cases(config, compare.train, compare.chosen_recipes(config.recipes))
    assert [case.devices for case in alone] == [4, 4], "of one number, each has the whole machine"


class Stand:
    """Stands for `python -m recipes.NAME` as recipe_process.py starts it: notes that it was asked, and has a result."""

    def __init__(self, target: str, words: list[str], out: Path, folder: str, variables: dict[str, str]) -> None:
        asked = out.parent.parent.parent / "asked"
        with asked.open("a") as stream:
            stream.write(f"{out.name}\n")
        number = len(asked.read_text().splitlines())
        if os.environ.get("DIES_AT") == str(number):
            os._exit(9)
        self.fails = os.environ.get("FAILS") == target
        out.mkdir()
        (out / "words").write_text(" ".join(words))
        (out / "result.json").write_text(json.dumps(made_up(100.0 * number)))
        if target == "lockstep.recipes.verify":
            row = {"recipe": "ddp", "precision": "fp64", "ranks": 2, "steps": 5, "tolerance": 1e-10, "verdict": "equal"}
            (out / "verify.json").write_text(json.dumps({"rows": [row | dict.fromkeys(COMPARED, 1e-15)]}))

    def ended(self, seconds: float) -> bool:
        if self.fails:
            raise recipe_process.RecipeFailed("error: it broke")
        return True


WORDS = ["recipes=[single,ddp]", "rounds=2", "max_steps=12"]


def asked(folder: Path) -> list[str]:
    return (folder / "asked").read_text().split()


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_process, "RecipeProcess", Stand)


def carry_out(folder: Path, *words: str) -> dict[str, Any]:
    execute(compare.train, folder / "run", 1, *words)
    return dict(json.loads((folder / "run" / "compare.json").read_text()))


def test_runs_take_turns(stand: None, tmp_path: Path) -> None:
    found = carry_out(tmp_path, *WORDS, "verify=true")
    assert asked(tmp_path) == ["single-1-1", "ddp-2-1", "single-1-2", "ddp-2-2", "verify"]
    single, ddp = found["rows"]
    assert (single["slowest"], single["fastest"]) == (100, 300)
    assert ddp["speedup"] == pytest.approx((200 / 100 + 400 / 300) / 2)
    assert ddp["folders"] == ["runs/ddp-2-1", "runs/ddp-2-2"]
    assert found["verified"][0]["verdict"] == "equal"
    assert "Held to recipes.single" in (tmp_path / "run" / "report.html").read_text()
    assert {path.stem for path in (tmp_path / "run").glob("*.png")} == {"compare", "throughput", "memory"}
    profiled = {name: "profile=" in (tmp_path / "run/runs" / name / "words").read_text() for name in asked(tmp_path)}
    assert [name for name, yes in profiled.items() if yes] == ["single-1-2", "ddp-2-2"], "a round measures memory alone"
    words = shlex.split(found["command"])
    assert {*WORDS, "verify=true"} <= set(words), "the command repeats it"
    assert not any(word.startswith("out=") for word in words)


@pytest.mark.slow
def test_what_has_ended_is_not_run_again(stand: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIES_AT", "3")
    with pytest.raises(AssertionError, match="died"):
        carry_out(tmp_path, *WORDS)
    (tmp_path / "run" / "runs" / "single-1-2").mkdir()  # it was cut off in the midst of a run
    monkeypatch.delenv("DIES_AT")
    found = carry_out(tmp_path, *WORDS)
    assert asked(tmp_path) == ["single-1-1", "ddp-2-1", "single-1-2", "single-1-2", "ddp-2-2"]
    assert [row["rounds"] for row in found["rows"]] == [2, 2]
    carry_out(tmp_path, *WORDS)
    assert len(asked(tmp_path)) == 5, "only the report is made again"


@pytest.mark.slow
def test_a_recipe_that_fails_is_named_and_the_report_is_about_the_others(
    stand: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILS", "lockstep.recipes.ddp")
    with pytest.raises(AssertionError, match="CheckFailed: ddp on 2 ranks: error: it broke"):
        carry_out(tmp_path, *WORDS)
    assert asked(tmp_path) == ["single-1-1", "ddp-2-1", "single-1-2"], "not tried again in the second round"
    found = json.loads((tmp_path / "run" / "compare.json").read_text())
    assert found["failed"] == ["ddp on 2 ranks: error: it broke"]
    assert [row["recipe"] for row in found["rows"]] == ["single"]
    assert "ddp on 2 ranks: error: it broke" in (tmp_path / "run" / "report.html").read_text()
    monkeypatch.delenv("FAILS")
    assert carry_out(tmp_path, *WORDS)["failed"] == [], "started again, it gets another chance"


@pytest.mark.slow
def test_an_end_that_was_set_differently_is_refused(stand: None, tmp_path: Path) -> None:
    carry_out(tmp_path, *WORDS)
    config = compose_config(compare.train, *WORDS[:-1], "max_steps=13", f"out={tmp_path / 'run'}")
    with pytest.raises(UserError, match=r"max_steps=13: the runs in out=.* have max_steps=12"):
        validate(config, compare.train, 1)


def test_where_it_runs_is_not_handed_on_to_the_recipes() -> None:
    config = compose_config(compare.train, *WORDS, "+cluster=slurm", "cluster.nodes=2")
    elsewhere = compose_config(compare.train, *WORDS)
    assert common_words(config, compare.train, ddp.train) == common_words(elsewhere, compare.train, ddp.train)


def test_a_signal_ends_the_run_that_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[str] = []

    class Endless:
        def __init__(self, *_: Any) -> None:
            listener.received = signal.SIGTERM

        def ended(self, seconds: float) -> bool:
            return False

        def stop(self) -> bool:
            left.append("asked to")
            return True

    listener = SimpleNamespace(received=0, announce=lambda number: left.append(signal.Signals(number).name))
    monkeypatch.setattr(recipe_process, "RecipeProcess", Endless)
    run: Any = SimpleNamespace(listener=listener)
    with pytest.raises(Preempted, match="SIGTERM"):
        run_to_end(run, "recipes.ddp", [], tmp_path / "ddp-2-1")
    assert left == ["SIGTERM", "asked to"]
    assert not list(tmp_path.iterdir()), "it has not ended, and will be run again"


@pytest.mark.slow
def test_compare_reports_what_each_run_reported(tmp_path: Path) -> None:
    words = ["recipes=[data_parallel,model_parallel]", "max_steps=3", "global_batch_size=24", "rounds=1", "out=run"]
    done = command("-m", "recipes.compare", *words, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run" / "compare.json").read_text())["rows"]
    assert [row["recipe"] for row in found] == ["data_parallel", "model_parallel"]
    for row in found:
        run = result(tmp_path / "run" / row["folders"][0])
        assert run["steps"] == 3, "the runs got this config"
        assert row["exposed_share"] == 0, "one process was profiled, and does not communicate"
        assert row["slowest"] == row["fastest"] == run["samples_per_second"]
        assert row["start_seconds"] > run["setup_seconds"] > 0
        assert row["state_bytes"] == [12 * run["parameters"]], "weights, gradients and momentum in fp32"
    assert 0 < found[0]["threads_busy"] <= 2.5
    assert len(found[1]["idle_shares"]) == 2
    assert "data_parallel" in done.stdout
    cells = [
        line
        for line in done.stdout.splitlines()
        if line.startswith(("data_parallel  ", "model_parallel  ", "recipe  "))
    ]
    assert len(cells) >= 9, "three tables"
    assert max(map(len, cells)) <= 80


# The page -------------------------------------------------------------------------------------------------------------

HOSTILE = '<script>alert("1")</script> & <b>'


def made_up_report(**more: Any) -> ComparisonReport:
    verified = {"recipe": "ddp", "precision": "fp64", "ranks": 2, "steps": 5, "tolerance": 1e-10, "variant": HOSTILE}
    verified |= {"verdict": "OFF: loss", **dict.fromkeys(COMPARED, 1e-15)}
    given: dict[str, Any] = {
        "title": f"resnet18 {HOSTILE}",
        "about": {"on": HOSTILE},
        "rows": made(),
        "environment": system_info(["node1"], "cpu", "gloo") | {"cpu": HOSTILE},
        "config": f"out: {HOSTILE}\n",
        "command": f"python -m recipes.compare out='{HOSTILE}'",
        "out": HOSTILE,
        "written": "2030-01-01",
        "verified": [verified],
        "left_out": [HOSTILE],
        "failed": [HOSTILE],
    }
    return ComparisonReport(**given | more)


class Outline(HTMLParser):
    """The tags of a page with their attributes, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def of(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(html_report(made_up_report(), plots.make_plots(made())))
    return file


def test_the_page_is_whole_and_says_nothing_that_it_was_not_told(report: Path) -> None:
    text = report.read_text()
    outline = Outline(text)
    assert not outline.of("script")
    assert not outline.of("b"), "what it quotes stays text"
    addresses = [value for _, attributes in outline.tags for name, value in attributes.items() if name in ADDRESSES]
    assert addresses
    assert all(str(value).startswith(("data:", "runs/")) for value in addresses), "nothing is fetched"
    assert "://" not in text
    assert "url(" not in text
    images = outline.of("img")
    assert len(images) == 3, "throughput, a step taken apart, memory; one number of ranks has no scaling"
    assert all(len(image["alt"] or "") > 40 for image in images)
    headings = [tag for tag, _ in outline.tags if tag in ("h1", "h2", "h3")]
    assert headings[0] == "h1"
    assert headings.count("h1") == 1
    assert all(cell["scope"] in ("row", "col") for cell in outline.of("th"))
    assert len(outline.of("caption")) == len(outline.of("table")) == 4
    assert all(name in text for name in ("OFF: loss", "node1", "runs/ddp-2-3", "python -m recipes.compare"))


ADDRESSES = ("src", "srcset", "href")


def test_a_page_without_a_single_run_is_still_one(tmp_path: Path) -> None:
    text = html_report(made_up_report(rows=[]), [])
    assert "No run came to its end." in text
    assert not Outline(text).of("img")


def test_the_page_opens_in_a_browser_without_a_network(report: Path, tmp_path: Path) -> None:
    from PIL import Image

    shots = {}
    with Browser(tmp_path) as browser:
        for width, dark in ((1280, False), (390, False), (1280, True)):
            browser.open(report, width, dark=dark)
            assert browser.evaluate("[...document.images].map(image => image.naturalWidth > 100)") == [True] * 3
            assert browser.evaluate("document.documentElement.scrollWidth") <= width, "only tables and plots scroll"
            shot = browser.screenshot(tmp_path / f"{width}-{dark}.png")
            shots[width, dark] = Image.open(BytesIO(shot)).convert("L")
        tables = "[...document.querySelectorAll('.scroll')]"
        browser.open(report, 390)
        assert not browser.evaluate(f"{tables}.some(each => each.scrollWidth > each.clientWidth)"), "nor on a telephone"
        named = "[...document.querySelectorAll('td')].every(each => each.dataset.name)"
        assert browser.evaluate(named), "there a figure stands beside its column's name"
        assert browser.evaluate("document.title").startswith("resnet18 <script>alert(")
        assert (browser.requests, browser.complaints) == ([], [])
        assert browser.pdf().startswith(b"%PDF")
    for (width, dark), shot in shots.items():
        assert shot.width == width
        histogram = shot.histogram()
        assert sum(map(bool, histogram)) > 50, "it is not blank"
        assert max(range(256), key=histogram.__getitem__) < 60 if dark else max(histogram) == histogram[255]
