"""Doctor: would a run work here, where does its memory go, what does the hardware achieve, what became of a run that died?

`preflight`, the default, starts the ranks as any recipe does, on this machine, by hand or as a job, and checks what
breaks runs or slows them down: versions that do not fit, or differ between hosts; devices and their speed; threads
against cores; the network; whether each host finds every other host by name; clocks; the run directory's file system
(do all ranks see it? are files replaced in one piece? how fast, how full is it?); the speed of collectives by the size
of the message, and of each pair of ranks; whether an all-reduce gives all ranks the same bits; five steps of ddp
against the same steps of one process; a Slurm job's settings. Each is a row with a verdict, a figure and what to do.
Ranks that do not join are named, as for any recipe.

`memory` says where a step's memory goes. For the model, batch, precision and optimizer of this command, a table has a
row for each layer: the shape of its output, and the bytes of its parameters, their gradients, the optimizer's state,
and the activations that it keeps from forward for backward. This is computed on torch's fake tensors, which have shapes
and no bytes, for one whole model. Then the recipe really takes three steps on the ranks that are there: what each rank
held, and its measured peak, stand beside the sum. The peak is less than the sum where gradients come while activations
go, and more by what lies outside of the layers: temporary results, DDP's buckets, scratch space of cuDNN or oneDNN, and
on a CPU the code that is loaded on the way. A last table says what DDP, ZeRO's stages and FSDP make of parameters,
gradients and optimizer on these ranks, and, predicted and measured, this recipe. (Any recipe
counts its own first step with `memory=report`, and trains on.)

`hardware` measures what the ranks achieve while all of them are at work: matrix products, copies, on CPUs classes of
operations by size, and six kinds of collectives by size, among the ranks of each node and among those of all nodes. What it
writes, hardware.yaml, is a profile of these machines: `recipes.plan hardware=FILE` plans trainings on them, from anywhere.

`recipes=[fsdp]` asks preflight or memory about another recipe than ddp; with `global_batch_size=auto` the largest batch is found
first. `run=FOLDER` starts nothing: it reads what a run has left, however it ended.

How: lockstep/diagnose/preflight.py lists the checks, probes/ has one file per subject, memory_account.py counts the
memory, postmortem.py reads a run; lockstep/plan/here.py measures the hardware.

    python -m recipes.doctor                                        would a run work here? two ranks, or one per GPU
    python -m recipes.doctor +cluster=slurm cluster.nodes=2         and there?
    python -m recipes.doctor memory                                 ResNet-18 on the digits, two ranks
    python -m recipes.doctor memory model=resnet50 data=synthetic data.image_size=64 global_batch_size=16 precision=bf16
    python -m recipes.doctor hardware +cluster=slurm cluster.nodes=2          a profile of that cluster, for recipes.plan
    python -m recipes.doctor run=outputs/ddp/2026-11-21_11-20-16    what became of it?

Expect: the tables in less than half a minute on two CPU cores, or a minute for the hardware, and preflight.json, memory.json or
hardware.yaml beside them; exit code 1 if a run would fail.
Source: https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/troubleshooting.html,
https://docs.pytorch.org/tutorials/intermediate/autograd_saved_tensors_hooks_tutorial.html,
https://arxiv.org/abs/1910.02054 (ZeRO)
"""

import shlex
from pathlib import Path

from lockstep import Recipe, Run, UserError, recipe
from lockstep.config.check import check_values
from lockstep.config.copies import LAUNCHING, convert, refuse_others, with_values
from lockstep.config.declared import read_config
from lockstep.config.schema import Config
from lockstep.config.tasks import IMAGES
from lockstep.diagnose.config import DoctorConfig
from lockstep.diagnose.findings import Finding
from lockstep.diagnose.memory_account import account_memory
from lockstep.diagnose.postmortem import explain_run
from lockstep.diagnose.preflight import run_preflight
from lockstep.launch.batch_size import cut_short
from lockstep.launch.validate import validate
from lockstep.registry import choose, get_recipe, is_file
from lockstep.utils.places import as_installed
from lockstep.utils.text import count, short
from lockstep.verify.proofs import ProofCase, References, proof_batch, proofs_of, verify_case
from lockstep.verify.reference import SINGLE, reference_of

HARDWARE = "hardware"
MEASURED_STEPS = 3
PROVEN_STEPS = 5


