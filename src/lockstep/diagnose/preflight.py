"""Whether a run would work here: probes on every rank, and what their facts mean together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from lockstep.diagnose.bandwidth import bandwidth_plot, bandwidth_tables, judge_links, measure_bandwidth
from lockstep.diagnose.findings import Facts, Finding, failed_checks, findings_table, summarized
from lockstep.diagnose.probes.determinism import judge_determinism, probe_determinism
from lockstep.diagnose.probes.files import judge_files, probe_files
from lockstep.diagnose.probes.machine import (
    judge_cores,
    judge_devices,
    judge_pace,
    probe_cores,
    probe_device,
    probe_pace,
)
from lockstep.diagnose.probes.network import (
    judge_clocks,
    judge_names,
    judge_network,
    judge_ports,
    probe_clock,
    probe_network,
    probe_reach,
)
from lockstep.diagnose.probes.ranks import rank_and_host, value_or_error
from lockstep.diagnose.probes.resources import judge_resources, probe_resources
from lockstep.diagnose.probes.slurm import judge_slurm, probe_slurm
from lockstep.diagnose.probes.versions import judge_versions, probe_versions
from lockstep.distributed.collectives import broadcast_object, gather_objects
from lockstep.errors import CheckFailed
from lockstep.memory.predict import sharded_state_bytes
from lockstep.run import Run
from lockstep.utils.files import write_json
from lockstep.utils.text import count, short


@dataclass(frozen=True)
class Needs:
    """What a run needs from the machine.

    Attributes:
        checkpoint_bytes: size of one checkpoint.
        keep: checkpoints that are kept.
        gradient_bytes: what an all-reduce of all gradients sends.
    """

    checkpoint_bytes: int
    keep: int
    gradient_bytes: int


def probe_ranks(run: Run[Any]) -> list[Facts]:
    """All ranks' facts, in rank order, on every rank; all ranks call it together."""
    world = run.world
    mine: Facts = {"rank": world.rank, "host": world.hosts[world.rank], "local_rank": world.local_rank}
    alone: dict[str, Callable[[], Any]] = {
        "versions": probe_versions,
        "device": lambda: probe_device(world),
        "cores": lambda: probe_cores(run.data.workers),
        "resources": lambda: probe_resources(
            run.data, int(run.config.global_batch_size), run.config.eval_batch_size, run.shards
        ),
        "network": lambda: probe_network(world),
        "slurm": lambda: probe_slurm(world.rank),
    }
    for section, probe in alone.items():
        mine[section] = value_or_error(probe)
    # Each of these communicates with the other ranks, and itself catches what goes wrong in between.
    mine["reach"] = probe_reach(world)
    mine["clock"] = probe_clock(world)
    mine["pace"] = probe_pace(world)
    mine["files"] = probe_files(world, run.out)
    mine["determinism"] = probe_determinism(world)
    return gather_objects(mine, world.control)


def judge_ranks(ranks: list[Facts], links: Facts, needs: Needs) -> list[Finding]:
    """The rows of the table, in the order in which one would look.

    Args:
        ranks: from probe_ranks.
        links: from measure_bandwidth; empty for a single rank.
    """
    judges: dict[str, tuple[str, Callable[[list[Facts]], list[Finding]]]] = {  # check: section of the facts, judge
        "versions": ("versions", judge_versions),
        "devices": ("device", judge_devices),
        "cores": ("cores", judge_cores),
        "resources": ("resources", judge_resources),
        "pace": ("pace", judge_pace),
        "network": ("network", judge_network),
        "names": ("reach", judge_names),
        "ports": ("network", judge_ports),
        "clocks": ("clock", judge_clocks),
        "files": ("files", lambda sound: judge_files(sound, needs.checkpoint_bytes, needs.keep)),
        "links": ("", lambda _: judge_links(links, needs.gradient_bytes)),
        "determinism": ("determinism", judge_determinism),
        "slurm": ("slurm", judge_slurm),
    }
    found: list[Finding] = []
    for check, (section, judge) in judges.items():
        failed = [each for each in ranks if section and "error" in each[section]]
        for each in failed[:1]:
            figure = f"could not be examined on {rank_and_host(each)}: {each[section]['error']}"
            found.append(Finding(check, "warning", figure, "look there by hand"))
        sound = [each for each in ranks if each not in failed]
        found += judge(sound) if sound else []
    return found


def run_preflight(run: Run[Any], prove: Callable[[], Finding]) -> None:
    """Probe, judge, print the table and write preflight.json; all ranks call it together.

    Args:
        prove: trains a few steps and says whether they are right; raises CheckFailed where a training fails.

    Raises:
        CheckFailed: a run would fail here; on every rank.
    """
    world = run.world
    where = f"{count(world.world_size, 'rank')} on {count(len(set(world.hosts)), 'host')}, {run.device.type}"
    run.report.line(f"doctor: {where}: versions, devices, cores, names, files …")
    ranks = probe_ranks(run)
    links: Facts = {}
    if world.world_size > 1:
        run.report.line("doctor: the links between the ranks …")
        links = measure_bandwidth(world)
    run.report.line("doctor: a few steps against one process …")
    whole = sharded_state_bytes(run.config, 1)["ddp"]
    needs = Needs(whole["parameters"] + whole["optimizer"], run.config.checkpoint.keep, whole["gradients"])
    broken = ""
    try:
        proof = prove()
    except CheckFailed as error:
        broken = str(error).partition("\n")[0]
        proof = Finding("verify", "fails", broken, f"look into ranks/{world.rank}.log, then: python -m recipes.verify")
    found = judge_ranks(ranks, links, needs)
    found.insert(next((number for number, each in enumerate(found) if each.check == "slurm"), len(found)), proof)
    if world.rank == 0:
        report = {"findings": [asdict(each) for each in found], "ranks": ranks, "links": links}
        write_json(run.out / "preflight.json", report)
        console = run.report.console
        if links:
            console.print(*bandwidth_tables(links["collectives"], world.world_size), sep="\n")
            console.print("", bandwidth_plot(links["collectives"]), "", sep="\n", markup=False)
        console.print(findings_table(summarized(found, "preflight.json"), f"{where}: would a run work here?"))
        run.report.line(f"all of it: {short(run.out / 'preflight.json')}")
    if broken:  # the ranks may be at different places, so nothing more can be agreed
        raise CheckFailed(f"preflight: {broken}; see preflight.json")
    failed = broadcast_object(failed_checks(found), world.control)
    if failed:
        raise CheckFailed(f"a run would fail here: {', '.join(failed)}; see preflight.json")
