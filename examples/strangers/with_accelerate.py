"""The digits with Hugging Face's Accelerate, accumulating over two micro-batches.

python with_accelerate.py                              one process
torchrun --nproc-per-node=2 with_accelerate.py         two, with the same global batch
"""

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lockstep.verify

MICRO_BATCH = 32  # over all ranks

accelerator = Accelerator(
    cpu=True,
    gradient_accumulation_steps=2,
    # The order of the samples depends on the seed alone, and each batch of the loader is divided among the ranks.
    dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=0),
)
set_seed(0)

digits = load_digits()
data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
loader = DataLoader(data, MICRO_BATCH, shuffle=True, drop_last=True)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 10))
model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
lockstep.verify.watch(model, optimizer)

for epoch in range(2):
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(inputs), targets)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}")
accelerator.end_training()
