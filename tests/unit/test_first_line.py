"""A tool's first line is on the screen soon: what takes seconds to load is loaded after it."""

from __future__ import annotations

from tests.helpers.harness import command

TOOLS = ("compare", "diff", "doctor", "plan", "tune", "verify")
SLOW_TO_LOAD = (
    *("torch._dynamo", "torch._inductor.compile_fx", "torch.distributed.tensor", "torch.distributed.fsdp"),
    *("torch.distributed.pipelining", "torchvision", "sklearn", "matplotlib", "lightning", "deepspeed", "transformers"),
)


def test_a_tool_does_not_load_what_only_its_ranks_need() -> None:
    loads = f"import {', '.join(f'recipes.{tool}' for tool in TOOLS)}, sys\nprint(*sys.modules)"
    done = command("-c", loads, fresh=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert {f"recipes.{tool}" for tool in TOOLS} <= loaded
    assert not loaded & set(SLOW_TO_LOAD)
