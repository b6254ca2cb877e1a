"""A mixture of experts in the place of a block's SwiGLU: of E of them, each token goes through the k that a router picks.

**Router.** p = softmax(W · x), fp32 at least; the k largest of p are the token's experts e, and its output is
Σ g_e · expert_e(x). For k > 1 the weights g are those k of p divided by their sum (GShard, Mixtral); for k = 1 it is p
itself (Switch), because divided by itself it would be 1 and teach the router nothing.

**Balance.** A router that prefers an expert trains it more, and then prefers it more. So the loss has an addend that is
smallest, 1, when all experts are used alike (Switch, equation 4): E · Σ_e f_e · P_e, with f_e the share of the k · T
choices that e gets, which has no gradient, and P_e the mean of p_e.

**Over which tokens f and P are taken**: those of one sequence. Their product is no mean, so statistics over whatever a
process happens to have (a rank's share, a micro-batch) would make another objective of each cut of the batch. Over each
sequence (GShard's groups, DeepSeek-V3's sequence-wise loss) the addend is a mean over sequences, like the loss itself,
and any number of ranks and micro-batches trains the same. What cuts sequences (recipes.context_parallel) would not.

**Balance without a loss** (Wang 2024). Each expert has a bias b_e, a buffer, not a weight: the k largest of p + b are chosen, and
g still comes from p alone. After every step b_e grows by a rate if e got fewer than the mean of the whole batch's choices,
and shrinks by it if it got more. Nothing is added to the loss, so no gradient of it disturbs the others.

**Capacity.** Dropless by default: an expert takes all tokens that come. With `capacity=c` it takes ceil(c · k · T / E) of
each sequence in training, the first ones, so that no token depends on later ones; the others go past it (GShard, Switch).
In evaluation nothing is dropped.

Source: https://arxiv.org/abs/1701.06538 (Shazeer 2017), https://arxiv.org/abs/2006.16668 (GShard),
https://arxiv.org/abs/2101.03961 (Switch), https://arxiv.org/abs/2401.04088 (Mixtral),
https://arxiv.org/abs/2412.19437 (DeepSeek-V3, section 2.1.2), https://arxiv.org/abs/2408.15664 (Wang 2024)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lockstep.models.layers import projection


class Experts(nn.Module):
    """E SwiGLUs, their weights in one tensor of each kind, expert by expert along the first dim.

    It takes rows [n, width] sorted by expert, and how many each gets, int64 [E], n in all; and gives the outputs in the
    same order.
    """

    def __init__(self, experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(experts, hidden, width))
        self.up = nn.Parameter(torch.empty(experts, hidden, width))
        self.down = nn.Parameter(torch.empty(experts, width, hidden))

    def init_weights(self, addends: int) -> None:
        """Draw the weights; `addends`: how many such outputs are added to the residual stream."""
        for weight, inputs in ((self.gate, 1), (self.up, 1), (self.down, addends)):
            nn.init.normal_(weight, std=(weight.shape[2] * inputs) ** -0.5)

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        each = zip(rows.split(on_host(counts, len(rows))), self.gate, self.up, self.down, strict=True)
        return torch.cat([F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down) for x, gate, up, down in each])


class MixtureOfExperts(nn.Module):
    """[N, T, width] to ([N, T, width], [N]): and how unevenly each sequence uses the experts, from 1 up.

    Args:
        per_token: experts that each token goes through.
        capacity: None: dropless; else the tokens of a sequence that an expert takes, as a multiple of its equal share.

    Attributes:
        bias: [E], what is added to the shares to choose by; None: the balance is the loss's.
        chosen: int64 [E], how often each was chosen in training since the last `update_biases`.
    """

    bias: Tensor | None
    chosen: Tensor

    def __init__(self, width: int, hidden: int, experts: int, per_token: int, capacity: float | None = None) -> None:
        super().__init__()
        self.per_token, self.capacity = per_token, capacity
        self.router = projection(width, experts)
        self.experts = Experts(experts, width, hidden)
        self.register_buffer("bias", None)

    def balance_by_bias(self) -> None:
        """Begin to choose by biases, which are 0 at first, and to count the choices."""
        weight = self.router.weight
        self.register_buffer("bias", weight.new_zeros(len(weight)))
        # Of the state between two steps nothing: it is 0 then. A buffer, so that a second forward counts nothing.
        self.register_buffer("chosen", weight.new_zeros(len(weight), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shares = self.route(x)
        count = shares.shape[-1]
        weights, chosen = shares.topk(self.per_token)  # [N, T, k] both
        if self.bias is not None:
            chosen = (shares + self.bias).topk(self.per_token).indices
            weights = shares.gather(-1, chosen)
            if self.training:
                self.chosen += chosen_by(chosen.flatten(), count).sum(0)
        uneven = unevenness(shares, chosen)
        if self.per_token > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        if self.training and self.capacity is not None:
            room = math.ceil(self.capacity * self.per_token * x.shape[1] / count)
            chosen = within_capacity(chosen, count, room)  # the others have chosen nobody, whose number is E
        choices = chosen.flatten()
        order = choices.argsort(stable=True)
        counts = chosen_by(choices, count).sum(0)
        rows = x.unsqueeze(2).expand(-1, -1, self.per_token, -1).flatten(0, 2)  # k copies of each token
        taken = len(order) if self.capacity is None or not self.training else sum(on_host(counts, len(order)))
        outputs = self.experts(rows[order[:taken]], counts)
        outputs = F.pad(outputs, (0, 0, 0, len(order) - taken))
        # Sorting the order gives the way back; no row is added up twice, so this is the same each time, on GPUs too.
        outputs = outputs[order.argsort()].unflatten(0, weights.shape)
        return (outputs * weights.unsqueeze(-1).to(outputs.dtype)).sum(2).to(x.dtype), uneven

    def route(self, x: Tensor) -> Tensor:
        """Each expert's share of each token, [N, T, E], fp32 or fp64: in 16 bits near ones would not be told apart."""
        with torch.autocast(x.device.type, enabled=False):
            wide = x if x.dtype == torch.float64 else x.float()
            return F.linear(wide, self.router.weight.to(wide.dtype)).softmax(-1)


