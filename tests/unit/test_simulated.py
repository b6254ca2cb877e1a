"""`recipes.verify simulate=N`: ranks that are threads of one process compute what one process computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lockstep.config.compose import compose
from lockstep.distributed.process_group import World
from lockstep.distributed.simulated import require_simulation, simulate
from lockstep.errors import CheckFailed, UserError
from lockstep.registry import get_recipe
from lockstep.verify.simulated import verify_simulated
from recipes import verify
from tests.helpers.harness import command

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


def asked(monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    found: list[Any] = []
    monkeypatch.setattr("sys.argv", ["recipes.verify", *words])
    compose(verify.train, found.append)
    return found[0]


def test_eight_ranks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.train.alone(asked(monkeypatch, "recipes=[tensor_parallel]", "simulate=8")) == 0
    shown = capsys.readouterr().out
    assert "8 simulated ranks, threads of one process by torch's MultiThreadedPG" in shown
    assert "tensor=8 in fp64: equal" in shown


@pytest.mark.soak
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", ["tensor_parallel", "context_parallel", "expert_parallel"])
def test_sixty_four_ranks(name: str, tmp_path: Path) -> None:
    done = command("-m", "recipes.verify", f"recipes=[{name}]", "simulate=64", cwd=tmp_path, timeout=380)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "=64 in fp64: equal" in done.stdout
    assert not list(tmp_path.iterdir()), "it leaves nothing"


@pytest.mark.slow
def test_a_broken_recipe_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    config = asked(monkeypatch, "recipes=[context_parallel]", "simulate=4")
    recipe, single = get_recipe("context_parallel"), get_recipe("single")
    monkeypatch.setitem(recipe.train.__globals__, "average_gradients", lambda model: None)
    with pytest.raises(CheckFailed, match=r"context_parallel context=4 \(.*the gradient of"):
        verify_simulated(config, [recipe], single, [])


def test_ranks_have_generators_and_errors_of_their_own() -> None:
    drawn: dict[int, list[float]] = {}

    def rank(world: World) -> None:
        torch.manual_seed(world.rank)
        first = torch.rand(1)
        dist.barrier()
        drawn[world.rank] = [first.item(), torch.rand(1).item()]
        total = torch.ones(())
        dist.all_reduce(total)
        assert total.item() == world.world_size
        if world.rank == 1:
            raise ValueError("on purpose")
        dist.barrier()  # which rank 1 never joins

    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="on purpose") as caught:
        simulate(3, rank, 1)
    assert caught.value.__notes__ == ["on simulated rank 1 of 3"]
    assert torch.equal(torch.get_rng_state(), before)
    assert not dist.is_initialized()
    for number, found in drawn.items():
        assert found == torch.rand(2, generator=torch.Generator().manual_seed(number)).tolist()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recipes=[zero1]"], r"recipes.zero1 is not simulated; allowed are tensor_parallel, context_parallel,"),
        (["recipes=[parallel_mesh]", "pipeline=2", "context=1"], r"pipeline=2: a pipeline's ranks do different things"),
        (
            ["recipes=[tensor_parallel]", "tensor=3"],
            r"tensor=3: simulate=8 does not divide by it; allowed are 1, 2, 4, 8",
        ),
        (
            ["recipes=[tensor_parallel]", "task=language"],
            r"tensor=8: does not divide heads=4; allowed for this model are 1",
        ),
        (
            ["recipes=[context_parallel]", "task=language", "by=ulysses"],
            r"context=8: by=ulysses .* 4 heads do not divide; allowed for this model are 1, 2",
        ),
        (
            ["recipes=[expert_parallel]", "task=language", "task.experts=4", "expert=8"],
            r"expert=8: does not divide the 4 experts",
        ),
    ],
)
def test_what_cannot_be_simulated_is_refused(words: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = asked(monkeypatch, *words, "simulate=8")
    with pytest.raises(UserError, match=said):
        verify_simulated(config, [get_recipe(name) for name in config.recipes], get_recipe("single"), words)


def test_a_torch_without_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    threaded = require_simulation(8)
    monkeypatch.delattr(threaded, "Collective")
    with pytest.raises(UserError, match=r"simulate=8: torch .* has no ranks as threads .*Collective"):
        require_simulation(8)


@pytest.mark.parametrize("word", ["interrupt=2", "nproc=2", "precision=bf16", "trace=true", "against=single"])
def test_what_goes_with_real_ranks_is_refused(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=word.partition("=")[0]):
        verify.train.alone(asked(monkeypatch, word, "simulate=8"))
