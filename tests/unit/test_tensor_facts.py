"""Facts of PyTorch that the recipes rely on, several of which are often told otherwise."""

from __future__ import annotations

import io
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

exact: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-14}


def shares(one: Tensor, other: Tensor) -> bool:
    """Whether both lie in the same storage. To compare `storage()`s with == does not tell."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(size: int = 4) -> Tensor:
    """A batch of images as a decoder gives them, [N, H, W, C], seen as [N, C, H, W]: not contiguous."""
    return torch.arange(size * 4 * 4 * 3.0).reshape(size, 4, 4, 3).permute(0, 3, 1, 2)


# Tables of facts ------------------------------------------------------------------------------------------------------

Operation = Callable[[Tensor], Tensor]
# Of an [8, 6]. Cutting a batch into micro-batches, or an order into ranks' shares, costs no memory and no copy.
VIEWS: dict[str, Operation] = {
    "chunk": lambda x: x.chunk(4)[1],
    "split": lambda x: x.split(3)[1],
    "tensor_split": lambda x: x.tensor_split(4)[1],
    "unbind": lambda x: x.unbind()[1],
    "narrow": lambda x: x.narrow(0, 2, 3),
    "select": lambda x: x.select(0, 2),
    "slice": lambda x: x[2:5],
    "view": lambda x: x.view(-1),
    "transpose": lambda x: x.transpose(0, 1),
    "permute": lambda x: x.permute(1, 0),
    "unsqueeze": lambda x: x.unsqueeze(0),
    "unflatten": lambda x: x.unflatten(0, (4, -1)),
    "flatten": lambda x: x.flatten(),
    "detach": lambda x: x.detach(),
}
# A batch picked by sample numbers is its own: augmenting it in place cannot spoil the data set.
COPIES: dict[str, Operation] = {
    "repeat": lambda x: x.repeat(1, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(1, dim=0),
    "index_select": lambda x: x.index_select(0, torch.arange(8)),
    "index": lambda x: x[torch.arange(8)],
    "gather": lambda x: x.gather(0, torch.arange(8)[:, None].expand(-1, 6)),
    "masked_select": lambda x: x.masked_select(torch.ones(8, 6, dtype=torch.bool)),
    "cat": lambda x: torch.cat([x]),
    "stack": lambda x: torch.stack([x]),
    "reshape of a transposed one": lambda x: x.t().reshape(-1),
    "contiguous of a transposed one": lambda x: x.t().contiguous(),
    "clone": lambda x: x.clone(),
}


def test_these_share_storage() -> None:
    for name, operation in VIEWS.items():
        whole = numbers(8, 6)
        part = operation(whole)
        assert shares(part, whole), name
        part.zero_()
        assert (whole == 0).sum() == part.numel(), name


def test_these_copy() -> None:
    for name, operation in COPIES.items():
        whole = numbers(8, 6)
        before = whole.clone()
        copy = operation(whole)
        assert not shares(copy, whole), name
        copy.zero_()
        assert torch.equal(whole, before), name


GREY, TABLE, VECTOR = numbers(5, 8, 8), torch.tensor([[1, 2], [3, 4]]), numbers(4)
RANKS = torch.tensor([[1.0, 2.0, 0.0, 0.0], [3.0, 4.0, 5.0, 0.0]])
LOGITS, LABELS = numbers(6, 4), torch.tensor([0, 3, 1, 1, 2, 0])
BATCH, MATRIX = numbers(10, 3, 4), numbers(4, 2, seed=2)


def lengths(parts: Any) -> list[int]:
    return [len(part) for part in parts]


def error(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


HOLDS: dict[str, Callable[[], bool | Tensor]] = {
    # Cutting: ranks that disagree on the number of micro-batches, and so of collectives, hang.
    "chunk(4) of 9 gives 3 chunks: pieces of ceil(9 / 4)": lambda: lengths(torch.arange(9).chunk(4)) == [3, 3, 3],
    "chunk(4) of 10 leaves a ragged end": lambda: lengths(torch.arange(10).chunk(4)) == [3, 3, 3, 1],
    "chunk(4) of 3 gives 3": lambda: lengths(torch.arange(3).chunk(4)) == [1, 1, 1],
    "chunks are the whole": lambda: torch.equal(torch.cat(torch.arange(10).chunk(4)), torch.arange(10)),
    "tensor_split(4) always gives 4": lambda: lengths(torch.arange(9).tensor_split(4)) == [3, 2, 2, 2],
    "tensor_split may give empty ones": lambda: lengths(torch.arange(3).tensor_split(4)) == [1, 1, 1, 0],
    "unbind of unflatten is chunk": lambda: all(
        torch.equal(one, other) and shares(one, LOGITS)
        for one, other in zip(LOGITS.unflatten(0, (3, -1)).unbind(), LOGITS.chunk(3), strict=True)
    ),
    "stack makes a dimension": lambda: torch.stack(images(3).unbind()).shape == (3, 3, 4, 4),
    "cat makes none": lambda: torch.cat(images(3).unbind()).shape == (9, 4, 4),
    "squeeze() takes a batch of one too": lambda: numbers(1, 5, 1, 1).squeeze().shape == (5,),
    "flatten(1) keeps a batch of one": lambda: numbers(1, 5, 1, 1).flatten(1).shape == (1, 5),
    # Repeating: grey digits become three channels for free.
    "expand copies nothing": lambda: shares(GREY[:, None].expand(-1, 3, -1, -1), GREY),
    "expand is repeat, by a stride of 0": lambda: (
        torch.equal(GREY[:, None].expand(-1, 3, -1, -1), GREY[:, None].repeat(1, 3, 1, 1))
        and GREY[:, None].expand(-1, 3, -1, -1).stride(1) == 0
    ),
    "expand adds dimensions in front": lambda: VECTOR.expand(10, 4).shape == (10, 4),
    "repeat_interleave is flat without dim": lambda: TABLE.repeat_interleave(2).tolist() == [1, 1, 2, 2, 3, 3, 4, 4],
    "and keeps the shape with it": lambda: TABLE.repeat_interleave(2, dim=0).shape == (4, 2),
    # Contiguity: images in channels_last go through the same model without a copy.
    "permute may stay contiguous": lambda: numbers(2, 1, 4, 4).permute(0, 2, 3, 1).is_contiguous(),
    "and need not": lambda: not numbers(2, 3, 4, 4).permute(0, 2, 3, 1).is_contiguous(),
    "flatten takes what is not contiguous": lambda: torch.equal(images().flatten(1), images().contiguous().flatten(1)),
    "so does unfold": lambda: torch.equal(F.unfold(images(), 2), F.unfold(images().contiguous(), 2)),
    "as_strided reads the storage, whatever the view": lambda: (
        torch.arange(6).reshape(2, 3).t().as_strided((6,), (1,)).tolist() == [0, 1, 2, 3, 4, 5]
    ),
    "a write through a reshape of a transposed one is lost": lambda: (
        (zeros := torch.zeros(3, 2)).t().reshape(6).fill_(1).sum() == 6 and zeros.sum() == 0
    ),
    # Choosing: by gather the loss of each sample, by an index whole samples.
    "gather picks a number per row": lambda: torch.allclose(
        -LOGITS.log_softmax(1).gather(1, LABELS[:, None]).mean(), F.cross_entropy(LOGITS, LABELS), **exact
    ),
    "gather has the index's shape; rows come by an index": lambda: (
        torch.gather(TABLE, 0, torch.tensor([[1, 0]])).shape == (1, 2)
        and TABLE[torch.tensor([[1, 0]])].shape == (1, 2, 2)
    ),
    "scatter makes one-hot": lambda: torch.equal(
        torch.zeros(6, 4).scatter_(1, LABELS[:, None], 1).long(), F.one_hot(LABELS, 4)
    ),
    "one_hot without num_classes is as wide as this batch's largest label": lambda: (
        F.one_hot(torch.tensor([0, 1])).shape != F.one_hot(torch.tensor([3, 0])).shape
    ),
    "masked_select's length depends on values": lambda: lengths(row.masked_select(row > 0) for row in RANKS) == [2, 3],
    "sums and counts of ranks give the mean of all": lambda: (
        sum((row * (row > 0)).sum() for row in RANKS) / (RANKS > 0).sum() == RANKS[RANKS > 0].mean()
    ),
    "index_select keeps the dimension": lambda: TABLE.index_select(1, torch.tensor([0])).tolist() == [[1], [3]],
    "select drops it": lambda: TABLE.select(1, 0).tolist() == [1, 3],
    # Products
    "matmul takes a batch and a vector": lambda: torch.allclose(
        BATCH @ VECTOR, torch.stack([sample.mm(VECTOR[:, None])[:, 0] for sample in BATCH]), **exact
    ),
    "and a batch and a matrix": lambda: torch.allclose(
        BATCH @ MATRIX, torch.stack([sample.mm(MATRIX) for sample in BATCH]), **exact
    ),
    "dot is the square of the norm": lambda: torch.allclose(VECTOR.dot(VECTOR), VECTOR.norm() ** 2, **exact),
    # Moving: an optimizer that was made before `model.to` holds the right objects still.
    "Module.to keeps its parameters": lambda: (
        (weight := (model := nn.Linear(2, 2)).weight) is model.to(torch.float64).weight
        and weight.dtype == torch.float64
    ),
    "Tensor.to may return itself": lambda: TABLE.to("cpu") is TABLE and TABLE.to(torch.float64) is not TABLE,
    "but not with copy=True": lambda: not shares(TABLE.to("cpu", copy=True), TABLE),
    # Gradients that are needed or not
    "under set_grad_enabled(True) what needs none gets none": lambda: not (torch.ones(2) * 2).requires_grad,
    "a parameter changes in place under no_grad": lambda: (
        torch.no_grad()(nn.Parameter(torch.ones(2)).add_)(1).tolist() == [2, 2]  # type: ignore[operator]
    ),
}


def test_these_hold() -> None:
    assert [fact for fact, holds in HOLDS.items() if not holds()] == []


def graph() -> Tensor:
    return numbers(4, 2).requires_grad_() * 1


REFUSED: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "unbind of a tuple": (TypeError, "must be Tensor, not tuple", lambda: torch.unbind(LOGITS.chunk(3))),  # type: ignore[arg-type]
    "unflatten of a ragged split": (RuntimeError, "don't multiply up", lambda: LOGITS.unflatten(0, (4, -1))),
    "writing to what was expanded": (RuntimeError, "more than one", lambda: numbers(5, 1).expand(-1, 3).sub_(1)),
    "expand inside, from 4 to 10": (RuntimeError, "must match the existing", lambda: VECTOR.expand(4, 10)),
    "view of a transposed one": (RuntimeError, "view size is not", lambda: LOGITS.t().view(24)),
    "mm of a batch": (RuntimeError, "must be a matrix", lambda: BATCH.mm(MATRIX)),
    "mm of a vector": (RuntimeError, "must be a matrix", lambda: MATRIX.t().mm(VECTOR)),
    "mm with a stretched 1": (RuntimeError, "cannot be multiplied", lambda: numbers(2, 3).mm(numbers(1, 3))),
    "dot of two matrices": (RuntimeError, "1D tensors expected", lambda: MATRIX.dot(MATRIX)),
    "backward through a value changed in place": (
        RuntimeError,
        "modified by an inplace operation",
        lambda: graph().exp().mul_(2).sum().backward(),
    ),
    "writing to a chunk of a graph": (RuntimeError, "multiple views", lambda: graph().chunk(2)[0].zero_()),
    "writing to an unbound part of a graph": (RuntimeError, "multiple views", lambda: graph().unbind()[0].zero_()),
    "a parameter changed in place": (RuntimeError, "leaf Variable", lambda: nn.Parameter(torch.ones(2)).add_(1)),
    "backward of a vector": (RuntimeError, "only for scalar outputs", lambda: graph().backward()),
    "batch norm of one sample of one pixel": (
        ValueError,
        "Expected more than 1 value per channel",
        lambda: nn.BatchNorm2d(3)(torch.randn(10, 3, 1, 1).chunk(4)[-1]),
    ),
}


def test_torch_refuses() -> None:
    for kind, words, act in REFUSED.values():
        with pytest.raises(kind, match=words):
            act()


def test_reshape_shares_wherever_strides_allow() -> None:
    """Not only where the input is contiguous. So nothing here writes through a reshape."""
    for tensor, shape, is_view in [
        (numbers(4, 6), (2, 12), True),
        (numbers(4, 6)[:, :4], (4, 2, 2), True),
        (numbers(4, 6).t(), (6, 2, 2), True),
        (numbers(4, 6)[::2], (2, 3, 2), True),
        (numbers(4, 6)[:, :4], (16,), False),
        (numbers(4, 6).t(), (24,), False),
    ]:
        assert shares(tensor.reshape(shape), tensor) == is_view, shape


# What is saved --------------------------------------------------------------------------------------------------------


def test_saving_a_view_saves_its_whole_storage() -> None:
    """A rank that saves its slice of something large without clone() writes everyone's."""

    def size(tensor: Tensor) -> int:
        file = io.BytesIO()
        torch.save(tensor, file)
        return file.tell()

    whole = torch.zeros(100_000)
    assert size(whole[:10]) > whole.nbytes
    assert size(whole[:10].clone()) < whole.nbytes / 50


