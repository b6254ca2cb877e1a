"""Tensor facts that the recipes rely on, and the ones the source notes have wrong (NOTES.md S5, S13, S16).

Each docstring is a fact, then why it matters here. "Notes wrong" marks a statement of the notes that does not hold.
"""

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
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(size: int = 4) -> Tensor:
    """A batch of images as a decoder gives them, [N, H, W, C], seen as [N, C, H, W]: not contiguous."""
    return torch.arange(size * 4 * 4 * 3.0).reshape(size, 4, 4, 3).permute(0, 3, 1, 2)


# Which storage: what shares and what copies -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.chunk(4)[1],
        lambda x: x.split(3)[1],
        lambda x: x.tensor_split(4)[1],
        lambda x: x.unbind()[1],
        lambda x: x.narrow(0, 2, 3),
        lambda x: x.select(0, 2),
        lambda x: x[2:5],
        lambda x: x.view(-1),
        lambda x: x.transpose(0, 1),
        lambda x: x.permute(1, 0),
        lambda x: x.swapdims(0, 1),
        lambda x: x.unsqueeze(0),
        lambda x: x.unflatten(0, (4, -1)),
        lambda x: x.flatten(),
        lambda x: x.detach(),
    ],
    ids="chunk split tensor_split unbind narrow select slice view transpose permute swapdims unsqueeze unflatten "
    "flatten detach".split(),
)
def test_these_share_storage(operation: Callable[[Tensor], Tensor]) -> None:
    """chunk, split, unbind, slices and the shape operations give views of the same storage, in which writes show.

    So cutting a batch into micro-batches, or a sampler's order into ranks' shares, costs no memory and no copy.
    """
    whole = numbers(8, 6)
    part = operation(whole)
    assert shares(part, whole)
    part.zero_()
    assert (whole == 0).sum() == part.numel()


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.repeat(1, 1),
        lambda x: x.repeat_interleave(1, dim=0),
        lambda x: x.index_select(0, torch.arange(8)),
        lambda x: x[torch.arange(8)],
        lambda x: x.gather(0, torch.arange(8)[:, None].expand(-1, 6)),
        lambda x: x.masked_select(torch.ones(8, 6, dtype=torch.bool)),
        lambda x: torch.cat([x]),
        lambda x: torch.stack([x]),
        lambda x: x.t().reshape(-1),
        lambda x: x.t().contiguous(),
        lambda x: x.clone(),
    ],
    ids="repeat repeat_interleave index_select index gather masked_select cat stack reshape-of-transposed contiguous "
    "clone".split(),
)
def test_these_copy(operation: Callable[[Tensor], Tensor]) -> None:
    """repeat, indexing by a tensor, gather, cat, stack, and reshape of a transposed tensor give new storage.

    A batch picked by sample numbers is therefore its own: augmenting it in place cannot spoil the data set.
    """
    whole = numbers(8, 6)
    before = whole.clone()
    copy = operation(whole)
    assert not shares(copy, whole)
    copy.zero_()
    assert torch.equal(whole, before)


def test_storages_are_not_compared_with_equals() -> None:
    """Notes wrong: `t.storage() == part.storage()` does not tell whether they share, and storage() is deprecated.

    Whether a micro-batch is a copy is a question of memory: compare addresses of untyped_storage() instead.
    """
    whole = numbers(2, 5)
    part = whole.split(2, dim=1)[2]
    with pytest.warns(UserWarning, match="TypedStorage is deprecated"):
        first, second = whole.storage(), part.storage()
    assert first != second
    assert whole.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()
    assert whole.untyped_storage().data_ptr() != part.clone().untyped_storage().data_ptr()


def test_saving_a_view_saves_its_whole_storage() -> None:
    """torch.save of a view writes all of the storage behind it, torch.save of its clone only what is seen.

    A rank that saves its slice of something large without clone() writes everyone's.
    """

    def size(tensor: Tensor) -> int:
        file = io.BytesIO()
        torch.save(tensor, file)
        return file.tell()

    whole = torch.zeros(100_000)
    assert size(whole[:10]) > whole.nbytes
    assert size(whole[:10].clone()) < whole.nbytes / 50


def test_state_dict_is_the_live_weights() -> None:
    """state_dict() shares storage with the model, and load_state_dict() copies into the model.

    A best checkpoint kept in memory has to be cloned: otherwise it goes on training.
    """
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


