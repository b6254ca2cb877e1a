"""Doctor: says whether a run would work here before it is one, where its memory goes, and what became of one that died.

`preflight`, which is what it does unless told otherwise, starts the ranks as any recipe does, on this machine, by hand
or as a job, and looks at what breaks runs, or quietly slows them down: versions that do not fit, or differ between
hosts; devices and their speed; threads against cores; the network that the tensors travel by; whether each host finds
each other one by name; clocks; the run directory's file system (do all ranks see it? are files replaced in one piece?
how fast, how full is it?); the speed of collectives by the size of the message, and of each pair of ranks; whether an
all-reduce gives all ranks the same bits; five steps of ddp against the same steps of one process; a Slurm job's
settings. Each is a row with a verdict, a figure and what to do. Ranks that do not even come are named, as for any
recipe.

`memory` says where a step's memory goes. For the model, batch, precision and optimizer that are asked for, a table has
a row for each layer: the shape of its output, and the bytes of its parameters, their gradients, the optimizer's state,
and the activations that it keeps from forward for backward. That much is found on torch's fake tensors, which have
shapes and no bytes, for a whole model that is trained as a whole. Then the recipe really takes three steps on the ranks
that are there: what each of them held, and its measured peak, stand beside the sum. A peak is less than the sum where
gradients come while activations go, and more by what lies outside of the layers: temporary results, the buckets in
which DDP exchanges gradients, scratch space of cuDNN or oneDNN, and on a CPU the code that is loaded on the way. A last
table says what DDP, ZeRO's stages and FSDP make of parameters, gradients and optimizer on these ranks. And any recipe
counts its own first step with `memory=report`, and trains on.

`recipes=[fsdp]` asks either about another recipe than ddp; with `global_batch_size=auto` the largest batch is found first.
`run=FOLDER` starts nothing: it reads what a run has left behind, however it ended.

    python -m recipes.doctor                                        would a run work here? two ranks, or one per GPU
    python -m recipes.doctor +cluster=slurm cluster.nodes=2         and there?
    python -m recipes.doctor memory                                 ResNet-18 on the digits, two ranks
    python -m recipes.doctor memory model=resnet50 data=synthetic data.image_size=64 global_batch_size=16 precision=bf16
    python -m recipes.doctor run=outputs/ddp/2026-11-21_11-20-16    what became of it?

Expect: the tables in less than half a minute on two CPU cores, and preflight.json or memory.json beside them; exit code
1 if a run would fail.
Source: https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/troubleshooting.html,
https://docs.pytorch.org/tutorials/intermediate/autograd_saved_tensors_hooks_tutorial.html,
https://arxiv.org/abs/1910.02054 (ZeRO)
"""

import json
import shlex
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.table import Table

from lockstep import Recipe, Run, UserError, recipe
from lockstep.callbacks.memory_report import cell, in_a_line, table
from lockstep.config.schema import Config, check_values, convert, with_values
from lockstep.data.datasets import FirstSamples
from lockstep.diagnose import bandwidth, findings, postmortem
from lockstep.diagnose.config import DoctorConfig
from lockstep.diagnose.findings import Finding
from lockstep.diagnose.preflight import Asked, judge
from lockstep.diagnose.probes import survey
from lockstep.distributed.collectives import agree, gather_numbers
from lockstep.distributed.signals import Preempted
from lockstep.errors import CheckFailed
from lockstep.launch.batch_size import cut_short
from lockstep.launch.validate import validate
from lockstep.memory.tracker import KINDS, Prediction, predict, sharded
from lockstep.memory.usage import free_bytes, peak_from_now
from lockstep.registry import choose, get_recipe
from lockstep.utils.files import write_json
from lockstep.utils.text import count, mebibytes, short
from lockstep.verify.proofs import proof_config
from lockstep.verify.rows import VerifyRow
from lockstep.verify.trace import trace

STEPS = 3
PROVEN_STEPS = 5


def patient(config: DoctorConfig) -> Recipe:
    """The recipe that is looked at: recipes=[NAME], else ddp."""
    names = choose(config.recipes)
    if len(names) > 1:
        raise UserError(f"recipes=[{','.join(names)}]: recipes.doctor looks at one recipe at a time; name one")
    return get_recipe(names[0])


