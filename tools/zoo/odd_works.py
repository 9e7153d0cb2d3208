"""Odd cases that gradient-graph pruners handle: the floor of what has to work."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .entry import Entry, image
from .odd_base import Net, conv, features, heads, lin, merge, odd, param, pictures, vectors


def _inplace(m: Net, x: torch.Tensor) -> torch.Tensor:
    """Rewrite two rows of the picture in place; the channels stay."""
    h = m.a(x)
    h[:, :, :2] = h[:, :, :2] * 2
    return m.b(h)


class Sign(torch.autograd.Function):
    """Round forward, pass the gradient straight through."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """Round to quarters."""
        return torch.round(x * 4) / 4

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        """Identity."""
        return grads[0]


class RMS(nn.Module):
    """The RMS norm module that language models write themselves."""

    def __init__(self, width: int) -> None:
        """One weight per feature."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise over the last dimension."""
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def _separate(m: Net, x: torch.Tensor) -> torch.Tensor:
    """Attention with the scale as a constant and heads viewed as (3, -1)."""
    h = m.i(x)
    q, k, v = heads(m.q(h), 3), heads(m.k(h), 3), heads(m.v(h), 3)
    return m.c(h + m.o(merge((q @ k.transpose(-2, -1) * 0.4).softmax(-1) @ v)))


