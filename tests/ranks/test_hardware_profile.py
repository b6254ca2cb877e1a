"""Hardware as a profile: measured on real ranks, inside a node and between nodes, by a command and by a job."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from rich.table import Table

from lockstep.distributed.process_group import World
from lockstep.errors import UserError
from lockstep.plan import here, probes
from lockstep.plan.hardware import ACROSS, MEASURED_KINDS, Hardware, load_hardware
from lockstep.plan.hardware_report import hardware_tables
from lockstep.plan.here import measure_hardware, ranks_by_node
from recipes import doctor, plan
from tests.helpers.harness import command, execute, run_ranks
from tests.helpers.slurm_box import Box

INSIDE = {name for kind in MEASURED_KINDS for name in (kind, f"{kind}, work")}
BETWEEN = {name for kind in MEASURED_KINDS for name in (kind + ACROSS, f"{kind}{ACROSS}, work")}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each probe once and shortly, for this process and the ranks it forks."""
    monkeypatch.setattr(here, "ROUNDS", 1)
    monkeypatch.setattr(here, "WINDOW", 1e-4)
    monkeypatch.setattr(here, "MATRIX_SIDE", {"cpu": 64})
    monkeypatch.setattr(here, "COPIED", {"cpu": 2**16})
    monkeypatch.setattr(probes, "MESSAGES", (2**10, 2**14, 2**17))
    monkeypatch.setattr(here, "operation_probes", list)


def measured(world: World, hosts: list[str]) -> Hardware | str:
    """The profile of ranks that take themselves to be on these hosts."""
    try:
        return measure_hardware(replace(world, hosts=hosts))
    except UserError as error:
        return str(error)


def printed(table: Table) -> str:
    """As a terminal of 80 columns shows it."""
    console = Console(width=80)
    with console.capture() as shown:
        console.print(table)
    return shown.get()


@pytest.mark.usefixtures("quick")
def test_collectives_are_measured_in_a_node_and_between_nodes() -> None:
    found = run_ranks(measured, 4, ["a", "a", "b", "b"], timeout=120)
    profile = found[0]
    assert found == [profile] * 4, "the same on every rank"
    assert (profile.nodes, profile.per_node) == (2, 2)
    assert profile.measured.keys() == INSIDE | BETWEEN
    assert all(seconds > 0 for name in MEASURED_KINDS for _, seconds in profile.measured[name + ACROSS])
    assert profile.name.startswith("these machines, cpu, ")
    said = "\n".join(printed(each) for each in hardware_tables(profile))
    for words in ("matrix products, fp64", "0.131", *MEASURED_KINDS):
        assert words in said
    assert said.count("all nodes") == len(MEASURED_KINDS)
    assert max(map(len, said.splitlines())) <= 80
    alone = run_ranks(measured, 2, ["a", "b"], timeout=120)[0]
    assert (alone.nodes, alone.per_node) == (2, 1)
    assert alone.measured.keys() == BETWEEN, "no two ranks share a node"
    assert alone.between != here.UNKNOWN


@pytest.mark.usefixtures("quick")
def test_the_doctor_writes_a_profile_and_what_to_type(tmp_path: Path) -> None:
    execute(doctor.train, tmp_path / "run", 2, "check=hardware")
    profile = load_hardware(str(tmp_path / "run" / "hardware.yaml"))
    assert (profile.nodes, profile.per_node, profile.measured.keys()) == (1, 2, INSIDE)
    said = (tmp_path / "run" / "ranks" / "0.log").read_text()
    assert "python -m recipes.plan gpus=2 hardware=" in said


@pytest.mark.usefixtures("quick")
def test_a_plan_of_this_machine_ends_with_all_that_was_typed(tmp_path: Path) -> None:
    execute(plan.train, tmp_path / "run", 2, "hardware=here", "task=language", "gpus=8", "price=2", "json=true")
    said = (tmp_path / "run" / "ranks" / "0.log").read_text()
    (typed,) = [line for line in said.splitlines() if "python -m recipes.plan" in line]
    for word in ("task.name=language", "gpus=8", "price=2.0", "json=true", "hardware="):
        assert f" {word}" in typed


def test_hosts_that_a_profile_cannot_describe_are_named() -> None:
    assert ranks_by_node(["a", "a", "b", "b"]) == [[0, 1], [2, 3]]
    for hosts in (["a", "a", "b"], ["a", "b", "a", "b"]):
        counts = "; there are 2 ranks on a, "
        with pytest.raises(UserError, match=f"as many ranks on each host, in a row{counts}"):
            ranks_by_node(hosts)


def test_what_has_no_say_is_refused(tmp_path: Path) -> None:
    done = command("-m", "recipes.doctor", "hardware", "recipes=[fsdp]", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: recipes=[fsdp]: means nothing to recipes.doctor hardware; leave it out\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_one_job_makes_a_cluster_s_profile_and_trainings_are_planned_with_it(tmp_path: Path) -> None:
    with Box(nodes=2) as box:
        job = ["-m", "recipes.doctor", "hardware", "+cluster=slurm", "cluster.nodes=2", "cluster.tasks_per_node=2"]
        done = box.run(sys.executable, *job, "threads=1", "out=run", cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "hardware=run/hardware.yaml" in done.stdout
    content = yaml.safe_load((tmp_path / "run" / "hardware.yaml").read_text())
    assert (content["nodes"], content["per_node"]) == (2, 2)
    assert content["measured"].keys() >= INSIDE | BETWEEN
    words = ("task=language", "recipes=[ddp,fsdp]", "gpus=4", "hardware=run/hardware.yaml", "json=true")
    done = command("-m", "recipes.plan", *words, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = {row["label"]: row for row in json.loads(done.stdout)["rows"]}
    assert {link for _, link, _ in rows["ddp"]["traffic"]} == {"between"}
    assert "cluster.nodes=2 cluster.tasks_per_node=2" in rows["ddp"]["command"]
    replicated = {kind: link for kind, link, _ in rows["fsdp replicate=2"]["traffic"]}
    assert replicated == {"all-gather": "inside", "reduce-scatter": "inside", "all-reduce": "between"}
