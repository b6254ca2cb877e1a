"""Distributed training by hand: what recipes.ddp does for you, in plain torch. docs/by_hand.md goes through it part by part.

    python examples/by_hand.py                              one process
    torchrun --nproc-per-node=2 examples/by_hand.py         two, with the same global batch: the same weights at the end

Options: --epochs 8, --checkpoint by_hand.pt. Started again, it continues from the checkpoint.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

GLOBAL_BATCH, SEED = 96, 0

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--checkpoint", type=Path, default=Path("by_hand.pt"))
options = parser.parse_args()

# 1. Meet. torchrun has told each process its number, and where rank 0 listens.
cuda = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
if cuda:
    torch.cuda.set_device(device)
if "RANK" in os.environ:
    dist.init_process_group("nccl" if cuda else "gloo")
else:  # one process, in a group of its own
    dist.init_process_group("nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
rank, ranks = dist.get_rank(), dist.get_world_size()
if GLOBAL_BATCH % ranks:
    raise SystemExit(f"{ranks} ranks do not divide the global batch of {GLOBAL_BATCH}")

# 2. Data, all of it on every rank; in 64 bits, so that rounding hides no mistake. Every fifth sample is for evaluation.
digits = load_digits()
inputs = torch.tensor(digits.data / 16, dtype=torch.float64, device=device)
targets = torch.tensor(digits.target, device=device)
held_out = torch.arange(len(inputs)) % 5 == 0
to_train, to_evaluate = (~held_out).nonzero().flatten(), held_out.nonzero().flatten()

# 3. The same weights everywhere: DDP sends rank 0's around, and averages gradients in each backward.
torch.manual_seed(SEED)
plain = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.LayerNorm(128), nn.Linear(128, 10)).double().to(device)
model = DistributedDataParallel(plain)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

# 4. Continue where an earlier start has stopped: every rank reads what rank 0 has written.
first = 0
if options.checkpoint.exists():
    state = torch.load(options.checkpoint, map_location=device, weights_only=True)
    plain.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    first = state["epoch"]

for epoch in range(first, options.epochs):
    # 5. One order for all ranks, another one in each epoch; of each global batch, every rank takes its share.
    order = to_train[torch.randperm(len(to_train), generator=torch.Generator().manual_seed(SEED + epoch))]
    for step in range(len(order) // GLOBAL_BATCH):
        share = order[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH][rank::ranks]
        loss = cross_entropy(model(inputs[share]), targets[share])
        optimizer.zero_grad()
        loss.backward()  # the shares are equal, so the mean of the ranks' gradients is that of the global batch
        optimizer.step()

    # 6. Evaluation: each rank its part of the samples, no sample twice; sums are added up, and divided at the end.
    part = to_evaluate[rank::ranks]
    with torch.no_grad():
        logits = plain(inputs[part])
    right = (logits.argmax(1) == targets[part]).sum()
    total = cross_entropy(logits, targets[part], reduction="sum")
    sums = torch.stack([total, right, torch.tensor(len(part), device=device)])
    dist.all_reduce(sums)

    # 7. One rank speaks and writes, into another file first: who is killed meanwhile leaves the old one whole.
    if rank == 0:
        print(f"epoch {epoch + 1}: loss {sums[0] / sums[2]:.4f}, accuracy {sums[1] / sums[2]:.1%}", flush=True)
        state = {"model": plain.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
        unfinished = options.checkpoint.with_suffix(".unfinished")
        torch.save(state, unfinished)
        os.replace(unfinished, options.checkpoint)
    dist.barrier()  # nobody goes on, or ends, before it is there

dist.destroy_process_group()