def _unbind(m: Net, x: torch.Tensor) -> torch.Tensor:
    """Fused qkv: reshape (3, heads, size), permute, unbind."""
    h = m.i(x)
    b, n, _ = h.shape
    q, k, v = m.qkv(h).reshape(b, n, 3, 3, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return m.c(h + m.o(merge((q @ k.transpose(-2, -1) * 0.4).softmax(-1) @ v)))


def _chunked(split: bool) -> nn.Module:
    """Fused qkv taken apart by chunk or split on the last dimension."""

    def run(m: Net, x: torch.Tensor) -> torch.Tensor:
        h = m.i(x)
        parts = m.qkv(h).split(12, -1) if split else m.qkv(h).chunk(3, -1)
        q, k, v = (heads(part, 3) for part in parts)
        return m.c(h + m.o(merge((q @ k.transpose(-2, -1) * 0.4).softmax(-1) @ v)))

    return Net(run, i=lin(5, 10), qkv=lin(10, 36), o=lin(12, 10), c=lin(10, 2))


def _grouped(m: Net, x: torch.Tensor) -> torch.Tensor:
    """Grouped-query attention, 6 query and 2 key/value heads of 4."""
    h = m.i(x)
    q, k, v = heads(m.q(h), 6), heads(m.k(h), 2), heads(m.v(h), 2)
    k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
    return m.c(h + m.o(merge((q @ k.transpose(-2, -1) * 0.4).softmax(-1) @ v)))


def _squeeze(m: Net, x: torch.Tensor) -> torch.Tensor:
    """Squeeze-and-excite with linear layers."""
    h = m.a(x)
    g = m.up(m.down(h.mean((2, 3))).relu()).sigmoid()
    return m.b(h * g[:, :, None, None])


def _token(shape: tuple[int, ...]) -> nn.Module:
    """A class token in front of the sequence."""

    def run(m: Net, x: torch.Tensor) -> torch.Tensor:
        h = m.i(x)
        h = torch.cat([m.token.expand(h.shape[0], 1, -1), h], 1)
        return m.c(m.n(h))

    return Net(run, i=lin(5, 6), token=param(*shape), n=nn.LayerNorm(6), c=lin(6, 3))


def _queries(m: Net, x: torch.Tensor) -> torch.Tensor:
    """Learned queries attend over the features."""
    h = m.i(x)
    attention = (m.query @ m.k(h).transpose(1, 2) * 0.4).softmax(-1)
    return m.c(attention @ m.v(h))


def _view(m: Net, x: torch.Tensor) -> torch.Tensor:
    """Linear, view as a picture, convolution."""
    return m.c(m.a(x).view(x.shape[0], -1, 2, 2))


def _focus(m: Net, x: torch.Tensor) -> torch.Tensor:
    """Four spatial slices concatenated."""
    h = m.a(x)
    return m.b(torch.cat([h[..., ::2, ::2], h[..., 1::2, ::2], h[..., ::2, 1::2], h[..., 1::2, 1::2]], 1))


def _flat(kind: str, norm: bool = False) -> nn.Module:
    """Convolution, flatten, linear; the linear's input is channels times positions."""
    a = getattr(nn, kind)(3, 6, 3, padding=1, stride=2)
    size = {"Conv1d": 4, "Conv2d": 16, "Conv3d": 8}[kind] * 6
    return Net(
        lambda m, x: m.c(m.n(m.a(x).flatten(1)).relu()),
        a=a,
        n=nn.BatchNorm1d(size) if norm else nn.Identity(),
        c=lin(size, 4),
    )


ENTRIES: list[Entry] = [
    odd(
        "works/conv_bn_relu_conv",
        lambda: Net(lambda m, x: m.b(m.n(m.a(x)).relu()), a=conv(3, 8), n=nn.BatchNorm2d(8), b=conv(8, 2)),
    ),
    odd("works/residual_add", lambda: Net(lambda m, x: m.c(m.a(x) + m.b(x)), a=conv(3, 8), b=conv(3, 8), c=conv(8, 2))),
    odd(
        "works/concat_dim1",
        lambda: Net(lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)), a=conv(3, 8), b=conv(3, 5), c=conv(13, 2)),
    ),
    odd(
        "works/concat_dim_minus3",
        lambda: Net(lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], -3)), a=conv(3, 8), b=conv(3, 5), c=conv(13, 2)),
    ),
    odd(
        "works/concat_twice", lambda: Net(lambda m, x: m.c(torch.cat([h := m.a(x), h], 1)), a=conv(3, 7), c=conv(14, 2))
    ),
    odd(
        "works/concat_with_relu",
        lambda: Net(lambda m, x: m.c(torch.cat([h := m.a(x), h.relu()], 1)), a=conv(3, 7), c=conv(14, 2)),
    ),
    odd(
        "works/chunk_product",
        lambda: Net(lambda m, x: m.c((p := m.a(x).chunk(2, 1))[0] * p[1]), a=conv(3, 12), c=conv(6, 2)),
    ),
    odd(
        "works/glu_gate",
        lambda: Net(lambda m, x: m.c((p := m.a(x).chunk(2, 1))[0] * p[1].sigmoid()), a=conv(3, 12), c=conv(6, 2)),
    ),
    odd(
        "works/swiglu_chunk",
        lambda: Net(lambda m, x: m.c(F.silu((p := m.a(x).chunk(2, -1))[0]) * p[1]), a=lin(5, 14), c=lin(7, 3)),
        features,
    ),
    odd(
        "works/token_concat",
        lambda: Net(lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)), a=lin(5, 6), b=lin(5, 6), c=lin(6, 3)),
        features,
    ),
    odd(
        "works/spatial_concat",
        lambda: Net(lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 2)), a=conv(3, 6), b=conv(3, 6), c=conv(6, 2)),
    ),
    odd(
        "works/batch_concat",
        lambda: Net(lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 0)), a=conv(3, 6), b=conv(3, 6), c=conv(6, 2)),
    ),
    odd(
        "works/chunk_width",
        lambda: Net(
            lambda m, x: m.b((p := m.a(x).chunk(2, 3))[0]) + m.c(p[1]), a=conv(3, 6), b=conv(6, 2), c=conv(6, 2)
        ),
    ),
    odd(
        "works/chunk_height",
        lambda: Net(
            lambda m, x: m.b((p := m.a(x).chunk(2, 2))[0]) + m.c(p[1]), a=conv(3, 6), b=conv(6, 2), c=conv(6, 2)
        ),
    ),
    odd("works/slice_tokens", lambda: Net(lambda m, x: m.c(m.a(x)[:, 1:5]), a=lin(5, 6), c=lin(6, 3)), features),
    odd("works/slice_spatial", lambda: Net(lambda m, x: m.c(m.a(x)[:, :, 1:6, ::2]), a=conv(3, 6), c=conv(6, 2))),
    odd(
        "works/crop",
        lambda: Net(
            lambda m, x: m.c(torch.cat([(h := m.a(x))[..., 1:-1, 1:-1], m.b(h)], 1)),
            a=conv(3, 6),
            b=conv(6, 5, padding=0),
            c=conv(11, 2),
        ),
    ),
    odd("works/focus", lambda: Net(_focus, a=conv(3, 5), b=conv(20, 2))),
    odd("works/flatten_conv1d", lambda: _flat("Conv1d"), lambda b: image(b, 3, 8)),
    odd("works/flatten_conv2d", lambda: _flat("Conv2d"), pictures),
    odd("works/flatten_conv3d", lambda: _flat("Conv3d"), lambda b: image(b, 3, 4, 4, 4)),
    odd("works/flatten_conv1d_bn", lambda: _flat("Conv1d", True), lambda b: image(b, 3, 8)),
    odd("works/flatten_conv2d_bn", lambda: _flat("Conv2d", True), pictures),
    odd("works/flatten_conv3d_bn", lambda: _flat("Conv3d", True), lambda b: image(b, 3, 4, 4, 4)),
    odd("works/linear_view_conv", lambda: Net(_view, a=lin(5, 24), c=conv(6, 2)), vectors),
    odd(
        "works/patch_embedding",
        lambda: Net(lambda m, x: m.c(m.a(x).flatten(2).transpose(1, 2)), a=nn.Conv2d(3, 6, 4, 4), c=lin(6, 3)),
    ),
    odd(
        "works/position_embedding",
        lambda: Net(lambda m, x: m.c((m.a(x) + m.p).relu()), a=lin(5, 6), p=param(1, 7, 6), c=lin(6, 3)),
        features,
    ),
    odd(
        "works/layer_scale_vector",
        lambda: Net(lambda m, x: m.c(m.a(x) * m.g + m.b(x)), a=lin(5, 6), b=lin(5, 6), g=param(6), c=lin(6, 3)),
        features,
    ),
    odd(
        "works/layer_scale_map",
        lambda: Net(
            lambda m, x: m.c(m.a(x) * m.g + m.b(x)), a=conv(3, 6), b=conv(3, 6), g=param(6, 1, 1), c=conv(6, 2)
        ),
    ),
    odd("works/class_token", lambda: _token((1, 1, 6)), features),
    odd("works/class_token_vector", lambda: _token((6,)), features),
    odd(
        "works/learned_queries",
        lambda: Net(_queries, i=lin(5, 6), query=param(1, 4, 8), k=lin(6, 8), v=lin(6, 9), c=lin(9, 3)),
        features,
    ),
    odd(
        "works/squeeze_conv",
        lambda: Net(
            lambda m, x: m.b((h := m.a(x)) * m.up(m.down(h.mean((2, 3), True)).relu()).sigmoid()),
            a=conv(3, 8),
            down=conv(8, 5, 1),
            up=conv(5, 8, 1),
            b=conv(8, 2),
        ),
    ),
    odd("works/squeeze_linear", lambda: Net(_squeeze, a=conv(3, 8), down=lin(8, 5), up=lin(5, 8), b=conv(8, 2))),
    odd("works/prelu", lambda: Net(lambda m, x: m.b(m.p(m.a(x))), a=conv(3, 8), p=nn.PReLU(8), b=conv(8, 2))),
    odd(
        "works/instance_norm",
        lambda: Net(lambda m, x: m.b(m.n(m.a(x))), a=conv(3, 8), n=nn.InstanceNorm2d(8, affine=True), b=conv(8, 2)),
    ),
    odd(
        "works/batch_norm_plain",
        lambda: Net(lambda m, x: m.b(m.n(m.a(x))), a=conv(3, 8), n=nn.BatchNorm2d(8, affine=False), b=conv(8, 2)),
    ),
    odd(
        "works/layer_norm",
        lambda: Net(lambda m, x: m.b(m.n(m.a(x))), a=lin(5, 8), n=nn.LayerNorm(8), b=lin(8, 3)),
        features,
    ),
    odd(
        "works/rms_norm_module",
        lambda: Net(lambda m, x: m.b(m.n(m.a(x))), a=lin(5, 8), n=RMS(8), b=lin(8, 3)),
        features,
    ),
    odd(
        "works/depthwise",
        lambda: Net(lambda m, x: m.b(m.d(m.a(x)).relu()), a=conv(3, 8), d=conv(8, 8, groups=8), b=conv(8, 2)),
    ),
    odd(
        "works/depthwise_transposed",
        lambda: Net(
            lambda m, x: m.b(m.d(m.a(x)).relu()), a=conv(3, 8), d=nn.ConvTranspose2d(8, 8, 2, 2, groups=8), b=conv(8, 2)
        ),
    ),
    odd(
        "works/conv_transpose",
        lambda: Net(lambda m, x: m.b(m.d(m.a(x)).relu()), a=conv(3, 8), d=nn.ConvTranspose2d(8, 6, 2, 2), b=conv(6, 2)),
    ),
    odd(
        "works/reused",
        lambda: Net(lambda m, x: m.b(m.r(m.r(m.a(x)).relu()).relu()), a=conv(3, 8), r=conv(8, 8), b=conv(8, 2)),
        note="one module called twice in a row",
    ),
    odd(
        "works/reused_branches",
        lambda: Net(
            lambda m, x: m.c(torch.cat([m.r(m.a(x)), m.r(m.b(x))], 1)),
            a=conv(3, 8),
            b=conv(3, 8),
            r=conv(8, 5),
            c=conv(10, 2),
        ),
        note="one module, two inputs",
    ),
    odd(
        "works/recurrent_use",
        lambda: Net(
            lambda m, x: m.c(m.r(m.r(h := m.a(x)).tanh() + h).tanh() + h), a=lin(5, 8), r=lin(8, 8), c=lin(8, 3)
        ),
        features,
    ),
    odd(
        "works/checkpoint",
        lambda: Net(
            lambda m, x: m.c(checkpoint(m.b, m.a(x), use_reentrant=False).relu()),
            a=conv(3, 8),
            b=conv(8, 7),
            c=conv(7, 2),
        ),
    ),
    odd("works/straight_through", lambda: Net(lambda m, x: m.c(Sign.apply(m.a(x))), a=conv(3, 8), c=conv(8, 2))),
    odd("works/inplace_slice", lambda: Net(_inplace, a=conv(3, 8), b=conv(8, 2))),
    odd(
        "works/attention_separate",
        lambda: Net(_separate, i=lin(5, 10), q=lin(10, 12), k=lin(10, 12), v=lin(10, 15), o=lin(15, 10), c=lin(10, 2)),
        features,
    ),
    odd(
        "works/attention_unbind",
        lambda: Net(_unbind, i=lin(5, 10), qkv=lin(10, 36), o=lin(12, 10), c=lin(10, 2)),
        features,
    ),
    odd("works/attention_chunk", lambda: _chunked(False), features),
    odd("works/attention_split", lambda: _chunked(True), features),
    odd(
        "works/attention_grouped",
        lambda: Net(_grouped, i=lin(5, 10), q=lin(10, 24), k=lin(10, 8), v=lin(10, 8), o=lin(24, 10), c=lin(10, 2)),
        features,
    ),
    odd(
        "works/attention_module",
        lambda: Net(
            lambda m, x: m.c((h := m.i(x)) + m.m(h, h, h, need_weights=False)[0]),
            i=lin(5, 12),
            m=nn.MultiheadAttention(12, 3, batch_first=True),
            c=lin(12, 2),
        ),
        features,
    ),
]
