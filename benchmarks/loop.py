"""What the loop around a step costs: `recipes.ddp` against a loop written by hand, and three libraries' loops.

    python -m benchmarks.loop [--rounds N]

All train the same tiny network on the digits, 2 ranks of one thread over gloo, 32 images per rank, no augmentation. A
step by hand takes about a millisecond, so what a loop adds can be seen. `recipes.ddp` is the recipe itself, with that
network and the digits as its task (contestants/tiny_task.py) and its defaults: it goes through `run.steps`, watches,
logs, writes heartbeats, agrees on signals, and has a learning-rate schedule. It logs every 50 steps, as often as the
others say their loss, and does not evaluate, as they do not.

In a round all of them live at once and take turns of 0.3 s, 20 each; the others stand still meanwhile. Steps a second
are counted from the first update of a turn to its last.
"""

import argparse
import statistics
import sys
import tempfile

from benchmarks import common

HERE = "benchmarks.contestants"
WARM, RANKS, SHARE = 200, 2, 32
ENDLESS = 10_000_000  # steps: they are stopped before
OURS = "recipes.ddp"
SETTINGS = [f"global_batch_size={RANKS * SHARE}", "eval_every=0", "epochs=1000000", "threads=1", "log_every=50"]
PEERS = {
    "bare": f"{HERE}.bare",
    "Fabric": f"{HERE}.by_fabric",
    "Accelerate": f"{HERE}.by_accelerate",
    "Trainer": f"{HERE}.by_trainer",
}


def rows(arguments: argparse.Namespace) -> list[common.Row]:
    ours = [
        "-m",
        OURS,
        f"task={HERE}.tiny_task:Tiny",
        *SETTINGS,
        f"nproc={RANKS}",
        "device=cpu",
        f"max_steps={ENDLESS}",
    ]
    hand = ["--share", SHARE, "--steps", ENDLESS]
    words = {name: common.torchrun(module, RANKS, *hand) for name, module in PEERS.items()}
    words["bare, no DataLoader"] = common.torchrun(PEERS["bare"], RANKS, *hand, "--in-memory")
    ran = []
    for number in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            commands = {name: common.Command(each) for name, each in words.items()}
            commands[OURS] = common.Command([*ours, f"out={folder}/run"])
            ran.append(common.in_slices(commands, ranks=RANKS, warm=WARM))
        print(f"{number + 1}/{arguments.rounds}", file=sys.stderr, flush=True)
    speed = {name: [found[name].speed for found in ran] for name in ran[0]}
    cpu = {name: [found[name].cpu_a_step for found in ran] for name in ran[0]}
    found = []
    for name in words:
        target = {"bare": 0.97, "bare, no DataLoader": None}.get(name, 1.0)
        note = ", ".join(f"{who} {1e6 / statistics.median(speed[who]):.0f} µs" for who in (OURS, name))
        ratios = common.ratios(speed[OURS], speed[name])
        found.append(common.Row(f"steps/s: {OURS} / {name}", ratios, target, note=note))
    for name in words:
        note = ", ".join(f"{who} {1e6 * statistics.median(cpu[who]):.0f} µs" for who in (OURS, name))
        found.append(common.Row(f"CPU s a step: {name} / {OURS}", common.ratios(cpu[name], cpu[OURS]), note=note))
    return found


if __name__ == "__main__":
    common.main(__doc__, rows)