def target_recipe(config: DoctorConfig) -> Recipe:
    """The recipe that is examined: recipes=[NAME], else ddp."""
    names = choose(config.recipes)
    if len(names) > 1:
        raise UserError(f"recipes=[{','.join(names)}]: recipes.doctor examines one recipe at a time; name one")
    return get_recipe(names[0])


def measured_config(config: DoctorConfig) -> Config:
    """The config of the steps that are really taken for `memory`: few, and every one counted."""
    each = target_recipe(config)
    steps = {"max_steps": MEASURED_STEPS, "epochs": MEASURED_STEPS, "memory": "report"}
    return with_values(cut_short(convert(config, each.config), each), steps)


def prove(run: Run[DoctorConfig]) -> Finding:
    """A few steps of the recipe against the same steps of `single`, as recipes.verify has them.

    Raises:
        CheckFailed: a training failed.
    """
    each = target_recipe(run.config)
    own = is_file(each.target)
    if not each.proofs and not (own and reference_of(each, None) == SINGLE):
        what = (
            f"{each.name}.py neither declares a proof nor trains run.task"
            if own
            else f"recipes.{each.name} declares no proof"
        )
        return Finding("verify", "ok", f"{what}: nothing to compare")
    proof = proofs_of(each, run.config)[0]
    differs = proof.because if run.config.task.name != IMAGES else ""
    precision = "fp64" if "fp64" in proof.precisions else proof.precisions[0]
    few = {"max_steps": PROVEN_STEPS, "global_batch_size": proof_batch(run.data.train_size, run.world.world_size)}
    case = ProofCase(each, proof, precision, proof.settings | few, differs)
    row = verify_case(run, case, get_recipe("single"), References())
    figure = f"{count(PROVEN_STEPS, 'step')} of {each.name} in {precision}: {row.verdict}"
    if row.weights is not None:  # rank 0 alone has the numbers
        figure += f", weights within {row.weights:.0e} of one process's"
    if row.fails:
        return Finding(
            "verify",
            "fails",
            figure,
            f"python -m recipes.verify recipes=[{short(Path(each.target)) if own else each.name}]",
        )
    return Finding("verify", "ok", figure)


def read_run(config: DoctorConfig) -> int | None:
    """With run=FOLDER, say what became of the run in it; this process does it, without any ranks."""
    if config.run is None:
        return None
    check_values(config)
    if config.cluster or config.check != DoctorConfig().check:
        more = "+cluster" if config.cluster else f"check={config.check}"
        raise UserError(f"run={config.run}: is read here, and nothing is run; leave {more} out")
    refuse_others(config, train, {"run"}, f"run={config.run}")
    explain_run(Path(config.run).expanduser(), resume_command)
    return 0


def resume_command(name: str, config: str, out: Path) -> str:
    """The command that resumes a run; `config`: what its config.yaml says."""
    unknown = f"the command that started {name}, with out={short(out)}"
    if not Path(__file__).with_name(f"{name}.py").is_file():
        return unknown
    from lockstep.config.compose import overrides  # Hydra, which no rank needs

    found = get_recipe(name)
    try:
        trained = read_config(found, config)
    except UserError:  # its task's file is not there any more
        return unknown
    words = [*overrides(found, trained, found, without=["out"]), f"out={short(out)}"]
    return as_installed(f"python -m recipes.{name} {shlex.join(words)}")


def check(config: DoctorConfig, share: int) -> None:
    """A recipe that is examined must be able to run."""
    if config.run is not None:
        raise UserError(f"run={config.run}: is read by one process; start it with python, without torchrun or srun")
    if config.check == HARDWARE:  # which trains nothing; a batch must divide by the ranks all the same
        heeded = {"check", "global_batch_size", "cluster", *LAUNCHING}
        refuse_others(config, train, heeded, f"recipes.doctor {HARDWARE}")
        return
    steps = config.global_batch_size // share * config.model_parallel_size
    validate(measured_config(config), target_recipe(config), steps)


@recipe(config=DoctorConfig, looks_at="recipes", check=check, stands_for=target_recipe, word="check", alone=read_run)
def train(run: Run[DoctorConfig]) -> None:
    if run.config.check == "memory":
        account_memory(run, target_recipe(run.config), measured_config(run.asked))
    elif run.config.check == HARDWARE:
        from lockstep.plan.hardware_report import make_profile  # which loads all of a plan

        run.report.line(f"doctor: what {count(run.world.world_size, 'rank')} achieve when all are at work …")
        make_profile(run)
    else:
        run_preflight(run, lambda: prove(run))


if __name__ == "__main__":
    train.main()
