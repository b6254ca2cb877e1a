"""What a person writes by hand for `torchrun`: one step of DDP on the digits, one evaluation, the weights saved."""

import os
import sys

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchvision.models import resnet18


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8).expand(-1, 3, -1, -1) / 16
    labels = torch.tensor(labels)
    train, test = (TensorDataset(images[s], labels[s]) for s in (slice(0, 1437), slice(1437, None)))
    model = resnet18(num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    for batch, target in DataLoader(train, global_batch_size=48, sampler=DistributedSampler(train)):
        loss = cross_entropy(model(batch), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        break
    model.eval()
    with torch.no_grad():
        correct = sum(int((model.module(x).argmax(1) == y).sum()) for x, y in DataLoader(test, global_batch_size=128))
    if dist.get_rank() == 0:
        torch.save(model.module.state_dict(), sys.argv[1])
        print(f"loss {loss.item():.4f} accuracy {correct / len(test):.3f}")
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads can abort the interpreter's own exit


if __name__ == "__main__":
    main()
