"""DataParallel: one process, a thread per device; the oldest way to use several GPUs, kept here to be compared.

Every step scatters the batch, replicates the model onto all devices, runs the replicas in threads, and gathers their
logits on the first device, where the loss is computed; backward sums the replicas' gradients into the one model. So the
first device holds more than the others (imbalance), all traffic passes through it (bottleneck), and all threads share
one interpreter (the GIL). BatchNorm normalises each chunk by itself and keeps the running statistics of the first.

On CUDA this is torch.nn.DataParallel. For CPUs torch makes that a plain call of the module, whatever it is told; so
there `HostDataParallel` below goes the same four steps on replicas in host memory: what it computes is the same.

    python -m recipes.data_parallel                two replicas on this host, or one per GPU
    python -m recipes.data_parallel replicas=4

Expect: an accuracy of 0.97 or more on the digits, in about a minute on two CPU cores.
Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.DataParallel.html
"""

import copy
import threading
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lockstep import Proof, Run, UserError, recipe
from lockstep.config.keys import key
from lockstep.config.schema import Config
from lockstep.data.batch import cut_tree, first_tensor, join_trees, pieces
from lockstep.training.accumulate import micro_batches
from lockstep.training.clip import clip_gradients
from lockstep.training.optim import build_optimizer, build_scheduler


@dataclass
class DataParallelConfig(Config):
    several_devices: ClassVar[bool] = True
    replicas: int | None = key(None, "copies of the model (null: one a GPU; 2 on CPU)", minimum=1, maximum=1024)


class HostDataParallel(nn.Module):
    """scatter → replicate → parallel_apply → gather, as nn.DataParallel does on GPUs, with replicas in host memory."""

    def __init__(self, module: nn.Module, replicas: int) -> None:
        super().__init__()
        self.module = module
        # functional_call swaps a module's tensors while it runs, so each thread needs a module object of its own.
        self._shells = [copy.deepcopy(module) for _ in range(replicas)]  # a list: not registered as submodules
        self.thread_seconds, self.wall_seconds = 0.0, 0.0
        self._draws: bool | None = None  # whether the model draws random numbers, once that is known

    def forward(self, inputs: Any) -> Any:
        """inputs of N samples to outputs of N samples."""
        count = len(first_tensor(inputs, "the inputs"))
        chunks = [cut_tree(inputs, *bounds, count) for bounds in pieces(count, len(self._shells))]  # scatter
        tensors = [self._replicate(number) for number in range(len(chunks))]
        outputs: list[Any] = [None] * len(chunks)
        # Threads inherit neither the gradient mode nor autocast.
        modes = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

        def apply(number: int) -> None:
            started = time.thread_time()
            try:
                with torch.set_grad_enabled(modes[0]), torch.autocast("cpu", modes[2], enabled=modes[1]):
                    shell = self._shells[number].train(self.training)
                    outputs[number] = functional_call(shell, tensors[number], (chunks[number],))
            except BaseException as error:
                outputs[number] = error
            self.thread_seconds += time.thread_time() - started

        started = time.perf_counter()
        threads = [threading.Thread(target=apply, args=(number,)) for number in range(len(chunks))]
        # Unlike GPUs, the threads of a host share one generator. Where the model draws from it, as dropout does, they take
        # turns; else who comes first would decide on the numbers, and no run would be repeated by another.
        if self.training and self._draws is not False:
            before = torch.get_rng_state()
            for thread in threads:
                thread.start()
                thread.join()
            self._draws = self._draws or not torch.equal(before, torch.get_rng_state())
        else:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        self.wall_seconds += time.perf_counter() - started
        for output in outputs:
            if isinstance(output, BaseException):
                raise output
        return join_trees(outputs)  # gather

    def _replicate(self, number: int) -> dict[str, Tensor]:
        """The model's tensors for one replica: parameters cloned, so that backward sums their gradients; replica 0
        works on the model's own buffers, the others on copies that are thrown away."""
        parameters = {name: tensor.clone() for name, tensor in self.module.named_parameters()}
        buffers = {name: tensor if number == 0 else tensor.clone() for name, tensor in self.module.named_buffers()}
        return parameters | buffers


def check(config: DataParallelConfig, share: int) -> None:
    """A compiled module's replicas would still call the original, and compute with its weights."""
    if config.compile:
        raise UserError("compile=true: replicas of a compiled model compute with the original's weights; leave it out")
    if config.checkpoint_activations != "none":
        raise UserError(
            f"checkpoint_activations={config.checkpoint_activations}: by the time of backward the replicas' weights are "
            "gone, and their blocks cannot compute again; leave it out, or use recipes.ddp"
        )


@recipe(
    config=DataParallelConfig,
    check=check,
    proof=Proof(
        {"model.norm": "group"}, differs={"model.norm": "batch"}, because="BatchNorm normalises by each replica's chunk"
    ),
    ranks=1,
    next_command="python -m recipes.ddp     a process per device instead: no GIL, no first device",
)
def train(run: Run[DataParallelConfig]) -> None:
    model = run.place(run.task.build_model())
    if run.device.type == "cuda":
        devices = [device.index for device in run.world.own_gpus[: run.config.replicas]]
        model = nn.DataParallel(model, device_ids=devices)  # the first holds the model
    else:
        replicas = run.config.replicas or 2
        torch.set_num_threads(max(1, run.world.threads // replicas))  # the replicas' threads share the cores
        model = HostDataParallel(model, replicas)
    optimizer = build_optimizer(run.config.optim, model)
    scheduler = build_scheduler(run.config.optim, optimizer, run.scheduled_steps)
    scaler = run.scaler()  # precision=fp16 needs it; else it passes everything on

    for batch in run.steps(model=model, optimizer=optimizer, scheduler=scheduler):
        for micro in micro_batches(batch, run.config.accumulate, model):  # one, unless accumulate=N
            with run.autocast():
                loss = run.task.loss(model(micro.inputs), micro.targets)
            scaler.scale(loss * micro.weight).backward()
            run.record(loss=loss, weight=micro.weight)
        clip_gradients(model, optimizer, scaler, run.config.gradients)
        scaler.step(optimizer)  # unscales the gradients, unless that is done; if one is not finite, no rank updates
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()

    if isinstance(model, HostDataParallel):
        busy = model.thread_seconds / model.wall_seconds
        run.note(
            f"threads: {busy:.2f} of {replicas} busy in forward, on replicas in host memory (no GPU)",
            thread_seconds=model.thread_seconds,
            forward_seconds=model.wall_seconds,
        )
    else:
        peaks = [torch.cuda.max_memory_allocated(device) for device in devices]
        run.note(f"GPUs: {', '.join(f'{peak / 2**20:,.0f}' for peak in peaks)} MiB at peak", peak_by_device=peaks)


if __name__ == "__main__":
    train.main()
