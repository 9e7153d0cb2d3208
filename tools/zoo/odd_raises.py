"""Odd cases at which a gradient-graph pruner raises: literal bounds, invisible uses, grouped and recurrent layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .entry import Case, Entry, case, tokens
from .odd_base import Net, buffer, conv, features, heads, lin, merge, odd, param, pictures, vectors
from .torch_cnn import C2f, Res2, Shuffle


def _around(block: nn.Module, cin: int, cout: int) -> nn.Module:
    """A block between two convolutions."""
    return Net(lambda m, x: m.c(m.b(m.a(x))), a=conv(3, cin), b=block, c=conv(cout, 2))


def _partial(m: Net, x: torch.Tensor) -> torch.Tensor:
    """FasterNet: convolve the first third of the channels, pass the others."""
    u, v = m.a(x).split([4, 8], 1)
    return m.c(torch.cat([m.p(u), v], 1))


def _halves(m: Net, x: torch.Tensor) -> torch.Tensor:
    """The same with slices at literal bounds."""
    h = m.a(x)
    return m.c(torch.cat([m.p(h[:, :4]), h[:, 4:]], 1))


def _cat_half(m: Net, x: torch.Tensor) -> torch.Tensor:
    """One half as it is, the other through a layer, concatenated."""
    u, v = m.a(x).chunk(2, 1)
    return m.c(torch.cat([u, m.b(v)], 1))


def _gate_half(m: Net, x: torch.Tensor) -> torch.Tensor:
    """One half gated by the other through a layer, the first half untouched."""
    u, v = m.a(x).chunk(2, 1)
    return m.c(u * m.b(v).sigmoid())


def _interleaved(m: Net, x: torch.Tensor) -> torch.Tensor:
    """Halves of two tensors, interleaved."""
    a1, a2 = m.a(x).chunk(2, 1)
    b1, b2 = m.b(x).chunk(2, 1)
    return m.c(torch.cat([a1, b1, a2, b2], 1))


def _two(dim: int) -> Callable[[Net, torch.Tensor], torch.Tensor]:
    """Chunk along a dimension that carries positions, the parts into different layers."""

    def run(m: Net, x: torch.Tensor) -> torch.Tensor:
        u, v = m.a(x).chunk(2, dim)
        return m.b1(u) + m.b2(v)

    return run


def _fused(kind: str) -> nn.Module:
    """Fused qkv taken apart in the ways that fail elsewhere."""

    def run(m: Net, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        t = m.qkv(x)
        if kind == "chunk":
            q, k, v = (heads(part, 3) for part in t.chunk(3, 2))
        else:
            t = t.reshape(b, n, 3, 3, 4).permute(2, 0, 3, 1, 4)
            q, k, v = t[0], t[1], t[2]
        return m.o(merge((q @ k.transpose(-2, -1) * 0.4).softmax(-1) @ v))

    return Net(run, qkv=lin(5, 36), o=lin(12, 3))


def _sliced_gate(m: Net, x: torch.Tensor) -> torch.Tensor:
    """SwiGLU by slices with literal bounds."""
    h = m.a(x)
    return m.c(F.silu(h[..., :7]) * h[..., 7:])


def _permuted(how: str) -> nn.Module:
    """Channels in another order, by indexing with a constant."""

    def run(m: Net, x: torch.Tensor) -> torch.Tensor:
        h = m.a(x)
        return m.c(h[:, m.perm] if how == "index" else torch.index_select(h, 1, m.perm))

    return Net(run, a=conv(3, 7), c=conv(7, 2), perm=torch.tensor([3, 0, 6, 2, 5, 1, 4]))


def _outer(m: Net, x: torch.Tensor) -> torch.Tensor:
    """Outer product of two vectors, flattened."""
    return m.c((m.a(x)[:, :, None] * m.b(x)[:, None, :]).flatten(1))


def _unrelated(m: Net, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolution, flatten, linear, beside a linear layer on a sequence."""
    h = m.a(x).relu()
    return m.c(h.flatten(1)), m.s(m.t(x.flatten(2).transpose(1, 2)).relu())