def chosen_by(choices: Tensor, experts: int) -> Tensor:
    """[…] numbers of experts to bool […, E]; of a number that is none of theirs, nowhere true."""
    return choices.unsqueeze(-1) == torch.arange(experts, device=choices.device)


def unevenness(shares: Tensor, chosen: Tensor) -> Tensor:
    """E · Σ_e f_e · P_e of each sequence, [N], from the router's shares [N, T, E] and choices [N, T, k]."""
    used = chosen_by(chosen, shares.shape[-1]).sum((1, 2)).to(shares.dtype) / (chosen.shape[1] * chosen.shape[2])
    return shares.shape[-1] * (used * shares.mean(1)).sum(-1)


def within_capacity(chosen: Tensor, experts: int, room: int) -> Tensor:
    """The same choices [N, T, k], those of a sequence that find an expert full replaced by E."""
    each = chosen_by(chosen.flatten(1), experts)  # [N, T · k, E]
    place = (each.cumsum(1) * each).sum(-1)  # the how manieth of its expert, from 1
    return torch.where(place.unflatten(1, chosen.shape[1:]) <= room, chosen, experts)


def on_host(counts: Tensor, rows: int) -> Any:
    """Numbers that lie on a device, for which this process waits, as lists; each line of them adds up to `rows`.

    What has none, on the meta device, is dealt out evenly.
    """
    if counts.is_meta or hasattr(counts, "fake_mode"):
        share, more = divmod(rows, counts.shape[-1])
        line = [share + (place < more) for place in range(counts.shape[-1])]
        return line if counts.dim() == 1 else [list(line) for _ in range(len(counts))]
    return counts.tolist()
