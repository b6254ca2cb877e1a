"""The same loop by Accelerate."""

import os

from accelerate import Accelerator
from torch.nn.functional import cross_entropy

from benchmarks.contestants import work


def main() -> None:
    asked = work.arguments()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if asked.bf16 else "no")
    model = work.build(asked)
    model, optimizer, batches = accelerator.prepare(model, work.optimizer(model), work.loader(asked))
    for step, (images, labels) in enumerate(work.endless(batches, asked.steps)):
        with accelerator.autocast():
            loss = cross_entropy(model(work.prepared(images, asked)), labels)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            accelerator.print(f"step {step} loss {loss.item():.4f}", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