def as_patient(config: DoctorConfig) -> Config:
    """The config of the steps that are really taken: few, and every one counted."""
    steps = {"max_steps": STEPS, "epochs": STEPS, "memory": "report"}
    each = patient(config)
    return with_values(cut_short(convert(config, each.config), each), steps)


def images_at_once(config: Config, shards: int) -> int:
    """Images that go through the model at a time: a rank's share, or the largest micro-batch of it."""
    return -(-config.global_batch_size // shards // max(config.accumulate, config.pipeline_micro_batches))


class Steps(Run):
    """A run that notes by how much memory has risen when a step ends, before it evaluates and exports."""

    risen: Callable[[], int]
    rise = 0

    def _after_step(self) -> bool:
        self.rise = self.risen()
        return super()._after_step()


def measure(run: Run[DoctorConfig]) -> tuple[list[dict[str, Any]], list[int]]:
    """Take a few steps as the recipe takes them: (what each rank held by layer, each rank's measured peak in bytes)."""
    each, config = patient(run.config), as_patient(run.asked)
    out = run.out / each.name
    if run.world.rank == 0:
        (out / "ranks").mkdir(parents=True, exist_ok=True)
    dist.barrier()
    inner = Steps(each.name, config, run.world, out, shards=each.ranks, quiet=True, listener=run.listener)
    inner.eval_set = FirstSamples(inner.eval_set, config.eval_batch_size * run.world.world_size)
    inner.risen = peak_from_now(run.device)
    each(inner)
    peaks = [int(size) for size in gather_numbers(inner.rise, run.device)]
    dist.barrier()
    return json.loads((out / "memory.json").read_text())["ranks"] if run.world.rank == 0 else [], peaks


def show(
    run: Run[DoctorConfig], found: Prediction, ranks: list[dict[str, Any]], peaks: list[int], shards: dict[str, Any]
) -> None:
    """The tables, for people."""
    config, line = run.config, run.report.line
    images, console = images_at_once(config, run.shards), run.report.console
    console.print(
        table(
            found.layers,
            f"{config.model.name}, {images} images at a time, {config.precision}, {config.optim.name}: "
            "MiB that one whole model holds during a step",
        )
    )
    peak = "; ".join(f"{kind} {mebibytes(size)}" for kind, size in found.peak.items())
    line(f"expected peak, MiB   {mebibytes(sum(found.peak.values()))}: {peak}")
    name = patient(config).name
    line(f"held, MiB by rank    {in_a_line(ranks)} (recipes.{name}, {STEPS} steps)")
    line(f"measured peak, MiB   {', '.join(map(mebibytes, peaks))} by rank: the rise of {RISE[run.device.type]}")
    free, who = free_bytes(run.device)
    line(f"free now, MiB        {mebibytes(free)}, says {who}")
    grid = Table(title=f"the same state on {len(peaks)} ranks, by formula: MiB on the fullest", title_justify="left")
    grid.add_column("technique")
    for column in (*KINDS[:3], "total"):
        grid.add_column(column, justify="right")
    for technique, sizes in shards.items():
        grid.add_row(technique, *(cell(size) for size in sizes.values()))
    console.print(grid)


RISE = {"cpu": "the process's resident memory", "cuda": "what torch's allocator gave out"}


def account(run: Run[DoctorConfig]) -> None:
    """Where a step's memory goes."""
    ranks, peaks = measure(run)
    if run.world.rank:
        return
    found = predict(run.config, images_at_once(run.config, run.shards), run.device.type)
    shards = sharded(run.config, run.world.world_size)
    write_json(
        run.out / "memory.json",
        {
            "images": images_at_once(run.config, run.shards),
            "total": found.sums(),
            "layers": [asdict(layer) for layer in found.layers],
            "expected_peak": found.peak,
            "measured_peak_bytes_by_rank": peaks,
            "ranks": ranks,
            "sharded": shards,
        },
    )
    show(run, found, ranks, peaks, shards)


def preflight(run: Run[DoctorConfig]) -> None:
    """Whether a run would work here."""
    ranks = survey(run)
    speeds = bandwidth.measure(run.world) if run.world.world_size > 1 else {}
    whole = sharded(run.config, 1)["ddp"]
    asked = Asked(whole["parameters"] + whole["optimizer"], run.config.checkpoint.keep, whole["gradients"])
    proof = proven(run)
    found = judge(ranks, speeds, asked)
    place = next((number for number, each in enumerate(found) if each.check == "slurm"), len(found))
    found.insert(place, proof)
    if run.world.rank == 0:
        report = {"findings": [asdict(each) for each in found], "ranks": ranks, "links": speeds}
        write_json(run.out / "preflight.json", report)
        hosts = count(len(set(run.world.hosts)), "host")
        title = f"{count(run.world.world_size, 'rank')} on {hosts}, {run.device.type}: would a run work here?"
        if speeds:
            run.report.console.print(bandwidth.grid(speeds["collectives"], run.world.world_size))
            run.report.console.print(bandwidth.plot(speeds["collectives"]), markup=False)
        run.report.console.print(findings.table(found, title))
    if proof.figure.startswith(BROKEN):  # the ranks may be at different places, so nothing more can be agreed
        raise CheckFailed(f"preflight: {proof.figure}; see preflight.json")
    failed = agree(findings.failed(found), run.world.control)
    if failed:
        raise CheckFailed(f"a run would fail here: {', '.join(failed)}; see preflight.json")


BROKEN = "it broke"


def proven(run: Run[DoctorConfig]) -> Finding:
    """A few steps of the recipe against the same steps of `single`, as recipes.verify has them."""
    each = patient(run.config)
    if not each.proofs:
        return Finding("verify", "ok", f"recipes.{each.name} declares no proof: nothing to compare")
    proof = each.proofs[0]
    precision = "fp64" if "fp64" in proof.precisions else proof.precisions[0]
    values = proof.settings | {"max_steps": PROVEN_STEPS}
    mine = with_values(proof_config(run, each.config, precision, values), proof.own)
    row = VerifyRow(each.name, precision, run.world.world_size, PROVEN_STEPS)
    remedy = f"python -m recipes.verify recipes=[{each.name}]"
    try:
        single = get_recipe("single")
        base = mine if proof.prepare else proof_config(run, single.config, precision, values)
        reference = trace(run, single, base, "single", proof.prepare)
        traced = trace(run, each, mine, each.name, proof.prepare)
    except Preempted:
        raise
    except Exception as error:
        run.report.log.write(traceback.format_exc())
        figure = f"{BROKEN}: {each.name} in {precision}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return Finding("verify", "fails", figure, f"look into ranks/{run.world.rank}.log, then {remedy}")
    if not (traced and reference):
        return Finding("verify", "ok", "")  # rank 0's is what counts
    row.compare(traced, reference)
    figure = f"{count(PROVEN_STEPS, 'step')} of {each.name} in {precision}: {row.verdict}, "
    figure += f"weights within {row.weights:.0e} of one process's"
    return Finding("verify", "fails" if row.fails else "ok", figure, remedy if row.fails else "")


def read(config: DoctorConfig) -> int | None:
    """With run=FOLDER, say what became of the run in it; this process does it, without any ranks."""
    if config.run is None:
        return None
    check_values(config)
    if config.cluster or config.check != DoctorConfig().check:
        more = "+cluster" if config.cluster else f"check={config.check}"
        raise UserError(f"run={config.run}: is read here, and nothing is run; leave {more} out")
    postmortem.tell(Path(config.run).expanduser(), again)
    return 0


def again(name: str, config: Config, out: Path) -> str:
    """The command that goes on with a run."""
    if not Path(__file__).with_name(f"{name}.py").is_file():
        return f"the command that started {name}, with out={short(out)}"
    from lockstep.config.compose import overrides  # Hydra, which no rank needs

    found = get_recipe(name)
    return f"python -m recipes.{name} {shlex.join([*overrides(found, config, found, without=['out']), f'out={short(out)}'])}"


def check(config: DoctorConfig, share: int) -> None:
    """A recipe that is looked at must be able to run."""
    if config.run is not None:
        raise UserError(f"run={config.run}: is read by one process; start it with python, without torchrun or srun")
    each = patient(config)
    validate(as_patient(config), each, config.global_batch_size // share * config.model_parallel_size)


@recipe(config=DoctorConfig, looks_at="recipes", check=check, stands_for=patient, word="check", alone=read)
def train(run: Run[DoctorConfig]) -> None:
    {"preflight": preflight, "memory": account}[run.config.check](run)


if __name__ == "__main__":
    train.main()
