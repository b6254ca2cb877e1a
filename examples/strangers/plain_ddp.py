"""A training script as many have one: DistributedDataParallel, a DistributedSampler, AdamW, clipping, on the digits.

    python plain_ddp.py                               one process
    torchrun --nproc-per-node=2 plain_ddp.py          two, with the same global batch
    python -m recipes.verify program='torchrun --nproc-per-node=2 examples/strangers/plain_ddp.py' \
        against='python examples/strangers/plain_ddp.py'
"""

import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lockstep.verify

GLOBAL_BATCH = 64

rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if ranks > 1:
    dist.init_process_group("gloo")
torch.manual_seed(0)

digits = load_digits()
data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
sampler = DistributedSampler(data, ranks, rank, seed=0)
loader = DataLoader(data, GLOBAL_BATCH // ranks, sampler=sampler, drop_last=True)

model: nn.Module = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.LayerNorm(128), nn.Linear(128, 10))
if ranks > 1:
    model = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.002)
lockstep.verify.watch(model, optimizer)

for epoch in range(3):
    sampler.set_epoch(epoch)
    for inputs, targets in loader:
        loss = nn.functional.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    if rank == 0:
        print(f"epoch {epoch}: loss {loss.item():.3f}")
if ranks > 1:
    dist.destroy_process_group()
