"""Rules on captured modules with a dynamic batch: every group that is called exact removes what masking zeroes.

The law of ``rule_oracle`` knows static sizes only. Here sizes hold symbols (batch times heads), literals are computed
by the graph, and operators follow one another. The smaller program runs on another batch size than the captured one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphwright.frontends.capture import capture
from graphwright.graph.depgraph import depgraph
from graphwright.graph.resize import RemovalRecord, resize

WIDTH, HEADS, DIM = 6, 3, 4

Body = Callable[[Any, Tensor], Tensor]


class Sandwich(nn.Module):
    """A linear layer, the body under test, a linear layer: what lies between them can be removed."""

    def __init__(self, body: Body, before: int, after: int) -> None:
        super().__init__()
        self.body = body
        self.before = nn.Linear(WIDTH, before)
        self.after = nn.Linear(after, WIDTH)
        self.extra = nn.Parameter(torch.randn(HEADS * DIM))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.body(self, self.before(x)))


def heads_merged_into_the_batch(m: Any, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    q, k, v = (t.reshape(b, n, HEADS, DIM).transpose(1, 2).reshape(b * HEADS, n, DIM) for t in x.chunk(3, -1))
    weights = torch.bmm(q, k.transpose(1, 2)).softmax(-1)
    return torch.bmm(weights, v).view(b, HEADS, n, DIM).transpose(1, 2).reshape(b, n, HEADS * DIM)


def heads_unflattened_from_the_batch(m: Any, x: Tensor) -> Tensor:
    _b, _n, _ = x.shape
    y = x.unflatten(-1, (HEADS, DIM)).permute(0, 2, 1, 3).flatten(0, 1).tanh()
    return y.unflatten(0, (-1, HEADS)).permute(0, 2, 1, 3).flatten(2)


def zeros_of_the_merged_size(m: Any, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    y = x.view(b, n, HEADS, DIM).transpose(1, 2).reshape(b * HEADS, n, DIM)
    y = y + torch.zeros(b * HEADS, n, DIM)
    return y.view(b, HEADS, n, DIM).transpose(1, 2).reshape(b, n, HEADS * DIM)


def bias_expanded_to_the_merged_size(m: Any, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    y = x.view(b, n, HEADS, DIM).transpose(1, 2).reshape(b * HEADS, n, DIM)
    y = y + m.extra[:DIM].view(1, 1, DIM).expand(b * HEADS, n, DIM)
    return y.view(b, HEADS, n, DIM).transpose(1, 2).reshape(b, n, HEADS * DIM)


def repeated_to_the_merged_size(m: Any, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    y = x.view(b, n, HEADS, DIM).transpose(1, 2).reshape(b * HEADS, n, DIM)
    y = y * m.extra[:DIM].view(1, 1, DIM).repeat(b * HEADS, n, 1)
    return y.view(b, HEADS, n, DIM).transpose(1, 2).reshape(b, n, HEADS * DIM)


def repeated_per_head(m: Any, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    y = x.view(b, n, HEADS, DIM).transpose(1, 2)
    gate = x.mean(-1, keepdim=True).repeat_interleave(HEADS, dim=0).view(b, HEADS, n, 1)
    return (y * gate).transpose(1, 2).reshape(b, n, HEADS * DIM)


def merged_batch_repeated(m: Any, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    y = x.view(b, n, HEADS, DIM).transpose(1, 2).reshape(b * HEADS, n, DIM).repeat_interleave(2, dim=0)
    return y.view(b, HEADS, 2, n, DIM).sum(2).transpose(1, 2).reshape(b, n, HEADS * DIM)


def merged_batch_sliced_whole(m: Any, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    y = x.view(b, n, HEADS, DIM).transpose(1, 2).reshape(b * HEADS, n, DIM)
    y = torch.cat([y[:, :1], y[:, 1:]], dim=1)[:, :, None, :].squeeze(2)
    return y.view(b, HEADS, n, DIM).transpose(1, 2).reshape(b, n, HEADS * DIM)


def merged_batch_joined(m: Any, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    y = x.view(b, n, HEADS, DIM).transpose(1, 2).reshape(b * HEADS, n, DIM)
    both = torch.cat([y, y.neg()], dim=0)
    first, second = both.chunk(2, dim=0)
    return (first - second).view(b, HEADS, n, DIM).transpose(1, 2).reshape(b, n, HEADS * DIM)


def merged_batch_indexed(m: Any, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    y = x.view(b, n, HEADS, DIM).transpose(1, 2).reshape(b * HEADS, n, DIM)
    y = y[torch.arange(b * HEADS)]
    return y.view(b, HEADS, n, DIM).transpose(1, 2).reshape(b, n, HEADS * DIM)


def size_of_the_merged_batch_divided(m: Any, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    y = x.view(b, n, HEADS, DIM).transpose(1, 2).reshape(b * HEADS, n, DIM)
    return y.view(y.shape[0] // HEADS, HEADS, n, DIM).transpose(1, 2).reshape(b, n, HEADS * DIM) / y.shape[0]


def grouped_queries_expanded(m: Any, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    q = x.view(b, n, 2 * HEADS, DIM)[:, :, :HEADS].transpose(1, 2)
    k = x.view(b, n, 2 * HEADS, DIM)[:, :, HEADS : HEADS + 1].transpose(1, 2)
    v = x.view(b, n, 2 * HEADS, DIM)[:, :, HEADS + 1 : HEADS + 2].transpose(1, 2)
    k, v = (t[:, :, None].expand(b, 1, HEADS, n, DIM).reshape(b, HEADS, n, DIM) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, HEADS * DIM)


def windows_merged_into_the_batch(m: Any, x: Tensor) -> Tensor:
    b, n, c = x.shape
    y = x.view(b, n // 2, 2, c).permute(0, 2, 1, 3).reshape(b * 2, n // 2, c).tanh()
    return y.view(b, 2, n // 2, c).permute(0, 2, 1, 3).reshape(b, n, c)


def channels_merged_into_the_batch(m: Any, x: Tensor) -> Tensor:
    b, n, c = x.shape
    y = F.avg_pool1d(x.transpose(1, 2).reshape(b * c, 1, n), 3, 1, 1)
    return y.view(b, c, n).transpose(1, 2)


def instance_norm_by_a_batch_of_one(m: Any, x: Tensor) -> Tensor:
    b, n, c = x.shape
    y = F.batch_norm(x.transpose(1, 2).reshape(1, b * c, n), None, None, training=True)
    return y.view(b, c, n).transpose(1, 2)


def group_norm_over_the_merged_batch(m: Any, x: Tensor) -> Tensor:
    b, n, c = x.shape
    y = F.group_norm(x.transpose(1, 2).reshape(1, b * c, n), 2)
    return y.view(b, c, n).transpose(1, 2)


def convolution_per_sample(m: Any, x: Tensor) -> Tensor:
    """A weight per sample, as in modulated convolution: groups of the batch's size."""
    b, n, _c = x.shape
    weight = m.extra[:9].view(1, 3, 3).repeat(b, 1, 1).view(3 * b, 3, 1)
    y = F.conv1d(x.transpose(1, 2)[:, :3].reshape(1, b * 3, n), weight, groups=b).view(b, 3, n).transpose(1, 2)
    return x + y.mean(-1, keepdim=True)