def _mixer(m: Net, x: torch.Tensor) -> torch.Tensor:
    """MLP-Mixer: a feed-forward over the positions, then one over the features."""
    h = m.i(x)
    h = h + m.t2(F.gelu(m.t1(m.n1(h).transpose(1, 2)))).transpose(1, 2)
    return m.c(h + m.f2(F.gelu(m.f1(m.n2(h)))))


def _positions(gate: bool) -> nn.Module:
    """A position embedding upstream of a feature concat or of a fused gate."""

    def run(m: Net, x: torch.Tensor) -> torch.Tensor:
        h = m.i(x) + m.p
        if gate:
            u, v = m.g(h).chunk(2, -1)
            return m.c(F.silu(u) * v)
        return m.c(torch.cat([h, m.b(h)], -1))

    return Net(
        run,
        i=lin(5, 6),
        p=param(1, 7, 6),
        g=lin(6, 14) if gate else nn.Identity(),
        b=nn.Identity() if gate else lin(6, 8),
        c=lin(7 if gate else 14, 3),
    )


def _foreign(linear: bool) -> nn.Module:
    """A functional call on another module's weight; that module itself is not called."""
    if linear:
        return Net(
            lambda m, x: m.c(F.linear(m.a(x), m.b.weight, m.b.bias).relu()), a=lin(5, 6), b=lin(6, 7), c=lin(7, 3)
        )
    return Net(
        lambda m, x: m.c(F.conv2d(m.a(x), m.b.weight, m.b.bias).relu()),
        a=conv(3, 6),
        b=nn.Conv2d(6, 7, 3),
        c=conv(7, 2),
    )