def test_state_dict_is_the_live_weights() -> None:
    """A best checkpoint kept in memory has to be cloned: otherwise it goes on training."""
    model = nn.Linear(2, 2)
    kept = model.state_dict()
    cloned = {name: tensor.clone() for name, tensor in kept.items()}
    with torch.no_grad():
        model.weight.add_(1)
    assert torch.equal(kept["weight"], model.weight)
    assert not torch.equal(cloned["weight"], model.weight)
    model.load_state_dict(cloned)
    assert torch.equal(model.weight, cloned["weight"])
    assert not shares(model.weight, cloned["weight"])


def test_state_dict_has_parameters_and_persistent_buffers() -> None:
    """What is not in it is not in a checkpoint; what is no parameter no optimizer and no all-reduce sees."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("kept", torch.ones(2))
            self.register_buffer("lost", torch.ones(2), persistent=False)
            self.plain = torch.ones(2, requires_grad=True)

    assert list(Model().state_dict()) == ["weight", "kept"]
    assert [name for name, _ in Model().named_parameters()] == ["weight"]


def test_a_saved_module_does_not_load_by_default(tmp_path: Path) -> None:
    """Checkpoints here are state dicts: nothing in a file that another rank or person wrote gets run."""
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "state.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(tmp_path / "module.pt")
    assert list(torch.load(tmp_path / "state.pt")) == ["weight", "bias"]


# Autograd -------------------------------------------------------------------------------------------------------------


def test_in_place_is_right_where_the_value_is_not_needed() -> None:
    """ResNet's ReLU(inplace=True) and `out += identity` save memory in every recipe, with the same gradients."""

    def gradient(in_place: bool) -> Tensor:
        weight, inputs = numbers(5, 5).requires_grad_(), numbers(3, 5, seed=1)
        outputs = inputs @ weight
        outputs = outputs.add_(inputs).relu_() if in_place else (outputs + inputs).relu()
        (got,) = torch.autograd.grad(outputs.square().sum(), weight)
        return got

    assert gradient(False).abs().max() > 1e-3
    assert torch.equal(gradient(True), gradient(False))


