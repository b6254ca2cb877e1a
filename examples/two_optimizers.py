"""A training loop of one's own: Muon for the matrices, AdamW for all else, and an average of the weights.

Whatever a recipe makes, lockstep uses and keeps: two optimizers, a schedule of torch's for each, an exponential moving
average of the weights, which is what is evaluated and exported here, and a further term of the loss, logged beside it.
Killed at any moment and started again, it ends with the same bits.

    python examples/two_optimizers.py                       two ranks on this machine, or one per GPU
    python examples/two_optimizers.py penalty=0 nproc=4     a key of its own, as any other
    python -m recipes.fsdp task=examples/two_optimizers.py:Digits

Expect: an accuracy of 0.93 or more on scikit-learn's digits, in ten seconds on two CPU cores.
Source: https://kellerjordan.github.io/posts/muon/, https://docs.pytorch.org/docs/stable/optim.html#averaging-weights
"""

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import TensorDataset

from lockstep import Run, recipe
from lockstep.config.keys import key
from lockstep.config.schema import Config
from lockstep.training.accumulate import micro_batches
from lockstep.training.clip import clip_gradients


@dataclass
class Digits:
    hidden: int = 128

    best = "accuracy"
    unit = "digits"

    def __post_init__(self) -> None:
        pixels, labels = load_digits(return_X_y=True)
        inputs, targets = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
        self.train_set = TensorDataset(inputs[:1440], targets[:1440])
        self.eval_set = TensorDataset(inputs[1440:], targets[1440:])

    def build_model(self) -> nn.Module:
        return nn.Sequential(
            *(nn.Linear(64, self.hidden), nn.ReLU()), *(nn.Linear(self.hidden, self.hidden), nn.ReLU()),
            nn.Linear(self.hidden, 10),
        )  # fmt: skip

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, tuple[Tensor, int]]:
        return {"accuracy": ((outputs.argmax(1) == targets).sum(), len(targets))}


@dataclass
class TwoOptimizersConfig(Config):
    penalty: float = key(
        1e-3, "weight of the logits' squared log-sum-exp in the loss, which keeps them small", minimum=0
    )
    decay: float = key(0.98, "share of the average that stays at each step", minimum=0)


@recipe(config=TwoOptimizersConfig, task=Digits)
def train(run: Run[TwoOptimizersConfig]) -> None:
    config = run.config
    model = run.place(run.task.build_model())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.decay))
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    model = DistributedDataParallel(model, device_ids=run.device_ids, gradient_as_bucket_view=True)
    muon = torch.optim.Muon(matrices, lr=config.optim.lr, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=3e-3)
    schedulers = [StepLR(muon, step_size=50, gamma=0.5), CosineAnnealingLR(adamw, run.scheduled_steps)]
    optimizers = [muon, adamw]
    scaler = run.scaler()

    for batch in run.steps(
        model=model,
        optimizer=optimizers,
        scheduler=schedulers,
        keep={"average": average},
        whole=lambda: average.module,  # what is evaluated and exported
    ):
        for micro in micro_batches(batch, config.accumulate, model):
            with run.autocast():
                outputs = model(micro.inputs)
                loss = run.task.loss(outputs, micro.targets)
                penalty = outputs.logsumexp(1).square().mean()
            scaler.scale((loss + config.penalty * penalty) * micro.weight).backward()
            run.record(loss=loss, penalty=penalty, weight=micro.weight)
        clip_gradients(model, optimizers, scaler, config.gradients)
        scaler.step(optimizers)  # of all or, where fp16 overflows, of none
        scaler.update()
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            scheduler.step()
            optimizer.zero_grad()
        average.update_parameters(model.module)


if __name__ == "__main__":
    train.main()
