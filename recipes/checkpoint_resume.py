"""Checkpoint and resume: what a training must remember, assembled by hand, interrupted and resumed before your eyes.

Two trainings of the same steps. The first runs through. The second is interrupted in the middle of an epoch and saved;
then a new model, a new optimizer and a new everything take its state over and continue. Unless all of them come out bit by
bit the same, something was forgotten, and with `forget=` you can see what each part is for:

    model      weights, and BatchNorm's running statistics, which are no parameters
    optimizer  momentum: without it the first steps after the restart go another way
    schedule   the learning rate: without it the warm-up or the whole descent starts again
    step       the place in the data: without it some images are seen twice and others never
    random     every rank's generator: dropout must not draw the same numbers again, nor others
    buckets    the order in which DDP sends gradients, which it learns in its first step: no tensor, and still state
               (from three ranks on, sums come out in other last bits without it; on two there is only one order)

It saves tensors and plain values only, so that nothing is unpickled that could run code, and from one process only,
into a temporary file that is renamed when it is complete. The other recipes do the same and more, without being asked
(lockstep.checkpoint.directory): all ranks write, beside training, with hashes, and any other number of ranks can resume.

    python -m recipes.checkpoint_resume
    python -m recipes.checkpoint_resume forget=optimizer
    python -m recipes.checkpoint_resume forget=buckets nproc=3

Expect: "identical: … tensors" and exit code 0, in half a minute on two CPU cores; with `forget=`, which tensors differ.
Source: https://docs.pytorch.org/tutorials/recipes/recipes/saving_and_loading_a_general_checkpoint.html
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import dropout
from torch.nn.parallel import DistributedDataParallel

from lockstep import Run, recipe
from lockstep.config.keys import key
from lockstep.config.schema import Config
from lockstep.data.batch import map_tensors
from lockstep.errors import CheckFailed
from lockstep.training.optim import build_optimizer, build_scheduler
from lockstep.utils.files import write_atomically, write_json


@dataclass
class ResumeConfig(Config):
    forget: str | None = key(
        None,
        "part of the state that the resumed half is not given",
        ("optimizer", "schedule", "scaler", "step", "random", "buckets"),
    )


class Training:
    """All that changes from step to step, on this rank."""

    def __init__(self, run: Run[ResumeConfig], seed: int) -> None:
        torch.manual_seed(seed)
        model = run.place(run.task.build_model())
        # Dropout draws random numbers in each step, whatever the model.
        model.register_forward_hook(lambda *call: map_tensors(lambda tensor: dropout(tensor, 0.1), call[-1]))
        model = DistributedDataParallel(model, device_ids=run.device_ids, gradient_as_bucket_view=True)
        self.model, self.scaler = model, run.scaler()
        self.optimizer = build_optimizer(run.config.optim, model)
        self.scheduler = build_scheduler(run.config.optim, self.optimizer, run.total_steps)
        self.step = 0
        self.losses: list[float] = []
        torch.manual_seed(seed + run.world.rank)  # the same weights on all ranks, but not the same dropout

    def train(self, run: Run[ResumeConfig], stop: int) -> None:
        """Take the steps up to number `stop`."""
        self.model.train()
        for batch in run.batches(self.step, stop):
            with run.autocast():
                loss = run.task.loss(self.model(batch.inputs), batch.targets)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.step += 1
            self.losses.append(loss.item())

    def state(self) -> dict[str, Any]:
        """What a restart needs. Ranks hold equal weights; their random numbers are each one's own."""
        random: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(random, torch.get_rng_state())
        return {
            "model": self.model.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),  # empty, unless precision=fp16
            "step": self.step,
            "random": random,
        }

    def take_over(self, run: Run[ResumeConfig], state: dict[str, Any], forget: str | None) -> None:
        """Become the training that `state` was taken from."""
        if forget != "buckets":
            # A backward that is thrown away, for DDP to learn the order; it comes first because it touches the rest.
            example = run.data.example(2)
            run.task.loss(self.model(example.inputs), example.targets).backward()
            self.optimizer.zero_grad()
        self.model.module.load_state_dict(state["model"])
        if forget != "optimizer":
            self.optimizer.load_state_dict(state["optimizer"])
        if forget != "schedule":
            self.scheduler.load_state_dict(state["schedule"])
        if forget != "scaler":
            self.scaler.load_state_dict(state["scaler"])
        if forget != "step":
            self.step = state["step"]
        if forget != "random":
            torch.set_rng_state(state["random"][run.world.rank])


def save(state: dict[str, Any], path: Path) -> None:
    """One process writes, to a temporary name, and renames: whoever dies when, there is the old file or the new."""
    if dist.get_rank() == 0:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(path, buffer.getvalue())
    dist.barrier()


def tensors(state: Any, name: str = "") -> dict[str, Tensor]:
    """Every tensor and number in a nested state, by its path."""
    if isinstance(state, dict):
        return {key: t for k, value in state.items() for key, t in tensors(value, f"{name}.{k}").items()}
    if isinstance(state, list | tuple):
        return tensors(dict(enumerate(state)), name)
    return {name[1:]: torch.as_tensor(state)} if isinstance(state, Tensor | int | float) else {}


@recipe(
    config=ResumeConfig,
    single_training=False,
    next_command="python -m recipes.ddp checkpoint.every=20 out=run     Ctrl-C it, and start it again",
)
def train(run: Run[ResumeConfig]) -> None:
    half, stop = run.total_steps // 2 + 1, run.total_steps

    whole = Training(run, run.config.seed)
    whole.train(run, stop)

    interrupted = Training(run, run.config.seed)
    interrupted.train(run, half)
    save(interrupted.state(), run.out / "interrupted.pt")
    run.report.line(f"interrupted after step {half} of {stop}, within an epoch; saved in interrupted.pt")

    resumed = Training(run, run.config.seed + 1)  # another seed: what it has in common comes out of the file
    state = torch.load(run.out / "interrupted.pt", map_location="cpu", weights_only=True)
    resumed.take_over(run, state, run.config.forget)
    resumed.train(run, stop)

    mine, theirs = (tensors(training.state()) for training in (resumed, whole))
    mine["losses"] = torch.tensor(interrupted.losses + resumed.losses)
    theirs["losses"] = torch.tensor(whole.losses)
    differing = [name for name in theirs if name not in mine or not torch.equal(mine[name], theirs[name])]
    everyone: list[Any] = [None] * run.world.world_size
    dist.all_gather_object(everyone, differing)
    differing = sorted(set().union(*everyone))
    if run.world.rank == 0:
        result = {"recipe": run.recipe, "status": "finished", "steps": stop, "identical": not differing}
        write_json(run.out / "result.json", result | {"differing": differing})
    if not differing:
        run.report.line(
            f"identical: {len(theirs)} tensors and numbers, {stop} losses, on each of {len(everyone)} ranks"
        )
        return
    first = differing[0]
    text = f"{len(differing)} of {len(theirs)} differ, {first} among them"
    if run.config.forget is None:
        raise CheckFailed(text)
    run.report.line(f"forgotten: {run.config.forget}; {text}")


if __name__ == "__main__":
    train.main()