def test_backward_accumulates() -> None:
    """Accumulation is leaving out zero_grad, which sets gradients to None."""
    model = nn.Linear(2, 1, bias=False)
    for times in (1, 2, 3):
        model(torch.ones(1, 2)).sum().backward()
        assert model.weight.grad is not None
        assert model.weight.grad.tolist() == [[times, times]]
    model.zero_grad()
    assert model.weight.grad is None


def test_backward_can_be_cut_in_two() -> None:
    """A pipeline's stage starts from the gradient that the next one sends; from ones it would train on another loss."""
    first, second, inputs = nn.Linear(4, 5).double(), nn.Linear(5, 2).double(), numbers(3, 4)
    whole = torch.autograd.grad(second(first(inputs).tanh()).square().sum(), list(first.parameters()))
    sent = first(inputs).tanh()
    received = sent.detach().requires_grad_()
    second(received).square().sum().backward()
    sent.backward(gradient=received.grad)
    for parameter, wanted in zip(first.parameters(), whole, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, wanted)


def test_a_sum_of_losses_holds_every_graph() -> None:
    """The running loss of a run is detached: otherwise memory grows by a graph a step, on every rank."""

    def nodes(tensor: Tensor) -> int:
        seen: set[Any] = set()
        waiting = [tensor.grad_fn] if tensor.grad_fn else []
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                waiting += [before for before, _ in node.next_functions if before]
        return len(seen)

    model = nn.Linear(2, 1)
    losses = [model(torch.ones(1, 2)).sum() for _ in range(4)]
    assert nodes(sum(losses, torch.zeros(()))) > 3 * nodes(losses[0])
    assert nodes(sum((loss.detach() for loss in losses), torch.zeros(()))) == 0