def first_axis_removed_by_squeeze(m: Any, x: Tensor) -> Tensor:
    return (x[:, :, None, :].squeeze() + m.extra).unsqueeze(0).squeeze(0)


def sampled(m: Any, x: Tensor) -> Tensor:
    return torch.stack([x, x.roll(1, 1)], dim=-1).amax(-1) + x.new_zeros(x.shape[0], x.shape[1], HEADS * DIM)


MODELS: dict[Body, tuple[int, int]] = {
    heads_merged_into_the_batch: (3 * HEADS * DIM, HEADS * DIM),
    heads_unflattened_from_the_batch: (HEADS * DIM, HEADS * DIM),
    zeros_of_the_merged_size: (HEADS * DIM, HEADS * DIM),
    bias_expanded_to_the_merged_size: (HEADS * DIM, HEADS * DIM),
    repeated_to_the_merged_size: (HEADS * DIM, HEADS * DIM),
    repeated_per_head: (HEADS * DIM, HEADS * DIM),
    merged_batch_repeated: (HEADS * DIM, HEADS * DIM),
    merged_batch_sliced_whole: (HEADS * DIM, HEADS * DIM),
    merged_batch_joined: (HEADS * DIM, HEADS * DIM),
    merged_batch_indexed: (HEADS * DIM, HEADS * DIM),
    size_of_the_merged_batch_divided: (HEADS * DIM, HEADS * DIM),
    grouped_queries_expanded: (2 * HEADS * DIM, HEADS * DIM),
    windows_merged_into_the_batch: (HEADS * DIM, HEADS * DIM),
    channels_merged_into_the_batch: (HEADS * DIM, HEADS * DIM),
    instance_norm_by_a_batch_of_one: (HEADS * DIM, HEADS * DIM),
    group_norm_over_the_merged_batch: (HEADS * DIM, HEADS * DIM),
    convolution_per_sample: (HEADS * DIM, HEADS * DIM),
    first_axis_removed_by_squeeze: (HEADS * DIM, HEADS * DIM),
    sampled: (HEADS * DIM, HEADS * DIM),
}
HEADS_FREE = (
    heads_merged_into_the_batch,
    heads_unflattened_from_the_batch,
    merged_batch_repeated,
    merged_batch_sliced_whole,
)


