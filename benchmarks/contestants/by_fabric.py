"""The same loop by Lightning Fabric."""

import os

from lightning.fabric import Fabric
from torch.nn.functional import cross_entropy

from benchmarks.contestants import work


def main() -> None:
    asked = work.arguments()
    precision = "bf16-mixed" if asked.bf16 else "32-true"
    fabric = Fabric(accelerator="cpu", devices=int(os.environ["LOCAL_WORLD_SIZE"]), strategy="ddp", precision=precision)
    fabric.launch()
    model = work.build(asked)
    model, optimizer = fabric.setup(model, work.optimizer(model))
    batches = fabric.setup_dataloaders(work.loader(asked))
    for step, (images, labels) in enumerate(work.endless(batches, asked.steps)):
        loss = cross_entropy(model(work.prepared(images, asked)), labels)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            fabric.print(f"step {step} loss {loss.item():.4f}", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