class Kept:
    """What autograd saved for backward, so that a weak reference tells how long it lives."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize(
    ("backward", "no_grad", "held"), [(False, False, True), (True, False, False), (False, True, False)]
)
def test_backward_frees_what_the_graph_saved(backward: bool, no_grad: bool, held: bool) -> None:
    """Evaluation has no backward: without no_grad, losses that are kept there hold all activations."""
    saved: list[weakref.ref[Kept]] = []

    def pack(tensor: Tensor) -> Kept:
        kept = Kept(tensor.detach())  # an output that is saved as it is would hold its own graph
        saved.append(weakref.ref(kept))
        return kept

    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    with torch.set_grad_enabled(not no_grad), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x.tensor):
        loss = model(torch.ones(4, 2)).sum()
        if backward:
            loss.backward()
    assert any(reference() is not None for reference in saved) == held
    del loss
    assert all(reference() is None for reference in saved)


# Modules --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("training", "grads", "frozen", "changes"),
    [(True, True, False, True), (True, False, False, True), (True, True, True, True), (False, True, False, False)],
    ids=["train", "train, no_grad", "train, frozen", "eval"],
)
def test_only_eval_stops_batch_norm_s_statistics(training: bool, grads: bool, frozen: bool, changes: bool) -> None:
    """A rank that evaluates in train mode, or a "frozen" backbone, drifts without a gradient involved."""
    norm = nn.BatchNorm1d(3).double().train(training).requires_grad_(not frozen)
    with torch.set_grad_enabled(grads):
        norm(numbers(8, 3) + 5)
    assert norm.num_batches_tracked == int(changes)


def test_eval_stays_until_train_is_called() -> None:
    """train() belongs inside the epoch loop; without it only the first epoch trains as the config says."""
    model, ones = nn.Sequential(nn.Dropout(0.5)), torch.ones(1000)
    assert (model(ones) == 0).any()
    assert torch.equal(model.eval()(ones), ones)
    assert torch.equal(model(ones), ones)
    assert (model.train()(ones) == 0).any()


# Accumulating gradients -----------------------------------------------------------------------------------------------


def tiny(norm: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), norm or nn.Identity(), nn.Tanh(), nn.Linear(4, 2)).double()


def accumulated(model: nn.Module, size: int, n: int, weight: Callable[[int, int], float]) -> Tensor:
    """The gradient over `chunk(n)` of a batch, each loss times weight(length of its chunk, number of chunks)."""
    inputs, labels = numbers(size, 3, seed=1), torch.arange(size) % 2
    chunks = inputs.chunk(n)
    for some, theirs in zip(chunks, labels.chunk(n), strict=True):
        (F.cross_entropy(model(some), theirs) * weight(len(some), len(chunks))).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


@pytest.mark.parametrize(("size", "n"), [(8, 4), (12, 3), (9, 4), (10, 4), (7, 2), (3, 8)])
def test_losses_are_weighted_by_their_samples(size: int, n: int) -> None:
    """loss · len(chunk) / len(batch) gives the batch's gradient for any chunks; loss / n only for even ones, where
    of 10 in 4 the last sample would count 2.5 times; undivided it is n times the gradient. So it is for ranks."""
    wanted, pieces = accumulated(tiny(), size, 1, lambda *_: 1), lengths(torch.arange(size).chunk(n))
    even = len(set(pieces)) == 1
    assert torch.allclose(accumulated(tiny(), size, n, lambda length, _: length / size), wanted, **exact)
    off = error(accumulated(tiny(), size, n, lambda _, number: 1 / number), wanted)
    assert off < 1e-12 if even else off > 0.01
    if even:
        assert torch.allclose(accumulated(tiny(), size, n, lambda *_: 1), len(pieces) * wanted, **exact)


def test_batch_norm_is_not_the_same_in_micro_batches() -> None:
    """Each chunk has its own statistics; accumulation, data and pipeline parallel all have that difference."""

    def off(norm: Callable[[], nn.Module]) -> float:
        wanted = accumulated(tiny(norm()), 8, 1, lambda *_: 1)
        return error(accumulated(tiny(norm()), 8, 2, lambda length, _: length / 8), wanted)

    assert off(lambda: nn.BatchNorm1d(4)) > 0.05
    assert off(lambda: nn.GroupNorm(2, 4)) < 1e-12
