"""Odd cases that a gradient-graph pruner gets silently wrong: index mappings, statistics, head layouts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .entry import Entry
from .odd_base import Net, conv, features, heads, lin, merge, odd, param, pictures


def _split(order: str, sizes: tuple[int, int] = (8, 8)) -> nn.Module:
    """A split whose parts go through different layers, joined in some order."""
    u, v = sizes

    def run(m: Net, x: torch.Tensor) -> torch.Tensor:
        p, q = m.a(x).relu().split([u, v], 1)
        if order == "cat":
            return m.c(torch.cat([m.b1(p), m.b2(q)], 1))
        return m.c(m.b1(p) + m.b2(q)) if order == "sum" else m.c(m.b2(q) + m.b1(p))

    return Net(run, a=conv(3, u + v), b1=conv(u, 6), b2=conv(v, 6), c=conv(12 if order == "cat" else 6, 2))


def _gate(m: Net, x: torch.Tensor) -> torch.Tensor:
    """A gate with a layer on one half."""
    v, u = m.a(x).chunk(2, 1)
    return m.c(u * m.g(v).sigmoid())


def _feature_chunk(m: Net, x: torch.Tensor) -> torch.Tensor:
    """The last dimension of token features in two, each half into its own layer."""
    u, v = m.a(x).chunk(2, -1)
    return m.b1(u) + m.b2(v)


def _second_only(m: Net, x: torch.Tensor) -> torch.Tensor:
    """The first part of a split is not used."""
    _, v = m.a(x).split([6, 10], 1)
    return m.c(v)


def _shuffle(m: Net, x: torch.Tensor) -> torch.Tensor:
    """Channel shuffle in two groups, written with views."""
    h = m.a(x).relu()
    b, c, height, width = h.shape
    h = h.view(b, 2, c // 2, height, width).transpose(1, 2).reshape(b, c, height, width)
    return m.c(h)


def _flattened(u: int, v: int) -> nn.Module:
    """Two flattened branches, concatenated into one linear layer."""

    def run(m: Net, x: torch.Tensor) -> torch.Tensor:
        return m.c(torch.cat([m.a(x).relu().flatten(1), m.b(x).relu().flatten(1)], 1))

    return Net(run, a=conv(3, u, stride=2), b=conv(3, v, stride=2), c=lin((u + v) * 16, 3))


def _flat_and_vector(m: Net, x: torch.Tensor) -> torch.Tensor:
    """A vector branch and a flattened branch, concatenated."""
    return m.c(torch.cat([m.v(x.mean((2, 3))).relu(), m.a(x).relu().flatten(1)], 1))


def _group_concat(m: Net, x: torch.Tensor) -> torch.Tensor:
    """Group norm over a skip concat whose border lies inside a group."""
    return m.c(F.silu(m.n(torch.cat([m.a(x), m.b(x)], 1))))


def _view_heads(m: Net, x: torch.Tensor) -> torch.Tensor:
    """Attention with a literal number of heads and an inferred head size."""
    q, k, v = (heads(part(x), 3) for part in (m.q, m.k, m.v))
    return m.o(merge((q @ k.transpose(-2, -1) * 0.4).softmax(-1) @ v))


def _view_size(m: Net, x: torch.Tensor) -> torch.Tensor:
    """Attention with a literal head size and an inferred number of heads."""
    b, n, _ = x.shape
    q, k, v = (part(x).view(b, n, -1, 4).transpose(1, 2) for part in (m.q, m.k, m.v))
    return m.o(merge((q @ k.transpose(-2, -1) * 0.4).softmax(-1) @ v))


def _per_head(m: Net, x: torch.Tensor) -> torch.Tensor:
    """Fused qkv laid out head by head: each head holds its q, k and v."""
    b, n, _ = x.shape
    q, k, v = m.qkv(x).view(b, n, 3, 3 * 4).transpose(1, 2).chunk(3, -1)
    return m.o(merge((q @ k.transpose(-2, -1) * 0.4).softmax(-1) @ v))


def _implicit(m: Net, x: torch.Tensor) -> torch.Tensor:
    """Scaled dot product attention that derives its scale from the head size."""
    q, k, v = (heads(part(x), 3) for part in (m.q, m.k, m.v))
    return m.o(merge(F.scaled_dot_product_attention(q, k, v)))


def _channel_conv(m: Net, x: torch.Tensor) -> torch.Tensor:
    """Efficient channel attention: a 1-D convolution along the channels."""
    h = m.a(x)
    g = m.e(h.mean((2, 3))[:, None]).sigmoid()[:, 0]
    return m.c(h * g[:, :, None, None])


def _attention(**more: int) -> dict[str, nn.Module]:
    """Projections of an attention block, 3 heads of 4."""
    return {"q": lin(5, 12), "k": lin(5, 12), "v": lin(5, 12), "o": lin(12, 3)}


def _shared() -> nn.Module:
    """Two convolutions that hold one weight tensor, on branches that nothing else couples."""
    first, second = conv(6, 5, bias=False), conv(6, 5, bias=False)
    second.weight = first.weight
    return Net(
        lambda m, x: torch.cat([m.c(m.s(m.a(x)).relu()), m.d(m.t(m.b(x)).relu())], 1),
        a=conv(3, 6),
        b=conv(3, 6),
        s=first,
        t=second,
        c=conv(5, 2),
        d=conv(5, 3),
    )


ENTRIES: list[Entry] = [
    odd("wrong/split_cat", lambda: _split("cat")),
    odd("wrong/split_sum", lambda: _split("sum")),
    odd("wrong/split_sum_reversed", lambda: _split("reversed"), note="the order that comes out right"),
    odd("wrong/split_uneven_cat", lambda: _split("cat", (10, 6))),
    odd("wrong/split_uneven_sum", lambda: _split("sum", (10, 6))),
    odd("wrong/gate_layer_on_half", lambda: Net(_gate, a=conv(3, 12), g=conv(6, 6), c=conv(6, 2))),
    odd("wrong/feature_chunk", lambda: Net(_feature_chunk, a=lin(5, 12), b1=lin(6, 3), b2=lin(6, 3)), features),
    odd("wrong/split_first_unused", lambda: Net(_second_only, a=conv(3, 16), c=conv(10, 2))),
    odd("wrong/channel_shuffle_view", lambda: Net(_shuffle, a=conv(3, 10), c=conv(10, 2))),
    odd(
        "wrong/channel_shuffle_module",
        lambda: Net(lambda m, x: m.c(m.s(m.a(x).relu())), a=conv(3, 10), s=nn.ChannelShuffle(2), c=conv(10, 2)),
    ),
    odd("wrong/flip", lambda: Net(lambda m, x: m.c(m.a(x).flip(1)), a=conv(3, 7), c=conv(7, 2))),
    odd("wrong/roll", lambda: Net(lambda m, x: m.c(m.a(x).roll(2, 1)), a=conv(3, 7), c=conv(7, 2))),
    odd(
        "wrong/stack_flatten",
        lambda: Net(
            lambda m, x: m.c(torch.stack([m.a(x), m.b(x)], 1).flatten(1, 2)), a=conv(3, 7), b=conv(3, 7), c=conv(14, 2)
        ),
    ),
    odd(
        "wrong/flatten_channels_last",
        lambda: Net(lambda m, x: m.c(m.a(x).permute(0, 2, 3, 1).flatten(1)), a=conv(3, 6, stride=2), c=lin(96, 3)),
    ),
    odd("wrong/concat_flattened_equal", lambda: _flattened(6, 6)),
    odd("wrong/concat_flattened_unequal", lambda: _flattened(5, 7)),
    odd(
        "wrong/concat_vector_flattened",
        lambda: Net(_flat_and_vector, v=lin(3, 9), a=conv(3, 5, stride=2), c=lin(9 + 80, 3)),
    ),
    odd("wrong/slice_negative", lambda: Net(lambda m, x: m.c(m.a(x)[:, -4:]), a=conv(3, 9), c=conv(4, 2))),
    odd(
        "wrong/slice_bounded",
        lambda: Net(lambda m, x: m.c((h := m.a(x))[:, 2:6]) + m.d(h), a=conv(3, 9), c=conv(4, 2), d=conv(9, 2)),
    ),
    odd(
        "wrong/grouped_conv",
        lambda: Net(lambda m, x: m.c(m.g(m.a(x).relu()).relu()), a=conv(3, 8), g=conv(8, 6, groups=2), c=conv(6, 2)),
    ),
    odd(
        "wrong/group_norm",
        lambda: Net(lambda m, x: m.c(m.n(m.a(x)).relu()), a=conv(3, 8), n=nn.GroupNorm(4, 8), c=conv(8, 2)),
        note="whole groups, or equal counts in every group",
    ),
    odd(
        "wrong/group_norm_concat",
        lambda: Net(_group_concat, a=conv(3, 64), b=conv(3, 32), n=nn.GroupNorm(8, 96), c=conv(96, 2)),
        note="groups of 12 over 64 + 32",
    ),
    odd(
        "wrong/group_norm_concat_even",
        lambda: Net(_group_concat, a=conv(3, 24), b=conv(3, 12), n=nn.GroupNorm(3, 36), c=conv(36, 2)),
        note="the border coincides with a group's",
    ),
    odd(
        "wrong/attention_module",
        lambda: Net(
            lambda m, x: m.c(m.m(h := m.i(x), h, h, need_weights=False)[0]),
            i=lin(5, 12),
            m=nn.MultiheadAttention(12, 3, batch_first=True),
            c=lin(12, 2),
        ),
        features,
    ),
    odd(
        "wrong/attention_module_8_2",
        lambda: Net(
            lambda m, x: m.c(m.m(h := m.i(x), h, h, need_weights=False)[0]),
            i=lin(5, 8),
            m=nn.MultiheadAttention(8, 2, batch_first=True),
            c=lin(8, 3),
        ),
        features,
    ),
    odd("wrong/attention_view_heads", lambda: Net(_view_heads, **_attention()), features),
    odd("wrong/attention_view_size", lambda: Net(_view_size, **_attention()), features),
    odd("wrong/attention_per_head_qkv", lambda: Net(_per_head, qkv=lin(5, 36), o=lin(12, 3)), features),
    odd("wrong/attention_implicit_scale", lambda: Net(_implicit, **_attention()), features),
    odd(
        "wrong/channel_conv",
        lambda: Net(_channel_conv, a=conv(3, 8), e=nn.Conv1d(1, 1, 3, padding=1), c=conv(8, 2)),
        note="no exact equivalent: neighbourhoods change",
    ),
    odd(
        "wrong/softmax_channels",
        lambda: Net(lambda m, x: m.c(m.a(x).softmax(1)), a=conv(3, 8), c=conv(8, 2)),
        note="no exact equivalent: the denominator changes",
    ),
    odd(
        "wrong/softmax_features",
        lambda: Net(lambda m, x: m.c(m.a(x).softmax(-1)), a=lin(5, 8), c=lin(8, 3)),
        features,
        note="no exact equivalent",
    ),
    odd("wrong/shared_weight", _shared, note="two layers, one tensor"),
    odd(
        "wrong/shared_parameter",
        lambda: Net(
            lambda m, x: m.c((m.a(x) * m.g).relu()) + m.d((m.b(x) * m.g).relu()),
            a=lin(5, 6),
            b=lin(5, 6),
            g=param(6),
            c=lin(6, 3),
            d=lin(6, 3),
        ),
        features,
        note="one scale on two branches",
    ),
    odd(
        "wrong/spatial_gate",
        lambda: Net(lambda m, x: m.c((h := m.a(x)) * m.g(h).sigmoid()), a=conv(3, 8), g=conv(8, 1), c=conv(8, 2)),
        pictures,
        note="left at full width elsewhere",
    ),
    odd(
        "wrong/spatial_attention",
        lambda: Net(
            lambda m, x: m.c((h := m.a(x)) * m.g(torch.cat([h.mean(1, True), h.amax(1, True)], 1)).sigmoid()),
            a=conv(3, 8),
            g=conv(2, 1),
            c=conv(8, 2),
        ),
        note="mean and maximum over the channels (CBAM)",
    ),
    odd(
        "wrong/channel_sum",
        lambda: Net(lambda m, x: m.c(m.a(x).relu().sum(1, keepdim=True)), a=conv(3, 8), c=conv(1, 2)),
        note="left at full width elsewhere",
    ),
]