class Standardised(nn.Conv2d):
    """A convolution with standardised weights and a gain, as in norm-free networks."""

    def __init__(self, cin: int, cout: int) -> None:
        """3x3."""
        super().__init__(cin, cout, 3, padding=1)
        self.gain = nn.Parameter(torch.ones(cout, 1, 1, 1))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Standardise over everything but the output channel."""
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        var = self.weight.var((1, 2, 3), keepdim=True, unbiased=False)
        return F.conv2d(input, (self.weight - mean) * torch.rsqrt(var + 1e-4) * self.gain, self.bias, padding=1)


def _reparametrised(how: str) -> Case:
    """A convolution whose weight is computed by a hook or a parametrization, made after the initialisation."""
    wrap = {
        "weight_norm_old": nn.utils.weight_norm,
        "spectral_norm_old": nn.utils.spectral_norm,
        "weight_norm": nn.utils.parametrizations.weight_norm,
        "spectral_norm": nn.utils.parametrizations.spectral_norm,
    }[how]
    base = case(Net(lambda m, x: m.c(m.b(m.a(x)).relu()), a=conv(3, 6), b=conv(6, 7), c=conv(7, 2)), pictures)
    torch.manual_seed(3)  # spectral norm draws its start vectors
    base.model.b = wrap(base.model.b)
    return case(base.model, pictures, init=False)


def _frozen() -> nn.Module:
    """A stem that takes no gradients."""
    net = Net(lambda m, x: m.c(m.b(m.a(x).relu()).relu()), a=conv(3, 6), b=conv(6, 7), c=conv(7, 2))
    net.a.requires_grad_(False)
    return net


def _no_grad(m: Net, x: torch.Tensor) -> torch.Tensor:
    """A segment without gradients."""
    with torch.no_grad():
        h = m.a(x).relu()
    return m.c(m.b(h).relu())


def _recurrent(kind: str, **more: object) -> nn.Module:
    """Linear, recurrent layer, linear."""
    width = 14 if more.get("bidirectional") else 7
    return Net(
        lambda m, x: m.c(m.r(m.a(x))[0]),
        a=lin(5, 6),
        r=getattr(nn, kind)(6, 7, batch_first=True, **more),
        c=lin(width, 3),
    )


def _cache() -> Case:
    """A language model that returns its key/value cache, as it does by default."""
    from .transformers_models import VOCAB, llama

    built = llama(2, 4)()
    built.model.__dict__["config"].use_cache = True

    class Cached(nn.Module):
        """Logits and the cache as a flat list of tensors."""

        def __init__(self, model: nn.Module) -> None:
            """Wrap."""
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
            """Token indices to logits, keys and values of every layer."""
            out = self.model(input_ids=ids, use_cache=True)
            layers = out.past_key_values.layers
            return out.logits, [part for layer in layers for part in (layer.keys, layer.values)]

    return case(Cached(built.model), lambda b: tokens(b, 9, VOCAB), init=False)


ENTRIES: list[Entry] = [
    odd("raises/c2f", lambda: _around(C2f(6, 5, 9), 6, 9)),
    odd("raises/res2net", lambda: _around(Res2(6, 5, 6), 6, 6)),
    odd("raises/shufflenet_unit", lambda: _around(Shuffle(10, 5, 1), 10, 10)),
    odd("raises/partial_conv_split", lambda: Net(_partial, a=conv(3, 12), p=conv(4, 4), c=conv(12, 2))),
    odd("raises/partial_conv_slice", lambda: Net(_halves, a=conv(3, 12), p=conv(4, 4), c=conv(12, 2))),
    odd("raises/cat_half_conv", lambda: Net(_cat_half, a=conv(3, 12), b=conv(6, 5), c=conv(11, 2))),
    odd("raises/gate_half_conv", lambda: Net(_gate_half, a=conv(3, 12), b=conv(6, 6), c=conv(6, 2))),
    odd("raises/interleaved_chunks", lambda: Net(_interleaved, a=conv(3, 12), b=conv(3, 8), c=conv(20, 2))),
    odd(
        "raises/cat_last_unequal",
        lambda: Net(lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 2)), a=lin(5, 6), b=lin(5, 9), c=lin(15, 3)),
        features,
    ),
    odd(
        "raises/token_chunk",
        lambda: Net(_two(1), a=lin(5, 6), b1=lin(6, 3), b2=lin(6, 3)),
        lambda b: features(b)[:, :6],
    ),
    odd(
        "raises/token_chunk_negative",
        lambda: Net(_two(-2), a=lin(5, 6), b1=lin(6, 3), b2=lin(6, 3)),
        lambda b: features(b)[:, :6],
    ),
    odd("raises/spatial_chunk_negative", lambda: Net(_two(-1), a=conv(3, 6), b1=conv(6, 2), b2=conv(6, 2))),
    odd("raises/feature_chunk_positive", lambda: Net(_two(2), a=lin(5, 12), b1=lin(6, 3), b2=lin(6, 3)), features),
    odd("raises/fused_qkv_chunk", lambda: _fused("chunk"), features),
    odd("raises/fused_qkv_index", lambda: _fused("index"), features),
    odd("raises/glu", lambda: Net(lambda m, x: m.c(F.glu(m.a(x), -1)), a=lin(5, 14), c=lin(7, 3)), features),
    odd("raises/glu_channels", lambda: Net(lambda m, x: m.c(F.glu(m.a(x), 1)), a=conv(3, 14), c=conv(7, 2))),
    odd("raises/swiglu_slices", lambda: Net(_sliced_gate, a=lin(5, 14), c=lin(7, 3)), features),
    odd("raises/strided_slice", lambda: Net(lambda m, x: m.c(m.a(x)[:, ::2]), a=conv(3, 10), c=conv(5, 2))),
    odd(
        "raises/strided_slices_both",
        lambda: Net(
            lambda m, x: m.c((h := m.a(x))[:, ::2]) + m.d(h[:, 1::2]), a=conv(3, 10), c=conv(5, 2), d=conv(5, 2)
        ),
    ),
    odd("raises/permutation_index", lambda: _permuted("index")),
    odd("raises/index_select", lambda: _permuted("select")),
    odd("raises/pixel_shuffle", lambda: Net(lambda m, x: m.c(F.pixel_shuffle(m.a(x), 2)), a=conv(3, 20), c=conv(5, 2))),
    odd(
        "raises/pixel_unshuffle",
        lambda: Net(lambda m, x: m.c(F.pixel_unshuffle(m.a(x), 2)), a=conv(3, 5), c=conv(20, 2)),
    ),
    odd("raises/repeat", lambda: Net(lambda m, x: m.c(m.a(x).repeat(1, 2, 1, 1)), a=conv(3, 5), c=conv(10, 2))),
    odd(
        "raises/repeat_interleave",
        lambda: Net(lambda m, x: m.c(m.a(x).repeat_interleave(2, 1)), a=conv(3, 5), c=conv(10, 2)),
    ),
    odd(
        "raises/unfold",
        lambda: Net(lambda m, x: m.c(F.unfold(m.a(x), 3, padding=1).transpose(1, 2)), a=conv(3, 5), c=lin(45, 3)),
    ),
    odd("raises/outer_product", lambda: Net(_outer, a=lin(5, 4), b=lin(5, 6), c=lin(24, 3)), vectors),
    odd(
        "raises/bilinear",
        lambda: Net(
            lambda m, x: m.c(m.n(m.a(x), m.b(x)).relu()), a=lin(5, 4), b=lin(5, 6), n=nn.Bilinear(4, 6, 7), c=lin(7, 3)
        ),
        vectors,
    ),
    odd(
        "raises/flatten_beside_sequence",
        lambda: Net(_unrelated, a=conv(3, 5, stride=2), c=lin(80, 3), t=lin(3, 6), s=lin(6, 2)),
    ),
    odd("raises/flatten_tokens", lambda: Net(lambda m, x: m.c(m.a(x).flatten(1)), a=lin(5, 6), c=lin(42, 3)), features),
    odd(
        "raises/linear_view_literal",
        lambda: Net(lambda m, x: m.c(m.a(x).view(-1, 6, 2, 2)), a=lin(5, 24), c=conv(6, 2)),
        vectors,
    ),
    odd(
        "raises/unflatten_literal",
        lambda: Net(lambda m, x: m.c(m.a(x).unflatten(1, (6, 2, 2))), a=lin(5, 24), c=conv(6, 2)),
        vectors,
    ),
    odd(
        "raises/unflatten_features",
        lambda: Net(lambda m, x: m.c(m.a(x).unflatten(-1, (4, 3)).amax(-1)), a=lin(5, 12), c=lin(4, 3)),
        features,
        note="maximum over one factor (maxout)",
    ),
    odd(
        "raises/mixer",
        lambda: Net(
            _mixer,
            i=lin(5, 6),
            n1=nn.LayerNorm(6),
            t1=lin(7, 9),
            t2=lin(9, 7),
            n2=nn.LayerNorm(6),
            f1=lin(6, 11),
            f2=lin(11, 6),
            c=lin(6, 3),
        ),
        features,
    ),
    odd("raises/position_then_concat", lambda: _positions(False), features),
    odd("raises/position_then_gate", lambda: _positions(True), features),
    odd(
        "raises/matmul_parameter",
        lambda: Net(lambda m, x: m.c((m.a(x) @ m.w).relu()), a=lin(5, 6), w=param(6, 7), c=lin(7, 3)),
        features,
    ),
    odd(
        "raises/einsum_parameter",
        lambda: Net(
            lambda m, x: m.c(torch.einsum("bnc,dc->bnd", m.a(x), m.w).relu()), a=lin(5, 6), w=param(7, 6), c=lin(7, 3)
        ),
        features,
    ),
    odd(
        "raises/einsum_heads",
        lambda: Net(
            lambda m, x: m.c(torch.einsum("bnc,chd->bnhd", m.a(x), m.w).relu().flatten(2)),
            a=lin(5, 6),
            w=param(6, 3, 4),
            c=lin(12, 3),
        ),
        features,
        note="a weight with heads of its own",
    ),
    odd("raises/foreign_linear", lambda: _foreign(True), features),
    odd("raises/foreign_conv", lambda: _foreign(False)),
    odd(
        "raises/learned_map",
        lambda: Net(lambda m, x: m.c((m.a(x) + m.p).relu()), a=conv(3, 8), p=param(8, 8, 8), c=conv(8, 2)),
        note="channels, height and width are all 8",
    ),
    odd(
        "raises/layer_norm_map",
        lambda: Net(lambda m, x: m.c(m.n(m.a(x))), a=conv(3, 5), n=nn.LayerNorm([5, 8, 8]), c=conv(5, 2)),
    ),
    odd(
        "raises/rms_norm",
        lambda: Net(lambda m, x: m.c(m.n(m.a(x))), a=lin(5, 8), n=nn.RMSNorm(8), c=lin(8, 3)),
        features,
    ),
    odd(
        "raises/parameter_literal_shape",
        lambda: Net(lambda m, x: m.c(m.a(x) * m.p.view(1, 8, 1, 1)), a=conv(3, 8), p=param(8), c=conv(8, 2)),
    ),
    odd(
        "raises/buffer_literal_shape",
        lambda: Net(lambda m, x: m.c(m.a(x) * m.p.view(1, 8, 1, 1)), a=conv(3, 8), p=buffer(8), c=conv(8, 2)),
    ),
    odd(
        "raises/buffer_per_channel",
        lambda: Net(lambda m, x: m.c(m.a(x) - m.p), a=conv(3, 8), p=buffer(1, 8, 1, 1), c=conv(8, 2)),
    ),
    odd(
        "raises/instance_norm_tracked",
        lambda: Net(
            lambda m, x: m.c(m.n(m.a(x))),
            a=conv(3, 8),
            n=nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
            c=conv(8, 2),
        ),
    ),
    odd(
        "raises/standardised_weights",
        lambda: Net(lambda m, x: m.c(m.b(m.a(x)).relu()), a=Standardised(3, 8), b=Standardised(8, 7), c=conv(7, 2)),
        note="the standardisation runs over the input channels",
    ),
    odd(
        "raises/depthwise_multiplier",
        lambda: Net(lambda m, x: m.c(m.d(m.a(x)).relu()), a=conv(3, 6), d=conv(6, 12, groups=6), c=conv(12, 2)),
    ),
    odd(
        "raises/depthwise_shrinking",
        lambda: Net(lambda m, x: m.c(m.d(m.a(x)).relu()), a=conv(3, 12), d=conv(12, 6, groups=6), c=conv(6, 2)),
        note="groups = out, not in",
    ),
    odd(
        "raises/transposed_groups",
        lambda: Net(
            lambda m, x: m.c(m.d(m.a(x)).relu()), a=conv(3, 8), d=nn.ConvTranspose2d(8, 6, 2, 2, groups=2), c=conv(6, 2)
        ),
    ),
    odd(
        "raises/group_norm_then_groups",
        lambda: Net(
            lambda m, x: m.c(m.g(m.n(m.a(x))).relu()),
            a=conv(3, 24),
            n=nn.GroupNorm(4, 24),
            g=conv(24, 12, groups=6),
            c=conv(12, 2),
        ),
        note="blocks of 6 and of 4 channels",
    ),
    *[
        odd(f"raises/{how}", lambda how=how: _reparametrised(how))
        for how in ("weight_norm_old", "weight_norm", "spectral_norm_old", "spectral_norm")
    ],
    odd("raises/frozen_stem", _frozen),
    odd(
        "raises/detach",
        lambda: Net(lambda m, x: m.c(m.b(m.a(x).relu().detach()).relu()), a=conv(3, 6), b=conv(6, 7), c=conv(7, 2)),
    ),
    odd("raises/no_grad", lambda: Net(_no_grad, a=conv(3, 6), b=conv(6, 7), c=conv(7, 2))),
    odd(
        "raises/checkpoint_reentrant",
        lambda: Net(
            lambda m, x: m.c(checkpoint(m.b, m.a(x), use_reentrant=True).relu()),
            a=conv(3, 8),
            b=conv(8, 7),
            c=conv(7, 2),
        ),
    ),
    odd(
        "raises/attention_kdim",
        lambda: Net(
            lambda m, x: m.c(m.m(m.i(x), m.k(x), m.v(x), need_weights=False)[0]),
            i=lin(5, 12),
            k=lin(5, 9),
            v=lin(5, 10),
            m=nn.MultiheadAttention(12, 3, batch_first=True, kdim=9, vdim=10),
            c=lin(12, 2),
        ),
        features,
    ),
    *[
        odd(f"raises/{kind.lower()}{suffix}", lambda kind=kind, more=more: _recurrent(kind, **more), features)
        for kind in ("LSTM", "GRU", "RNN")
        for suffix, more in (("", {}), ("_bidirectional", {"bidirectional": True}))
    ],
    odd("raises/use_cache", _cache, requires=("transformers",), note="the cache is an output, its sizes are frozen"),
]