# Cutting a batch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "asked", "lengths"),
    [(8, 4, [2, 2, 2, 2]), (10, 4, [3, 3, 3, 1]), (9, 4, [3, 3, 3]), (6, 4, [2, 2, 2]), (3, 4, [1, 1, 1])],
)
def test_chunk_may_give_fewer_chunks_than_asked(size: int, asked: int, lengths: list[int]) -> None:
    """chunk(4) of 9 gives 3 chunks: it cuts pieces of ceil(9 / 4) until nothing is left.

    The number of micro-batches must be read, not assumed: ranks that disagree on the number of collectives hang.
    """
    chunks = torch.arange(size).chunk(asked)
    assert [len(chunk) for chunk in chunks] == lengths
    assert torch.equal(torch.cat(chunks), torch.arange(size))


@pytest.mark.parametrize(("size", "lengths"), [(10, [3, 3, 2, 2]), (9, [3, 2, 2, 2]), (3, [1, 1, 1, 0])])
def test_tensor_split_gives_the_number_that_was_asked(size: int, lengths: list[int]) -> None:
    """tensor_split(4) always gives 4 pieces whose lengths differ by at most 1, empty ones if need be.

    It keeps ranks at the same number of micro-batches, at the price of empty ones for batches that are too small.
    """
    assert [len(part) for part in torch.arange(size).tensor_split(4)] == lengths


def test_unbind_of_chunk_raises() -> None:
    """Notes wrong: torch.unbind(inputs.chunk(n, dim=0), dim=0) raises TypeError, for chunk gives a tuple.

    chunk alone gives the micro-batches; so does unbind of inputs.unflatten(0, (n, -1)), which refuses ragged splits.
    """
    inputs, n = numbers(16, 10), 4
    with pytest.raises(TypeError, match="must be Tensor, not tuple"):
        torch.unbind(inputs.chunk(n, dim=0), dim=0)  # type: ignore[arg-type]
    by_chunk, by_unbind = inputs.chunk(n, dim=0), inputs.unflatten(0, (n, -1)).unbind()
    assert len(by_chunk) == len(by_unbind) == n
    assert all(torch.equal(one, other) for one, other in zip(by_chunk, by_unbind, strict=True))
    assert all(shares(part, inputs) for part in by_unbind)
    with pytest.raises(RuntimeError, match="don't multiply up"):
        inputs.unflatten(0, (3, -1))


def test_stack_makes_a_dimension_and_cat_does_not() -> None:
    """stack of 3 tensors [C, H, W] is [3, C, H, W], cat is [3·C, H, W]; stack is cat of the unsqueezed.

    Samples are stacked into a batch, batches of ranks are concatenated.
    """
    parts = images(3).unbind()
    assert torch.stack(parts).shape == (3, 3, 4, 4)
    assert torch.cat(parts).shape == (9, 4, 4)
    assert torch.equal(torch.stack(parts), torch.cat([part.unsqueeze(0) for part in parts]))


@pytest.mark.parametrize(("size", "shape"), [(2, (2, 5)), (1, (5,))])
def test_squeeze_without_dim_takes_a_batch_of_one_too(size: int, shape: tuple[int, ...]) -> None:
    """squeeze() removes every dimension of size 1, the batch's own too; squeeze(dim) only the one that is named.

    A last micro-batch of one sample would lose its batch dimension; flatten(1) of the pooled features keeps it.
    """
    pooled = numbers(size, 5, 1, 1)
    assert pooled.squeeze().shape == shape
    assert pooled.squeeze(-1).squeeze(-1).shape == pooled.flatten(1).shape == (size, 5)


# Repeating --------------------------------------------------------------------------------------------------------


def test_expand_copies_nothing() -> None:
    """expand repeats with stride 0 in the same storage, repeat fills new memory with the same values.

    Grey digits become 3 channels for free.
    """
    grey = numbers(5, 8, 8)
    expanded, repeated = grey[:, None].expand(-1, 3, -1, -1), grey[:, None].repeat(1, 3, 1, 1)
    assert torch.equal(expanded, repeated)
    assert shares(expanded, grey)
    assert expanded.stride(1) == 0
    assert repeated.untyped_storage().nbytes() == 3 * grey.untyped_storage().nbytes()


def test_expanded_tensors_refuse_writes_in_place() -> None:
    """An in-place write to an expanded tensor raises: several elements are one number in memory.

    Grey images that became 3 channels are normalised into a new tensor, never in place.
    """
    expanded = numbers(5, 1, 8, 8).expand(-1, 3, -1, -1)
    with pytest.raises(RuntimeError, match="more than one element"):
        expanded.sub_(1)
    assert not shares(expanded - 1, expanded)