def masked(model: nn.Module, record: RemovalRecord) -> nn.Module:
    """Return ``model`` with the removed entries of its parameters set to zero."""
    with torch.no_grad():
        for name, dims in record.tensors.items():
            tensor = dict(model.named_parameters())[name]
            for dim, cut in dims.items():
                gone = np.setdiff1d(np.arange(cut.of), np.asarray(cut.kept))
                tensor.index_fill_(dim, torch.from_numpy(gone), 0)
    return model


def build(body: Body) -> nn.Module:
    torch.manual_seed(0)
    return Sandwich(body, *MODELS[body]).double().eval()


@pytest.mark.parametrize("body", MODELS, ids=lambda body: body.__name__)
def test_removal_equals_masking_on_another_batch(body: Body) -> None:
    torch.manual_seed(1)
    example, other = torch.randn(2, 4, WIDTH, dtype=torch.float64), torch.randn(5, 4, WIDTH, dtype=torch.float64)
    program = capture(build(body), (example,))
    graph = depgraph(program)
    dynamic = not program.notes
    assert graph.groups or graph.frozen
    rng = np.random.default_rng(0)
    for group in graph.groups:
        assert group.step == 1
        kept = np.sort(rng.choice(group.size, int(rng.integers(1, group.size)), replace=False))
        smaller = program.copy()
        record = resize(smaller, {group.name: kept})
        assert record.tensors
        got = smaller(other if dynamic else example)
        if group.exactness == "exact":
            want = masked(build(body), record)(other if dynamic else example)
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
            assert want.abs().max() > 1e-3


@pytest.mark.parametrize("body", HEADS_FREE, ids=lambda body: body.__name__)
def test_heads_merged_into_a_dynamic_batch_stay_removable(body: Body) -> None:
    graph = depgraph(capture(build(body), (torch.randn(2, 4, WIDTH, dtype=torch.float64),)))
    assert {group.size for group in graph.groups} >= {HEADS, DIM}
    assert math.prod(g.size for g in graph.groups) > HEADS
