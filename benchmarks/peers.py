"""The same training by lockstep and by others: ResNet-50 at 224² and ResNet-18 at 32², 2 ranks of one thread over gloo.

    python -m benchmarks.peers [--rounds N] [--model resnet50|resnet18] [--timm FOLDER] [--examples FOLDER]

Images are noise in memory, 8 a rank at 224² and 32 at 32²; nothing is decoded. A step counts from update to update, of
a run the median without the warm-up. Each library takes its turn as it comes, in fp32, and with its best flags: bf16
autocast by its own means, and channels_last. `recipes.ddp` is the command that a user types.

FOLDER: checkouts of huggingface/pytorch-image-models and of pytorch/examples, whose own programs then take part as they
are. On a machine that has other things to do only CPU seconds mean something: the second half of the table.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torchvision.io import write_png

from benchmarks import common
from benchmarks.contestants import work

HERE = "benchmarks.contestants"
RANKS = 2
SIZES = {"resnet50": 224, "resnet18": 32}  # pixels per side
SHARES = {"resnet50": 8, "resnet18": 32}  # images per rank
WARM = {"resnet50": 2, "resnet18": 5}
STEPS = {"resnet50": 8, "resnet18": 15}
LIBRARIES = {
    "bare DDP": f"{HERE}.bare",
    "Fabric": f"{HERE}.by_fabric",
    "Accelerate": f"{HERE}.by_accelerate",
    "Trainer": f"{HERE}.by_trainer",
}
FLAGS = ["--bf16", "--channels-last"]
OURS = "recipes.ddp"
FAST, FASTEST = "recipes.ddp precision=auto", ["precision=auto"]
THEIRS = "timm's train.py", "pytorch/examples"  # programs that are taken as they are
OVER_DEFAULTS, OVER_BEST = 2.5, 1.15  # times faster than the others' defaults, and than the best of them

Contestant = Callable[[int], common.Ran]


def contestants(model: str, arguments: argparse.Namespace) -> tuple[dict[str, Contestant], dict[str, float | None]]:
    """(who takes part, how many times faster than each of them recipes.ddp is to be)."""
    size, share, clock = SIZES[model], SHARES[model], (WARM[model], arguments.steps or STEPS[model])
    steps = sum(clock)

    def library(number: int, module: str, flags: Sequence[str] = (), name: str = model) -> common.Ran:
        words = ["--model", name, "--size", size, "--share", share, "--steps", steps, *flags]
        return common.run(common.torchrun(module, RANKS, *words), clock=clock)

    def ours(number: int, settings: Sequence[str] = ()) -> common.Ran:
        images = work.NOISE[size > work.SMALL]
        words = [f"model={model}", "data=synthetic", f"data.image_size={size}", f"data.size={images}", "threads=1"]
        words += ["data.augment=false", f"global_batch_size={RANKS * share}", f"max_steps={steps}", "epochs=1000000"]
        words += ["eval_every=0", "eval_batch_size=16", "device=cpu", f"nproc={RANKS}", *settings]
        with tempfile.TemporaryDirectory() as folder:
            return common.run(["-m", "recipes.ddp", *words, f"out={folder}/run"], clock=clock)

    def examples(number: int) -> common.Ran:
        main = arguments.examples.resolve() / "imagenet" / "main.py"
        words = [main, "--dummy", "-a", model, "-b", share, "-j", 0, "--dist-url", "env://", "--dist-backend", "gloo"]
        with tempfile.TemporaryDirectory() as folder:
            program = common.torchrun(f"{HERE}.examples", RANKS, folder, RANKS * share * steps, *words, "--epochs", 1)
            return common.run(program, clock=clock)

    def timm(number: int) -> common.Ran:
        program = arguments.timm.resolve() / "train.py"
        words = [
            "--model",
            model,
            "--device",
            "cpu",
            "--amp",
            "--amp-dtype",
            "bfloat16",
            "--channels-last",
            "-b",
            share,
        ]
        with tempfile.TemporaryDirectory() as folder:
            for image in (Path(folder, f"{part}/0/{n}.png") for part in ("train", "val") for n in range(64)):
                image.parent.mkdir(parents=True, exist_ok=True)
                write_png(torch.zeros(3, size, size, dtype=torch.uint8), str(image))
            words += ["--data-dir", folder, "--output", folder]
            return common.run(common.torchrun(program, RANKS, *words), folder, clock=clock)

    who: dict[str, Contestant] = {OURS: ours, FAST: partial(ours, settings=FASTEST)}
    target: dict[str, float | None] = {}
    for name, module in LIBRARIES.items():
        who[f"{name}, fp32"] = partial(library, module=module)
        who[f"{name}, best flags"] = partial(library, module=module, flags=FLAGS)
        bare = module == LIBRARIES["bare DDP"]  # no library's, there to be known
        target |= {f"{name}, fp32": OVER_DEFAULTS, f"{name}, best flags": None if bare else OVER_BEST}
    who["timm's model, best flags"] = partial(library, module=LIBRARIES["bare DDP"], flags=FLAGS, name=f"timm:{model}")
    target["timm's model, best flags"] = OVER_BEST
    if arguments.examples and size == 224:  # the only size of its dummy images
        who["pytorch/examples"] = examples
        target["pytorch/examples"] = OVER_DEFAULTS
    if arguments.timm:
        who["timm's train.py"] = timm
        target["timm's train.py"] = OVER_BEST
    return who, target


def compare(model: str, arguments: argparse.Namespace) -> list[common.Row]:
    who, target = contestants(model, arguments)
    fails: dict[str, str] = {}
    ran = common.in_turn({name: partial(attempt, call, name, fails) for name, call in who.items()}, arguments.rounds)
    wall, cpu = [], []
    for name in [OURS, *target]:
        what = f"{model}: {FAST} / {name}"
        if name in fails:
            wall.append(common.Row(f"steps/s: {what}", [], target[name], note=fails[name]))
            continue
        pairs = list(zip(ran[name], ran[FAST], strict=True))
        ratios = [theirs.step(statistics.median) / mine.step(statistics.median) for theirs, mine in pairs]
        note = ", ".join(
            f"{1000 * statistics.median(each.step(statistics.median) for each in ran[n]):.0f}" for n in (FAST, name)
        )
        wall.append(common.Row(f"steps/s: {what}", ratios, target.get(name), note=f"{note} ms per step"))
        ratios = [theirs.cpu_a_step / mine.cpu_a_step for theirs, mine in pairs]
        cpu.append(common.Row(f"CPU a step: {model}: {name} / {FAST}", ratios))
    return wall + cpu


def attempt(call: Contestant, name: str, fails: dict[str, str], number: int) -> common.Ran | None:
    """Its turn; of a program of others that does not run here, the last line it said, and no further turn."""
    if name in fails:
        return None
    try:
        return call(number)
    except RuntimeError as error:
        if name not in THEIRS:
            raise
        fails[name] = f"does not run: {str(error).splitlines()[-1].strip()[:150]}"
        return None


def rows(arguments: argparse.Namespace) -> list[common.Row]:
    models = [arguments.model] if arguments.model else list(SIZES)
    return [row for model in models for row in compare(model, arguments)]


if __name__ == "__main__":
    common.main(
        __doc__,
        rows,
        rounds=3,
        model={"choices": list(SIZES), "help": "one of the two only"},
        steps={"type": int, "help": "steps that are counted"},
        timm={"type": Path, "metavar": "FOLDER", "help": "a checkout of huggingface/pytorch-image-models"},
        examples={"type": Path, "metavar": "FOLDER", "help": "a checkout of pytorch/examples"},
    )
