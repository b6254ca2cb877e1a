"""What the loop around a step costs: `recipes.ddp` against a loop written by hand, and three libraries' loops.

    python -m benchmarks.loop [--rounds N] [--steps N]

All train the same tiny network on the digits, 2 ranks of one thread over gloo, 32 images a rank, no augmentation. A
step by hand takes about a millisecond, so what a loop adds can be seen. `recipes.ddp` is the recipe itself with that
network for its ResNet (contestants/tiny_ddp.py) and its defaults: it goes through `run.steps`, watches, logs, writes
heartbeats, agrees on signals, and has a learning-rate schedule. It evaluates at the end only, since the others do not.

Steps a second are counted from update to update over all steps after the warm-up. On a machine that has other things
to do only the CPU seconds of a step mean something: the second half of the table.
"""

import argparse
import statistics
import tempfile
from functools import partial

from benchmarks import common

HERE = "benchmarks.contestants"
WARM, RANKS, SHARE = 200, 2, 32
OURS = "recipes.ddp"
SETTINGS = ["data.augment=false", f"batch_size={RANKS * SHARE}", "eval_every=0", "epochs=1000000", "threads=1"]
PEERS = {
    "bare": f"{HERE}.bare",
    "Fabric": f"{HERE}.by_fabric",
    "Accelerate": f"{HERE}.by_accelerate",
    "Trainer": f"{HERE}.by_trainer",
}


def rows(arguments: argparse.Namespace) -> list[common.Row]:
    def peer(number: int, module: str, *more: str) -> common.Ran:
        words = ["--share", SHARE, "--steps", WARM + arguments.steps, *more]
        return common.run(common.torchrun(module, RANKS, *words), clock=(WARM, arguments.steps))

    def ours(number: int) -> common.Ran:
        with tempfile.TemporaryDirectory() as folder:
            words = [
                *SETTINGS,
                f"nproc={RANKS}",
                "device=cpu",
                f"max_steps={WARM + arguments.steps}",
                f"out={folder}/run",
            ]
            return common.run(["-m", f"{HERE}.tiny_ddp", *words], clock=(WARM, arguments.steps))

    contestants = {OURS: ours} | {name: partial(peer, module=module) for name, module in PEERS.items()}
    contestants["bare, no DataLoader"] = lambda number: peer(number, f"{HERE}.bare", "--in-memory")
    ran = common.in_turn(contestants, arguments.rounds)
    speed = {name: [1 / each.step("mean") for each in found] for name, found in ran.items()}
    cpu = {name: [each.cpu_a_step for each in found] for name, found in ran.items()}
    found = []
    for name in ran:
        if name != OURS:
            target = {"bare": 0.97, "bare, no DataLoader": None}.get(name, 1.0)
            note = ", ".join(f"{who} {1e6 / statistics.median(speed[who]):.0f} µs" for who in (OURS, name))
            found.append(
                common.Row(f"steps/s: {OURS} / {name}", common.ratios(speed[OURS], speed[name]), target, note=note)
            )
    for name in ran:
        if name != OURS:
            note = ", ".join(f"{who} {1e6 * statistics.median(cpu[who]):.0f} µs" for who in (OURS, name))
            found.append(common.Row(f"CPU s a step: {name} / {OURS}", common.ratios(cpu[name], cpu[OURS]), note=note))
    return found


if __name__ == "__main__":
    common.main(__doc__, rows, steps={"type": int, "default": 2000, "help": "steps that are counted (2000)"})
