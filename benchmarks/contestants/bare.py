"""DDP as it is written by hand."""

import contextlib
import os

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from benchmarks.contestants import work


def main() -> None:
    asked = work.arguments()
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(work.build(asked))
    optimizer = work.optimizer(model)
    for step, (images, labels) in enumerate(work.by_hand(asked, rank, world_size)):
        with torch.autocast("cpu", torch.bfloat16) if asked.bf16 else contextlib.nullcontext():
            loss = cross_entropy(model(work.prepared(images, asked)), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 and rank == 0:
            print(f"step {step} loss {loss.item():.4f}", flush=True)
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads can abort the interpreter's own exit


if __name__ == "__main__":
    main()
