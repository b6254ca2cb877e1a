"""DDP as it is written by hand, its last steps recorded as a recipe's are by profile=N."""

import contextlib
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from benchmarks.contestants import work
from lockstep.callbacks.profiler import Profiler

RECORDED = 5
FOLDER = "BENCHMARK_FOLDER"  # where every rank writes what it found


def main() -> None:
    asked, folder = work.arguments(), Path(os.environ[FOLDER])
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(work.build(asked))
    optimizer = work.optimizer(model)
    profiler = Profiler(torch.device("cpu"), asked.steps - RECORDED + 1, RECORDED, folder / f"{rank}.trace.json")
    for step, (images, labels) in enumerate(work.by_hand(asked, rank, world_size), start=1):
        profiler.before_step(step)
        with torch.autocast("cpu", torch.bfloat16) if asked.bf16 else contextlib.nullcontext():
            loss = cross_entropy(model(work.prepared(images, asked)), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        profiler.after_step(step)
    found = profiler.report()
    (folder / f"{rank}.json").write_text(json.dumps({name: found[name] for name in ("communication", "exposed")}))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads can abort the interpreter's own exit


if __name__ == "__main__":
    main()
