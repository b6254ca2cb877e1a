"""What DistributedDataParallel averages gradients by, sent in fewer bytes: rounded to 16 bits, or as two thin matrices.

What a step leaves out is not lost (error feedback): each rank adds what it has not sent to its next gradient. After any
step, the updates so far and the mean of all ranks' memories add up to the gradients so far.
Source: https://arxiv.org/abs/1905.13727 (PowerSGD), https://arxiv.org/abs/1901.09847 (error feedback),
https://arxiv.org/abs/1905.10936 (feedback on both ways), https://docs.pytorch.org/docs/stable/ddp_comm_hooks.html
"""

# DDP reads the annotations of a hook, and refuses strings: no `from __future__ import annotations` here.
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

Gradients = dict[str, Tensor]  # of one bucket: views of its buffer, by the parameters' names


class GradientCompression:
    """A communication hook for DistributedDataParallel, and the memories of what it has not sent.

    DDP calls `hook` when a bucket of gradients is complete, in the same order on all ranks, while backward goes on. A
    bucket takes several collectives, each of which needs what the one before has brought. So each bucket that is under
    way makes one move whenever a further one is complete, and after the last one all make what is left: ranks issue
    their collectives in one order, which a chain of callbacks would not grant.

    Args:
        model: what is trained, not wrapped; the same on all ranks.
        rank, ranks: this rank's number, and how many there are; of one alone nothing is sent.
        start_step: the first steps, in which gradients are sent whole.

    Attributes:
        steps: that were made.
        by_place: what tells a resumed run that its last bits depend on where in its bucket a gradient lies.
    """

    by_place = True

    def __init__(self, model: nn.Module, rank: int, ranks: int, start_step: int = 0) -> None:
        trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in trained.items()}
        self._rank, self._ranks, self._start, self.steps = rank, ranks, start_step, 0
        self.errors = {name: torch.zeros_like(trained[name]).detach() for name in self.compressed(trained)}
        self._under_way: list[tuple[Iterator[Any], Any, Tensor, torch.futures.Future[Tensor]]] = []

    def compressed(self, parameters: Mapping[str, Tensor]) -> list[str]:
        """Those whose gradients are compressed, and what is left out of them remembered."""
        return list(parameters)

    def exchange(self, buffer: Tensor, gradients: Gradients) -> Iterator[Any]:
        """Replace a bucket's gradients by their mean over all ranks; yields what is to be waited for."""
        raise NotImplementedError

    def sent_bytes(self) -> int:
        """Of a step after the first: so many bytes, all-reduced, are what its collectives send."""
        raise NotImplementedError

    def whole_bytes(self) -> int:
        """The bytes of all gradients, which plain DDP all-reduces."""
        return sum(parameter.nbytes for parameter in self._names)

    @torch.no_grad()
    def hook(self, _: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """What register_comm_hook takes."""
        buffer = bucket.buffer()
        gradients = {
            # Laid out as the parameter is, channels last for one, where bucket.gradients() are all contiguous.
            self._names[parameter]: gradient.as_strided(parameter.shape, parameter.stride(), gradient.storage_offset())
            for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True)
        }
        future: torch.futures.Future[Tensor]
        future = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else None)
        way = self.exchange(buffer, gradients) if self.steps >= self._start else self._whole(buffer)
        earlier, self._under_way = self._under_way, []
        self._move(way, None, buffer, future)
        self._move_all(earlier)
        while bucket.is_last() and self._under_way:
            earlier, self._under_way = self._under_way, []
            self._move_all(earlier)
        self.steps += bucket.is_last()
        return future

    def _move_all(self, waiting: list[Any]) -> None:
        for each in waiting:
            self._move(*each)

    def _move(self, way: Iterator[Any], work: Any, buffer: Tensor, future: torch.futures.Future[Tensor]) -> None:
        if work:
            work.wait()
        try:
            self._under_way.append((way, next(way), buffer, future))
        except StopIteration:
            future.set_result(buffer)

    def _whole(self, buffer: Tensor) -> Iterator[Any]:
        buffer /= self._ranks
        yield self._all_reduce(buffer)

    def _all_reduce(self, tensor: Tensor) -> Any:
        return dist.all_reduce(tensor, async_op=True) if self._ranks > 1 and tensor.numel() else None

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """This rank's memories under names of its own, and what is the same on all ranks."""
        return {f"error.{self._rank}.{name}": error for name, error in self.errors.items()} | {
            "steps": self.steps,
            "ranks": self._ranks,
        }

    def saved_by(self, ranks: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """What this rank reads of a state that so many ranks have saved, whose tensors have these shapes."""
        wanted = {
            f"error.{saved}.{name}": torch.empty_like(error)
            for saved in shares_of(self._rank, self._ranks, ranks)
            for name, error in self.errors.items()
        }
        return {name: tensor for name, tensor in wanted.items() if shapes.get(name) == tuple(tensor.shape)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the memories of as many ranks, or of others: their mean is what is still owed to the weights,
        and stays as it is. What was not remembered begins at zero."""
        self.steps = state.get("steps", 0)
        shares = shares_of(self._rank, self._ranks, state.get("ranks", self._ranks))
        for name, error in self.errors.items():
            error.zero_()
            for saved, share in shares.items():
                if (there := state.get(f"error.{saved}.{name}")) is not None:
                    error.add_(there, alpha=share)


def shares_of(rank: int, ranks: int, saved: int) -> dict[int, float]:
    """Whose memories a rank continues: {one of `saved` ranks: its share}, shares that add up to one.

    Both numbers of ranks cut the same line into equal parts, and a rank takes the mean over its own part. So the mean
    over all of them is what it was, and of as many ranks each takes its own. 2 ranks of 4 take the means of pairs; of 4
    in place of 2 each pair begins alike.
    """
    low, high = rank * saved, (rank + 1) * saved  # in units in which the saved ranks' parts are `ranks` long
    return {
        each: (min(high, (each + 1) * ranks) - max(low, each * ranks)) / saved
        for each in range(low // ranks, -(-high // ranks))
    }


class RoundedGradients(GradientCompression):
    """Gradients that are sent in 16 bits and added up in 32.

    An all-reduce in bf16 would round each sum on its way, and nobody would know what was lost. So it is taken apart.
    Every rank sends each other rank the part of the bucket that this one is to add up, rounded; it remembers what it
    rounded away. The owner adds up in the gradients' own dtype, rounds the mean and remembers that, too; then all
    gather the means. These are an all-reduce's own two halves, and as many bytes as one in 16 bits.

    Args:
        dtype: bfloat16 or float16.
    """

    def __init__(
        self, model: nn.Module, rank: int, ranks: int, start_step: int = 0, *, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        super().__init__(model, rank, ranks, start_step)
        self._dtype = dtype

    def sent_bytes(self) -> int:
        """Two per number; each bucket is filled up to a multiple of the ranks, which is not counted."""
        return sum(2 * parameter.numel() for parameter in self._names)

    def exchange(self, buffer: Tensor, gradients: Gradients) -> Iterator[Any]:
        ranks, size = self._ranks, buffer.numel()
        views, errors = list(gradients.values()), [self.errors[name] for name in gradients]
        torch._foreach_add_(views, errors)
        part = -(-size // ranks)
        sent = buffer.new_zeros(ranks * part, dtype=self._dtype)
        sent[:size] = buffer / ranks  # of numbers that are to be added, so that the sum is the mean
        buffer.sub_(sent[:size].to(buffer.dtype), alpha=ranks)  # what this rank has not sent
        received = torch.empty_like(sent)
        yield dist.all_to_all_single(received, sent, async_op=True)
        mean = received.view(ranks, part).to(buffer.dtype).sum(0)
        mine = mean.to(self._dtype)
        low = min(self._rank * part, size)
        high = min(low + part, size)
        # The memories' mean is what counts: this part's owner adds all that is missing in it to its own.
        buffer[low:high].add_((mean - mine.to(mean.dtype))[: high - low], alpha=ranks)
        yield dist.all_gather_into_tensor(received, mine, async_op=True)
        torch._foreach_copy_(errors, views)
        buffer.copy_(received[:size])


class PowerSGD(GradientCompression):
    """Gradients that are sent as the product of two thin matrices; what that saves less than half of is sent whole.

    A weight's gradient is a matrix M [m, n], a convolution's with n = inputs · height · width. From Q [n, r] one step of
    the power iteration leads to the subspace in which M is largest:

        P = mean of M Q over the ranks          the first all-reduce; made orthonormal, on each rank alike
        Q = mean of Mᵀ P                        the second; kept: the next step begins where this one came to
        P Qᵀ                                    in place of M's mean; each rank remembers M − P Mᵀ P of its own M

    All of it is linear in M, so N ranks make the very update that one process would make of the whole batch's gradient.
    torch's powerSGD_hook is the same algorithm; it issues collectives from callbacks, which gloo's threads do not run
    in one order, and keeps its state by bucket, which no other run could read.

    Args:
        r: rank of the product.

    Attributes:
        q: {parameter: Q [n, r]}.
    """

    def __init__(self, model: nn.Module, rank: int, ranks: int, start_step: int = 0, *, r: int = 4) -> None:
        self._r = r
        super().__init__(model, rank, ranks, start_step)
        # Drawn on the host, where all ranks draw the same.
        self.q = {
            name: torch.randn(error[0].numel(), r, dtype=error.dtype).to(error.device)
            for name, error in self.errors.items()
        }

    def compressed(self, parameters: Mapping[str, Tensor]) -> list[str]:
        return [name for name, each in parameters.items() if self._r <= largest_rank(each)]

    def sent_bytes(self) -> int:
        """r (m + n) numbers of a matrix; the rest whole."""
        return sum(each.element_size() * sent_numbers(each, self._r) for each in self._names)

    def exchange(self, buffer: Tensor, gradients: Gradients) -> Iterator[Any]:
        thin = {name: gradient for name, gradient in gradients.items() if name in self.q}
        rest = [gradient for name, gradient in gradients.items() if name not in self.q]
        matrices = [gradient.add_(self.errors[name]).flatten(1) for name, gradient in thin.items()]
        ps = [matrix @ self.q[name] for name, matrix in zip(thin, matrices, strict=True)]
        yield self._all_reduce(sent := self._joined([*rest, *ps], buffer))
        self._split(sent, [*rest, *ps])
        ps = [torch.linalg.qr(p).Q for p in ps]
        qs = [matrix.T @ p for matrix, p in zip(matrices, ps, strict=True)]
        for (name, gradient), matrix, p, q in zip(thin.items(), matrices, ps, qs, strict=True):
            self.errors[name].copy_((matrix - p @ q.T).view(gradient.shape))
        yield self._all_reduce(sent := self._joined(qs, buffer))
        self._split(sent, qs)
        for (name, gradient), p, q in zip(thin.items(), ps, qs, strict=True):
            self.q[name].copy_(q)
            gradient.copy_((p @ q.T).view(gradient.shape))

    def compress_alone(self, parameter: Tensor) -> None:
        """In one process, with ranks=1: do to a parameter's gradient what ranks do to the mean of theirs."""
        if parameter.grad is not None:
            for _ in self.exchange(parameter.grad, {self._names[parameter]: parameter.grad}):
                pass

    def _joined(self, tensors: list[Tensor], like: Tensor) -> Tensor:
        """In one vector, for one message, divided by the ranks: their sum is the mean."""
        return torch.cat([each.flatten() for each in tensors]) / self._ranks if tensors else like.new_empty(0)

    def _split(self, joined: Tensor, tensors: list[Tensor]) -> None:
        for part, tensor in zip(joined.split([each.numel() for each in tensors]), tensors, strict=True):
            tensor.copy_(part.view(tensor.shape))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {f"q.{name}": q for name, q in self.q.items()}

    def saved_by(self, ranks: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        qs = {f"q.{name}": torch.empty_like(q) for name, q in self.q.items()}
        fitting = {name: q for name, q in qs.items() if shapes.get(name) == tuple(q.shape)}
        return super().saved_by(ranks, shapes) | fitting

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        for name, q in self.q.items():
            if (there := state.get(f"q.{name}")) is not None:
                q.copy_(there)


def sent_numbers(weight: Tensor, r: int) -> int:
    """How many numbers PowerSGD sends of a weight's gradient."""
    return r * (len(weight) + weight[0].numel()) if r <= largest_rank(weight) else weight.numel()


def largest_rank(weight: Tensor) -> int:
    """The largest r of which two matrices are less than half of a weight's gradient; 0 where there is none."""
    if weight.dim() < 2 or not weight.numel():
        return 0
    rows, columns = len(weight), weight[0].numel()
    return (rows * columns - 1) // (2 * (rows + columns))