def test_expand_needs_size_one_inside_and_adds_dimensions_outside() -> None:
    """expand adds dimensions in front by itself, and stretches others only where their size is 1.

    Hence [:, None] before expand: [N, H, W] cannot turn into [N, 3, H, W] in one step.
    """
    vector = numbers(4)
    assert vector.expand(10, 4).shape == (10, 4)  # the notes' table, "keeps the number of dimensions", forgets this
    assert vector.unsqueeze(1).expand(4, 10).shape == (4, 10)
    with pytest.raises(RuntimeError, match="must match the existing size"):
        vector.expand(4, 10)


def test_repeat_interleave_is_flat_only_without_dim() -> None:
    """Notes wrong: "repeat_interleave always returns 1-D" holds only without dim; with it the shape is kept.

    Repeating the samples of a batch for several augmentations is repeat_interleave(k, dim=0), and no reshape.
    """
    table = torch.tensor([[1, 2], [3, 4]])
    assert table.repeat_interleave(2).tolist() == [1, 1, 2, 2, 3, 3, 4, 4]
    assert table.repeat_interleave(2, dim=0).tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]]
    assert table.repeat(2, 1).tolist() == [[1, 2], [3, 4], [1, 2], [3, 4]]


# Shapes and contiguity --------------------------------------------------------------------------------------------


def test_writing_through_a_reshape_of_a_transposed_tensor_is_lost() -> None:
    """reshape of a transposed tensor copies: writing through it is lost, and view refuses instead.

    A flat buffer for gradients is made with view: then a layout that would need a copy raises, and is not lost.
    """
    matrix = torch.zeros(3, 2)
    flat = matrix.t().reshape(6)
    flat.fill_(1)
    assert matrix.sum() == 0
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        matrix.t().view(6)


@pytest.mark.parametrize(
    ("tensor", "shape", "is_view"),
    [
        (numbers(4, 6), (2, 12), True),
        (numbers(4, 6)[:, :4], (4, 2, 2), True),
        (numbers(4, 6).t(), (6, 2, 2), True),
        (numbers(4, 6)[::2], (2, 3, 2), True),
        (numbers(4, 6)[:, :4], (16,), False),
        (numbers(4, 6).t(), (24,), False),
    ],
    ids=["contiguous", "cut columns", "transposed", "every other row", "cut columns, flat", "transposed, flat"],
)
def test_reshape_shares_wherever_strides_allow(tensor: Tensor, shape: tuple[int, ...], is_view: bool) -> None:
    """Notes wrong: reshape shares memory, and view works, not only for contiguous input but wherever strides allow.

    "reshape copies" (003) and "view needs contiguous" (004) both mislead: whether a reshaped batch may be written to
    in place depends on its strides, so nothing here writes through a reshape.
    """
    assert shares(tensor.reshape(shape), tensor) == is_view
    if is_view:
        assert shares(tensor.view(shape), tensor)
    else:
        with pytest.raises(RuntimeError, match="view size is not compatible"):
            tensor.view(shape)


@pytest.mark.parametrize(
    ("operation", "tensor"),
    [
        (lambda x: x.flatten(1), images()),
        (nn.Flatten(), images()),
        (lambda x: F.unfold(x, 2), images()),
        (lambda x: x.unfold(2, 2, 1), images()),
        (lambda x: F.fold(x, (4, 4), 2), numbers(2, 9, 12).transpose(1, 2)),
    ],
    ids=["flatten", "nn.Flatten", "F.unfold", "Tensor.unfold", "F.fold"],
)
def test_these_take_input_that_is_not_contiguous(operation: Callable[[Tensor], Tensor], tensor: Tensor) -> None:
    """Notes wrong: flatten, fold and unfold do not need contiguous input; the answer is the contiguous one's.

    Micro-batches in channels_last go through the same model: no .contiguous(), which would be a copy, is needed.
    """
    assert not tensor.is_contiguous()
    assert torch.equal(operation(tensor), operation(tensor.contiguous()))


def test_as_strided_reads_the_storage() -> None:
    """Notes wrong: as_strided takes input that is not contiguous; it reads the storage behind it, whatever the view.

    So .contiguous() before it, as the notes advise, changes the answer: sharding by as_strided would move numbers.
    """
    transposed = torch.arange(6).reshape(2, 3).t()
    assert transposed.as_strided((6,), (1,)).tolist() == [0, 1, 2, 3, 4, 5]
    assert transposed.contiguous().as_strided((6,), (1,)).tolist() == [0, 3, 1, 4, 2, 5]


