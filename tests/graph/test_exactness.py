"""Whether a removal equals masking, against masking itself: a group is exact if, and only if, the numbers agree.

Each body maps hidden features ``y[batch, tokens, HEADS * DIM]`` and ends in a sum over them, which is exact only if
what is summed is zero wherever the producing layer is masked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphwright.frontends.capture import capture
from graphwright.graph.depgraph import CouplingGroup, depgraph
from graphwright.graph.oracle import masked_parameters
from graphwright.graph.resize import resize

WIDTH, HEADS, DIM = 5, 3, 4
HIDDEN = HEADS * DIM

Body = Callable[[Any, Tensor], Tensor]


class Model(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body
        self.before, self.after = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.weight = nn.Parameter(torch.randn(HIDDEN, 2))
        self.positions = nn.Parameter(torch.randn(4, HIDDEN))
        self.register_buffer("table", torch.randn(4, HIDDEN))
        self.layer_norm, self.rms_norm = nn.LayerNorm(DIM), nn.RMSNorm(DIM)
        nn.init.normal_(self.layer_norm.bias)
        self.batch_norm, self.plain_norm = nn.BatchNorm1d(HIDDEN), nn.BatchNorm1d(HIDDEN, affine=False)
        for norm in (self.batch_norm, self.plain_norm):
            nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
        nn.init.normal_(self.batch_norm.bias)
        self.lstm, self.gru = (kind(WIDTH, HIDDEN, batch_first=True) for kind in (nn.LSTM, nn.GRU))
        self.square, self.shift = nn.Parameter(torch.randn(HIDDEN, HIDDEN)), nn.Parameter(torch.randn(HIDDEN))
        self.gain = nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        return self.after(y.tanh()) * self.body(self, y)


def total(y: Tensor) -> Tensor:
    return y.sum(-1, keepdim=True)


def in_place(y: Tensor) -> Tensor:
    y.add_(1)
    return y


def through_a_view(y: Tensor) -> Tensor:
    y[:, :, :3].add_(1)
    return y


def read_by_an_older_view(y: Tensor) -> Tensor:
    view = y.unsqueeze(0)
    y.add_(1)
    return view.squeeze(0)


def zeros_written_later(y: Tensor) -> Tensor:
    z = torch.zeros_like(y)
    z[:, 0] = 1.0
    return z * y.sigmoid()


def zeros_copied_over(y: Tensor) -> Tensor:
    return torch.zeros_like(y).copy_(y.new_ones(())) * y.sigmoid()


def heads(y: Tensor) -> Tensor:
    return y.unflatten(-1, (HEADS, DIM))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (heads(t).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).sum((1, 3)).unsqueeze(-1)


def rows(y: Tensor) -> Tensor:
    """``[batch, tokens, HIDDEN, 1]``, to pair every feature with every other one."""
    return y.unsqueeze(-1)


def columns(y: Tensor) -> Tensor:
    return y.unsqueeze(-2)


def pairs(y: Tensor) -> Tensor:
    """Sum over both dimensions of pairs of features."""
    return y.sum((-2, -1)).unsqueeze(-1)


def key_times_value(y: Tensor) -> Tensor:
    """Attention without a softmax, in its linear form: features of the keys times those of the values."""
    key = F.elu(y) + 1
    return (key.unsqueeze(-2) @ (rows(key) @ columns(y))).squeeze(-2)


def even(y: Tensor) -> Tensor:
    """A condition that masking does not change."""
    return torch.arange(y.shape[1])[None, :, None] % 2 == 0


EXACT: dict[str, Body] = {
    "the layer itself": lambda m, y: total(y),
    "functions that keep zero": lambda m, y: total((y.relu() + y.tanh() - F.gelu(y) * y.abs()) ** 2),
    "relu in place": lambda m, y: total(F.relu(y, inplace=True)),
    "quotient": lambda m, y: total(y / (1 + y.sigmoid())),
    "product with something that is not": lambda m, y: total(y * y.exp()),
    "contraction of what is not zero with a parameter": lambda m, y: (y.sigmoid() @ m.weight)[..., :1],
    "with a parameter moved about": lambda m, y: (y.sigmoid() @ m.weight.t().unsqueeze(0).transpose(1, 2))[..., :1],
    "with a scaled parameter": lambda m, y: (y.sigmoid() @ (m.weight * 2))[..., :1],
    "of zeros with a computed weight": lambda m, y: (y @ F.softplus(m.weight))[..., :1],
    "added positions": lambda m, y: total(y + m.positions),
    "choice against zero": lambda m, y: total(torch.where(even(y), y, 0.0)),
    "padding with zero": lambda m, y: total(F.pad(y, (0, 0, 1, 0)))[:, 1:],
    "batch norm": lambda m, y: total(m.batch_norm(y.transpose(1, 2)).relu().transpose(1, 2)),
    "root mean square of heads": lambda m, y: m.rms_norm(heads(y)).sum(2).amax(-1, keepdim=True),
    "vector norm": lambda m, y: y.norm(dim=-1, keepdim=True),
    "products of queries and keys": lambda m, y: attend(y, (y + m.table).cos(), y),
    "sum over time first": lambda m, y: total(y.cumsum(1)),
    "pairs of zeros": lambda m, y: pairs(rows(y) * columns(y)),
    "pairs, summed where they are zero": lambda m, y: ((rows(y) * columns(y.sigmoid())).sum(-2) @ m.weight)[..., :1],
    "pairs in an einsum": lambda m, y: torch.einsum("bti,btj->bt", y, y).unsqueeze(-1),
    "einsum over what is zero": lambda m, y: torch.einsum("...i,...i->...", y, y.sigmoid()).unsqueeze(-1),
    "product that is zero where it is summed": lambda m, y: (
        ((columns(y) @ rows(y.sigmoid())) * columns(y))[..., 0, :] @ m.weight[:, :1]
    ),
    "one argument repeated": lambda m, y: total(y.repeat(1, 1, 2)),
    "concatenation with itself": lambda m, y: total(torch.cat([y, y.tanh()], -1)),
}
INEXACT: dict[str, Body] = {
    "one added": lambda m, y: total(y + 1),
    "one added in place": lambda m, y: total(in_place(y)),
    "one added through a view": lambda m, y: total(through_a_view(y)),
    "one added, read by an older view": lambda m, y: total(read_by_an_older_view(y)),
    "zeros written later": lambda m, y: total(zeros_written_later(y)),
    "zeros copied over": lambda m, y: total(zeros_copied_over(y)),
    "filled": lambda m, y: total(torch.empty_like(y).fill_(2.0) * y.cos()),
    "sigmoid": lambda m, y: total(y.sigmoid()),
    "two to the power": lambda m, y: total(2**y),
    "power to itself": lambda m, y: total(y.relu() ** y.relu()),
    "clamped from below": lambda m, y: total(y.clamp_min(0.1)),
    "reciprocal": lambda m, y: total(1 / (3 + y.tanh())),
    "contraction with a computed weight": lambda m, y: (y.sigmoid() @ F.softplus(m.weight))[..., :1],
    "linear with a computed weight": lambda m, y: F.linear(y.sigmoid(), F.softplus(m.weight).t(), m.weight[0])[..., :1],
    "contraction with a buffer": lambda m, y: y.sigmoid() @ m.table[:1].t(),
    "contraction with ones": lambda m, y: y.sigmoid() @ torch.ones(HIDDEN, 1, dtype=y.dtype),
    "added table": lambda m, y: total(y + m.table),
    "choice against one": lambda m, y: total(torch.where(even(y), y, 1.0)),
    "choice against a tensor of one": lambda m, y: total(torch.where(even(y), y, y.new_ones(()))),
    "padding with one": lambda m, y: total(F.pad(y, (0, 0, 1, 0), value=1.0))[:, :-1],
    "batch norm without weights": lambda m, y: total(m.plain_norm(y.transpose(1, 2)).transpose(1, 2)),
    "layer norm of heads": lambda m, y: m.layer_norm(heads(y)).sum(2).amax(-1, keepdim=True),
    "products of what is not zero": lambda m, y: attend((y + m.table).sigmoid(), (y + m.table).cos(), y),
    "mean": lambda m, y: y.mean(-1, keepdim=True),
    "pairs added": lambda m, y: pairs((rows(y) + columns(y)) ** 2),
    "pairs compared": lambda m, y: ((rows(y) - columns(y)).abs().sum(-1) @ m.weight)[..., :1],
    "pairs, summed where they are not zero": lambda m, y: ((rows(y) * columns(y.sigmoid())).sum(-1) @ m.weight)[
        ..., :1
    ],
    "pairs, one side expanded": lambda m, y: (
        (rows(y).expand(-1, -1, -1, HIDDEN) * columns(y.sigmoid())).sum(-1) @ m.weight
    )[..., :1],
    "pairs, one side repeated": lambda m, y: (
        (rows(y).repeat(1, 1, 1, HIDDEN) * columns(y.sigmoid())).sum(-1) @ m.weight
    )[..., :1],
    "one number expanded": lambda m, y: total(m.gain.expand_as(y)),
    "bias of a computed weight": lambda m, y: (y * F.linear(y.sigmoid(), m.square.exp(), m.shift)) @ m.weight[:, :1],
    "einsum whose other letter is zero": lambda m, y: torch.einsum("bti,btj->bt", y.sigmoid(), y).unsqueeze(-1),
    "linear attention": lambda m, y: key_times_value(y) @ m.weight[:, :1],
    "cosine of one that is": lambda m, y: F.cosine_similarity(y, y.sigmoid(), dim=-1).unsqueeze(-1),
}


def model(body: Body) -> Model:
    torch.manual_seed(0)
    return Model(body).double().eval()


def worst(body: Body, pick: Callable[[CouplingGroup], bool]) -> tuple[float, set[str]]:
    """Return the largest difference to masking over the picked groups, and what these call themselves."""
    torch.manual_seed(1)
    x = torch.randn(2, 4, WIDTH, dtype=torch.float64)
    graph = depgraph(capture(model(body), (x,)))
    differences, claims = [], set()
    for group in filter(pick, graph.groups):
        smaller = graph.program.copy()
        record = resize(smaller, {group.name: np.arange(0, group.size, 2)})
        want = torch.func.functional_call(model(body), masked_parameters(model(body), record), (x,))
        differences.append(float((smaller(x) - want).detach().abs().max()))
        claims.add(group.exactness)
        assert want.abs().max() > 1e-3
    return max(differences), claims


@pytest.mark.parametrize("name", EXACT)
def test_exact_removal_equals_masking(name: str) -> None:
    # Where heads are told apart, those within a head have statistics of their own.
    of_heads = name == "root mean square of heads"
    difference, claims = worst(EXACT[name], lambda group: group.size == HEADS if of_heads else True)
    assert difference < 1e-10
    assert claims == {"exact"}


@pytest.mark.parametrize("name", INEXACT)
def test_removal_that_differs_from_masking_says_so(name: str) -> None:
    of_heads = name == "layer norm of heads"
    difference, claims = worst(INEXACT[name], lambda group: group.size == HEADS if of_heads else True)
    assert difference > 1e-6
    assert "renormalised" in claims
