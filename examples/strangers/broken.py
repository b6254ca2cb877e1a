"""A training script that averages its gradients by hand, right without --bug, and wrong in one line with it.

    python broken.py                                        one process
    torchrun --nproc-per-node=2 broken.py --bug tokens      two, and the loss is divided by each rank's own tokens

Each of the bugs is one that people have had. One process alone computes the same with it and without it.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import lockstep.verify

GLOBAL_BATCH, LONGEST, WORDS, LEFT_OUT = 8, 12, 20, -100
BUGS = {
    "tokens": "the loss is a mean over each rank's own tokens, of which one rank has more than another",
    "clip": "each rank clips its own gradients, before they are averaged",
    "missing": "the gradient of the last bias is not averaged",
    "rate": "the learning rate is multiplied by the number of ranks, though the global batch is the same",
    "epoch": "the sampler is not told the epoch, and every epoch has the first one's order",
}
parser = argparse.ArgumentParser(epilog="; ".join(f"{name}: {told}" for name, told in BUGS.items()))
parser.add_argument("--bug", choices=BUGS)
bug = parser.parse_args().bug

rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if ranks > 1:
    dist.init_process_group("gloo")
torch.manual_seed(0)


class Sequences(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Tokens that grow by one, and what follows each; sequences have 3 to 12 tokens, and are padded."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = (torch.arange(LONGEST) + index) % WORDS
        targets = (tokens + 1) % WORDS
        targets[3 + index * 7 % (LONGEST - 2) :] = LEFT_OUT
        return tokens, targets


data = Sequences()
sampler = DistributedSampler(data, ranks, rank, seed=0)
loader = DataLoader(data, GLOBAL_BATCH // ranks, sampler=sampler)
model = nn.Sequential(nn.Embedding(WORDS, 16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, WORDS))
optimizer = torch.optim.SGD(model.parameters(), lr=0.5 * (ranks if bug == "rate" else 1))
lockstep.verify.watch(model, optimizer)

for epoch in range(3):
    if ranks == 1 or bug != "epoch":
        sampler.set_epoch(epoch)
    for tokens, targets in loader:
        optimizer.zero_grad()
        count = (targets != LEFT_OUT).sum().float()
        if ranks > 1 and bug != "tokens":
            dist.all_reduce(count)
            count /= ranks
        outputs = model(tokens).transpose(1, 2)
        loss = nn.functional.cross_entropy(outputs, targets, ignore_index=LEFT_OUT, reduction="sum") / count
        loss.backward()
        if bug == "clip":
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        for name, parameter in model.named_parameters() if ranks > 1 else ():
            if bug != "missing" or name != "3.bias":
                dist.all_reduce(parameter.grad)
                parameter.grad /= ranks
        if bug != "clip":
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    if rank == 0:
        print(f"epoch {epoch}: loss {loss.item():.3f}")
if ranks > 1:
    dist.destroy_process_group()