def test_permute_may_stay_contiguous() -> None:
    """Notes wrong: permute and transpose do not always give a tensor that is not contiguous; ask is_contiguous().

    With one channel, [N, 1, H, W] as [N, H, W, 1] is the same memory: a copy made "to be sure" would be none.
    """
    grey, colour = numbers(2, 1, 4, 4), numbers(2, 3, 4, 4)
    assert grey.permute(0, 2, 3, 1).is_contiguous()
    assert not colour.permute(0, 2, 3, 1).is_contiguous()


# Choosing elements ------------------------------------------------------------------------------------------------


def test_gather_picks_one_number_a_row() -> None:
    """gather(1, index) takes from row i what index[i] names.

    The cross entropy of a batch is the log-probabilities at its labels: minus their mean, or their sum for evaluation.
    """
    logits, labels = numbers(6, 4), torch.tensor([0, 3, 1, 1, 2, 0])
    picked = logits.log_softmax(1).gather(1, labels[:, None]).squeeze(1)
    assert torch.allclose(-picked.mean(), F.cross_entropy(logits, labels), **exact)
    assert torch.allclose(-picked.sum(), F.cross_entropy(logits, labels, reduction="sum"), **exact)


def test_gather_does_not_look_up_rows() -> None:
    """Notes wrong: gather(embeddings, 0, words) does not give [.., .., width] but the index's shape; indexing does.

    Rows (samples, embeddings) are looked up by table[index] or index_select, as the in-memory data sets do.
    """
    table, words = torch.arange(12.0).reshape(4, 3), torch.tensor([[1, 3, 2], [0, 2, 1]])
    gathered = torch.gather(table, 0, words)
    assert gathered.shape == words.shape
    assert gathered.tolist() == [[table[words[i, j], j].item() for j in range(3)] for i in range(2)]
    assert torch.equal(table[words], F.embedding(words, table))
    assert table[words].shape == (2, 3, 3)


def test_scatter_makes_one_hot() -> None:
    """scatter_(1, labels[:, None], 1) writes a one into row i at column labels[i]: one-hot.

    Label smoothing and mixing of labels start from it.
    """
    labels = torch.tensor([0, 2, 4])
    assert torch.equal(torch.zeros(3, 5).scatter_(1, labels[:, None], 1).long(), F.one_hot(labels, 5))


def test_one_hot_without_num_classes_depends_on_the_batch() -> None:
    """one_hot(labels) is as wide as the largest label that happens to be in the batch.

    Two ranks (or micro-batches) get different widths from one data set, so num_classes is always given.
    """
    first_rank, second_rank = torch.tensor([0, 1]), torch.tensor([3, 0])
    assert F.one_hot(first_rank).shape != F.one_hot(second_rank).shape
    assert F.one_hot(first_rank, 4).shape == F.one_hot(second_rank, 4).shape


def test_masked_select_is_flat_and_its_size_depends_on_values() -> None:
    """masked_select always gives one dimension, as long as the mask has ones.

    Ranks get different lengths, which collectives do not take: reduce (x · mask).sum() and mask.sum() instead.
    """
    ranks = torch.tensor([[1.0, 2.0, 0.0, 0.0], [3.0, 4.0, 5.0, 0.0]])
    assert ranks.masked_select(ranks > 0).tolist() == [1, 2, 3, 4, 5]
    assert [len(row.masked_select(row > 0)) for row in ranks] == [2, 3]
    mask = ranks > 0
    together = sum(row.mul(seen).sum() for row, seen in zip(ranks, mask, strict=True)) / mask.sum()
    assert together == ranks[mask].mean()


def test_index_select_s_dim_is_the_one_that_is_chosen_from() -> None:
    """index_select(dim, index) chooses along dim and keeps it; select(dim, number) drops it.

    A batch of chosen samples is index_select along 0, and stays a batch when one sample is chosen.
    """
    table = torch.tensor([[1, 2], [3, 4]])
    assert table.index_select(1, torch.tensor([0])).tolist() == [[1], [3]]
    assert table.select(1, 0).tolist() == table[:, 0].tolist() == [1, 3]


# Products ---------------------------------------------------------------------------------------------------------


