"""One process, one device: the loop that every other recipe is read against.

Each step takes one global batch, computes the loss and its gradients, clips them where `gradients.*` asks for it, updates
the weights and goes to the next learning rate. What is the same for every technique (data order, evaluation, logging,
checkpoints) happens inside `run.steps`, between two batches.

    python -m recipes.single

Expect: ResNet-18 reaches an accuracy of 0.97 or more on scikit-learn's digits, in about a minute on two CPU cores.
Source: https://docs.pytorch.org/tutorials/beginner/introyt/trainingyt.html
"""

from lockstep import Run, recipe
from lockstep.config.schema import Config
from lockstep.training.accumulate import micro_batches
from lockstep.training.clip import clip_gradients
from lockstep.training.optim import build_optimizer, build_scheduler


@recipe(ranks=1, next_command="python -m recipes.ddp     the same training, shared by two ranks")
def train(run: Run[Config]) -> None:
    model = run.place(run.task.build_model())
    optimizer = build_optimizer(run.config.optim, model)
    scheduler = build_scheduler(run.config.optim, optimizer, run.scheduled_steps)
    scaler = run.scaler()  # precision=fp16 needs it; else it passes everything on

    for batch in run.steps(model=model, optimizer=optimizer, scheduler=scheduler):
        for micro in micro_batches(batch, run.config.accumulate, model):  # one, unless accumulate=N
            with run.autocast():
                loss = run.task.loss(model(micro.inputs), micro.targets)
            scaler.scale(loss * micro.weight).backward()
            run.record(loss=loss, weight=micro.weight)
        clip_gradients(model, optimizer, scaler, run.config.gradients)
        scaler.step(optimizer)  # unscales the gradients, unless that is done; if one is not finite, no rank updates
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    train.main()