def test_matmul_broadcasts() -> None:
    """matmul takes leading dimensions for a batch, and vectors: [10, 3, 4] @ [4] is [10, 3], @ [4, 2] is [10, 3, 2].

    One weight serves every sample of a batch, and its gradient is the sum over them, whichever rank holds them.
    """
    batch, vector, matrix = numbers(10, 3, 4), numbers(4, seed=1), numbers(4, 2, seed=2)
    one_by_one = torch.stack([sample.mm(vector.unsqueeze(1)).squeeze(1) for sample in batch])
    assert torch.allclose(batch.matmul(vector), one_by_one, **exact)
    assert torch.allclose(batch @ matrix, torch.stack([sample.mm(matrix) for sample in batch]), **exact)


@pytest.mark.parametrize(
    "shapes", [((5, 2, 3), (3, 1)), ((2, 3), (3,)), ((3,), (3,)), ((2, 3), (1, 3)), ((2, 3), (2, 3))]
)
def test_mm_does_not_broadcast(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """mm takes two matrices whose inner sizes agree and nothing else: no batch, no vector, no stretching of a 1.

    A hand-written layer with mm fails at once for a batch of another shape, where matmul might compute something else.
    """
    one, other = (numbers(*shape) for shape in shapes)
    with pytest.raises(RuntimeError, match=r"must be a matrix|cannot be multiplied"):
        one.mm(other)


def test_dot_takes_two_vectors_only() -> None:
    """dot is for two vectors of one length; two matrices raise, unlike numpy's dot.

    Norms and cosines of gradients are dot of flattened tensors.
    """
    vector, matrix = numbers(4), numbers(2, 2)
    assert torch.allclose(vector.dot(vector), vector.square().sum(), **exact)
    assert torch.allclose(matrix.mm(matrix), matrix @ matrix, **exact)
    with pytest.raises(RuntimeError, match="1D tensors expected"):
        matrix.dot(matrix)


# Autograd ---------------------------------------------------------------------------------------------------------


def test_in_place_breaks_backward_where_the_value_is_needed() -> None:
    """An in-place write to a value that backward needs raises in backward: exp saves its output.

    It raises, and never computes a wrong gradient silently: tensors count their versions.
    """
    inputs = numbers(4).requires_grad_()
    outputs = inputs.exp()
    outputs.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs.sum().backward()


def test_in_place_is_right_where_the_value_is_not_needed() -> None:
    """Notes wrong: "an in-place operation breaks autograd" does not hold for values that backward does not need.

    ResNet's ReLU(inplace=True) and `out += identity` save memory in every recipe, with the same gradients.
    """

    def gradient(in_place: bool) -> Tensor:
        weight, inputs = numbers(5, 5).requires_grad_(), numbers(3, 5, seed=1)
        outputs = inputs @ weight
        if in_place:
            outputs += inputs
            outputs.relu_()
        else:
            outputs = (outputs + inputs).relu()
        (got,) = torch.autograd.grad(outputs.square().sum(), weight)
        return got

    assert gradient(False).abs().max() > 1e-3
    assert torch.equal(gradient(True), gradient(False))


@pytest.mark.parametrize("cut", [lambda x: x.chunk(2), lambda x: x.unbind()], ids=["chunk", "unbind"])
def test_micro_batches_of_a_graph_refuse_in_place(cut: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    """In-place writes to an output of chunk or unbind raise where the input needs a gradient; on plain data they write.

    Activations cut between pipeline stages are never changed in place; batches can be, and then the whole batch is.
    """
    data = numbers(4, 2)
    with pytest.raises(RuntimeError, match="multiple views"):
        cut(data.clone().requires_grad_() * 1)[0].zero_()
    part = cut(data)[0]
    part.zero_()
    assert (data == 0).sum() == part.numel()


def test_weights_change_in_place_only_under_no_grad() -> None:
    """A parameter refuses in-place changes that autograd would see, and takes them under no_grad.

    Optimizers, broadcasts of initial weights and load_state_dict work under no_grad, on the same Parameter objects.
    """
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        weight.add_(1)
    with torch.no_grad():
        weight.add_(1)
    assert weight.tolist() == [2, 2]


def test_backward_accumulates() -> None:
    """backward adds to .grad until zero_grad, which sets it to None.

    Accumulation is leaving out zero_grad; the notes' DataParallel loop leaves it out by mistake, and adds up all steps.
    """
    model = nn.Linear(2, 1, bias=False)
    for times in (1, 2, 3):
        model(torch.ones(1, 2)).sum().backward()
        assert model.weight.grad is not None
        assert model.weight.grad.tolist() == [[times, times]]
    model.zero_grad()
    assert model.weight.grad is None


def test_backward_of_a_vector_needs_its_gradient() -> None:
    """backward() starts from 1 for a scalar only; a vector needs gradient=, and gets the product with the Jacobian.

    The numbers are the notes': Q = 3a³ − b².
    """
    a, b = torch.tensor([2.0, 3.0], requires_grad=True), torch.tensor([6.0, 4.0], requires_grad=True)
    with pytest.raises(RuntimeError, match="only for scalar outputs"):
        (3 * a**3 - b**2).backward()
    (3 * a**3 - b**2).backward(gradient=torch.ones(2))
    assert a.grad is not None
    assert b.grad is not None
    assert a.grad.tolist() == [36, 81]
    assert b.grad.tolist() == [-12, -8]


def test_backward_can_be_cut_in_two() -> None:
    """backward(gradient=g), g being the later part's gradient to its input, gives the earlier part its gradients.

    This is what a pipeline stage does with what the next stage sends; starting from ones would train on another loss.
    """
    first, second, inputs = nn.Linear(4, 5).double(), nn.Linear(5, 2).double(), numbers(3, 4)
    whole = torch.autograd.grad(second(first(inputs).tanh()).square().sum(), list(first.parameters()))
    sent = first(inputs).tanh()
    received = sent.detach().requires_grad_()
    second(received).square().sum().backward()
    sent.backward(gradient=received.grad)
    for parameter, wanted in zip(first.parameters(), whole, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, wanted)


def test_set_grad_enabled_does_not_make_things_need_gradients() -> None:
    """Notes wrong: under set_grad_enabled(True) y = 2x requires a gradient only if x does; set to False, never.

    An evaluation whose loss does not require one, which the notes assert, may just have a model that is all frozen.
    """
    plain, leaf = torch.ones(2), torch.ones(2, requires_grad=True)
    with torch.set_grad_enabled(True):
        assert not (plain * 2).requires_grad
        assert (leaf * 2).requires_grad
    with torch.set_grad_enabled(False):
        assert not (leaf * 2).requires_grad


# What stays in memory ---------------------------------------------------------------------------------------------


class Kept:
    """What autograd saved for backward, so that a weak reference tells how long it lives."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Saved:
    """Counts the tensors that autograd holds for backward."""

    def __init__(self) -> None:
        self.references: list[weakref.ref[Kept]] = []

    def pack(self, tensor: Tensor) -> Kept:
        kept = Kept(tensor.detach())  # an output that is saved as it is would hold its own graph
        self.references.append(weakref.ref(kept))
        return kept

    def alive(self) -> int:
        return sum(reference() is not None for reference in self.references)


def nodes(tensor: Tensor) -> int:
    """How many nodes the graph behind a tensor has."""
    seen: set[Any] = set()
    waiting = [tensor.grad_fn] if tensor.grad_fn else []
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions if before]
    return len(seen)


@pytest.mark.parametrize(
    ("keep", "grows"), [(lambda x: x, True), (lambda x: x.detach(), False)], ids=["tensor", "detach"]
)
def test_a_sum_of_losses_holds_every_graph(keep: Callable[[Tensor], Tensor], grows: bool) -> None:
    """total += loss holds the graph of every step; total += loss.detach() (or .item(), which waits for the GPU) none.

    The running loss of a run is detached: otherwise memory grows by a graph a step, on every rank.
    """
    model, total, sizes = nn.Linear(2, 1), torch.zeros(()), []
    for _ in range(4):
        loss = model(torch.ones(1, 2)).sum()
        loss.backward()
        total = total + keep(loss)
        sizes.append(nodes(total))
    assert (sizes == sorted(set(sizes))) == grows
    assert grows or sizes == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("run_backward", "no_grad", "held"), [(False, False, True), (True, False, False), (False, True, False)]
)
def test_backward_frees_what_the_graph_saved(run_backward: bool, no_grad: bool, held: bool) -> None:
    """A kept loss holds the activations only until its backward; after it the empty graph stays. no_grad saves none.

    The notes' advice bites hardest in evaluation, which has no backward: losses kept there hold all activations.
    """
    saved = Saved()
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    losses = []
    with torch.set_grad_enabled(not no_grad), torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda x: x.tensor):
        for _ in range(3):
            loss = model(torch.ones(4, 2)).sum()
            losses.append(loss)
            if run_backward:
                loss.backward()
    assert (saved.alive() > 0) == held
    losses.clear()
    del loss
    assert saved.alive() == 0


# Modules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("training", "grads", "frozen", "changes"),
    [(True, True, False, True), (True, False, False, True), (True, True, True, True), (False, True, False, False)],
    ids=["train", "train, no_grad", "train, frozen", "eval"],
)
def test_only_eval_stops_batch_norm_s_statistics(training: bool, grads: bool, frozen: bool, changes: bool) -> None:
    """BatchNorm's running statistics move in train mode, also under no_grad and with frozen weights; eval() stops them.

    A rank that evaluates in train mode, or a "frozen" backbone, drifts from the others without a gradient involved.
    """
    norm = nn.BatchNorm1d(3).double().train(training).requires_grad_(not frozen)
    with torch.set_grad_enabled(grads):
        norm(numbers(8, 3) + 5)
    assert (norm.running_mean.abs().sum() > 0) == changes  # type: ignore[union-attr]
    assert norm.num_batches_tracked == int(changes)


def test_eval_stays_until_train_is_called() -> None:
    """model.eval() lasts: an evaluation inside the epoch loop leaves dropout off until train() is called again.

    train() belongs inside the epoch loop; without it only the first epoch trains as the config says.
    """
    model = nn.Sequential(nn.Dropout(0.5))
    ones = torch.ones(1000)
    assert (model(ones) == 0).any()
    model.eval()
    assert torch.equal(model(ones), ones)
    assert not model[0].training
    model.train()
    assert (model(ones) == 0).any()


def test_state_dict_has_parameters_and_persistent_buffers() -> None:
    """state_dict() has parameters and persistent buffers; plain tensors and non-persistent buffers are not in it.

    What is not in it is not in a checkpoint. Notes wrong: a plain tensor does get a gradient if it requires one; it is
    the optimizer and the ranks' all-reduce, which go by parameters(), that never see it.
    """

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("kept", torch.ones(2))
            self.register_buffer("lost", torch.ones(2), persistent=False)
            self.plain = torch.ones(2, requires_grad=True)

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs * self.weight * self.plain

    model = Model()
    assert list(model.state_dict()) == ["weight", "kept"]
    assert [name for name, _ in model.named_parameters()] == ["weight"]
    model(torch.full((2,), 3.0)).sum().backward()
    assert model.plain.grad is not None
    assert model.plain.grad.tolist() == [3, 3]


def test_module_to_keeps_its_parameters_and_tensor_to_may_return_itself() -> None:
    """Module.to changes the module and keeps its Parameter objects. Notes wrong: Tensor.to is new only if need be.

    An optimizer made before model.to(dtype) still holds the right objects; x.to(x.device) is no copy to write into.
    """
    model, tensor = nn.Linear(2, 2), torch.zeros(2)
    before = list(model.parameters())
    assert model.to(torch.float64) is model
    assert all(old is new for old, new in zip(before, model.parameters(), strict=True))
    assert model.weight.dtype == torch.float64
    assert tensor.to("cpu") is tensor
    assert tensor.to(torch.float64) is not tensor
    assert not shares(tensor.to("cpu", copy=True), tensor)


def test_xavier_uniform_without_underscore_is_deprecated() -> None:
    """Notes wrong: nn.init.xavier_uniform is deprecated for xavier_uniform_, which does the same.

    Initialisers change weights in place, hence the underscore; all ranks' weights must come from one seed.
    """
    torch.manual_seed(0)
    with pytest.warns(FutureWarning, match="deprecated"):
        old = nn.init.xavier_uniform(torch.zeros(4, 4))
    torch.manual_seed(0)
    assert torch.equal(old, nn.init.xavier_uniform_(torch.zeros(4, 4)))


def test_a_saved_module_does_not_load_by_default(tmp_path: Path) -> None:
    """Notes wrong: torch.load of a whole saved model raises, for it loads weights only unless told to trust the file.

    Checkpoints here are state dicts: nothing in a file that another rank or person wrote gets run.
    """
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "state.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(tmp_path / "module.pt")
    assert list(torch.load(tmp_path / "state.pt")) == ["weight", "bias"]


# Accumulating gradients -------------------------------------------------------------------------------------------


def tiny(norm: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), norm or nn.Identity(), nn.Tanh(), nn.Linear(4, 2)).double()


def accumulated(model: nn.Module, size: int, n: int, weight: Callable[[int, int], float]) -> Tensor:
    """The gradient over `chunk(n)` of a batch, each loss times weight(length of its chunk, number of chunks)."""
    inputs, labels = numbers(size, 3, seed=1), torch.arange(size) % 2
    model.zero_grad()
    chunks = inputs.chunk(n)
    for some, theirs in zip(chunks, labels.chunk(n), strict=True):
        (F.cross_entropy(model(some), theirs) * weight(len(some), len(chunks))).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def whole(model: nn.Module, size: int) -> Tensor:
    return accumulated(model, size, 1, lambda length, number: 1)


def error(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("n", [2, 4, 8])
def test_undivided_losses_make_the_gradient_n_times_too_big(n: int) -> None:
    """Notes wrong: backward of each chunk's mean loss, undivided, gives n times the gradient of the batch.

    With SGD that is n times the learning rate; Adam hides it, and gradient clipping then clips n times too early.
    """
    got = accumulated(tiny(), 8, n, lambda length, number: 1)
    assert torch.allclose(got, n * whole(tiny(), 8), **exact)


@pytest.mark.parametrize(
    ("size", "n", "right"), [(8, 4, True), (12, 3, True), (9, 4, True), (10, 4, False), (7, 2, False)]
)
def test_loss_over_n_is_exact_only_for_even_chunks(size: int, n: int, right: bool) -> None:
    """loss / n gives the batch's gradient if all chunks are as long (n being how many there are), else it does not.

    The same holds for ranks: averaging gradients over ranks is right only for equal shares.
    """
    off = error(accumulated(tiny(), size, n, lambda length, number: 1 / number), whole(tiny(), size))
    assert off < 1e-12 if right else off > 0.01


@pytest.mark.parametrize(("size", "n"), [(8, 4), (9, 4), (10, 4), (7, 2), (3, 8)])
def test_weights_by_samples_are_exact_for_ragged_chunks(size: int, n: int) -> None:
    """loss · len(chunk) / len(batch) gives the batch's gradient for any chunks.

    It is what our accumulation does, with the global batch's length, so that ranks and micro-batches may be ragged.
    """
    got = accumulated(tiny(), size, n, lambda length, number: length / size)
    assert torch.allclose(got, whole(tiny(), size), **exact)


def test_how_wrong_loss_over_n_is_for_10_samples_in_4_chunks() -> None:
    """Of 10 in chunks of 3, 3, 3, 1, loss / n weighs the last sample 1/4 and the others 1/12, where all are worth 1/10.

    One sample counts 2.5 times and the others 0.83 times: that is no rounding error.
    """
    losses = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    chunks = losses.chunk(4)
    sum(chunk.mean() / len(chunks) for chunk in chunks).backward()  # type: ignore[union-attr]
    wanted = torch.tensor([1 / 12] * 9 + [1 / 4], dtype=torch.float64)
    assert losses.grad is not None
    assert torch.allclose(losses.grad, wanted, **exact)
    off = error(accumulated(tiny(), 10, 4, lambda length, number: 1 / number), whole(tiny(), 10))
    assert 0.05 < off < 1


def test_batch_norm_is_not_the_same_in_micro_batches() -> None:
    """With BatchNorm no weighting gives the batch's gradient, for each chunk has its own statistics; GroupNorm does.

    It is a difference that accumulation, data and pipeline parallel all have, and that only synchronising removes.
    """

    def off(norm: Callable[[], nn.Module]) -> float:
        return error(accumulated(tiny(norm()), 8, 2, lambda length, number: length / 8), whole(tiny(norm()), 8))

    assert off(lambda: nn.BatchNorm1d(4)) > 0.05
    assert off(lambda: nn.GroupNorm(2, 4)) < 1e-12


def test_batch_norm_refuses_one_sample_of_one_pixel() -> None:
    """BatchNorm raises in train mode for one value a channel: one sample at 1×1. More pixels, or eval mode, pass.

    A ragged last micro-batch (10 in 4) of small images ends there: deep in a ResNet, 8×8 digits may be 1×1.
    """
    norm = nn.BatchNorm2d(3)
    last = torch.randn(10, 3, 1, 1).chunk(4)[-1]
    assert len(last) == 1
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        norm(last)
    assert norm(torch.randn(1, 3, 2, 2)).shape == (1, 3, 2, 2)
    assert norm.eval()(last).shape == last.shape
    assert nn.GroupNorm(1, 3)(last).shape == last.shape
