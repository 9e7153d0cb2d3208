"""Scaled dot-product attention and softmax."""

from __future__ import annotations

import math

from torch.fx import Node

from .base import Analysis, AxesRule, Dims, Resizer, arg, out_sizes


def attention(an: Analysis, node: Node) -> Dims:
    """``q[..., L, E] k[..., S, E] v[..., S, Ev] -> [..., L, Ev]``. Widths of queries and values are separate axes."""
    q, k, v = (an.of(n) for n in node.args[:3])
    lead = out_sizes(node)[:-2]
    if arg(node, 7, "enable_gqa", False):
        repeats = an.leaf(q[-3].size // k[-3].size)
        an.unify(q[-3], an.product([k[-3], repeats]))
        an.role(repeats, "head group")
        an.unify(k[-3], v[-3])
        an.broadcast([k[:-3], v[:-3]], lead[:-1])
        batch = an.broadcast([q[:-2], (*k[:-3], an.leaf(1))], lead)
    else:
        batch = an.broadcast([q[:-2], k[:-2], v[:-2]], lead)
    an.unify(q[-1], k[-1])
    an.unify(k[-2], v[-2])
    an.freeze(k[-2], "softmax over it")
    causal = bool(arg(node, 5, "is_causal", False))
    if causal:
        an.freeze(q[-2], "positions of a causal mask")
    mask = an.of(arg(node, 3, "attn_mask"))
    if mask:
        an.broadcast([(*batch, q[-2], k[-2]), mask], (*lead, q[-2].size, k[-2].size))
    for axis in (*batch, *k[:-2]):
        an.role(axis, "head")
    an.role(q[-1], "head dim")
    an.role(v[-1], "value dim")
    an.sum_over(q[-1], (node.args[0], -1), (node.args[1], -1))
    return (*batch, q[-2], v[-1])


def resize_attention(rz: Resizer, node: Node) -> None:
    """The scale stays that of the original head dimension: dropping a zero dimension must change nothing."""
    width = rz.of(node.args[0])[-1]
    if rz.changed(width) and node.kwargs.get("scale") is None:
        node.update_kwarg("scale", 1 / math.sqrt(int(width.size)))


def softmax(an: Analysis, node: Node) -> Dims:
    """A softmax over an axis spreads every index over all others."""
    x = an.of(node.args[0])
    axis = x[arg(node, 1, "dim") % len(x)]
    an.softmaxes.append(axis)
    an.freeze(axis, "softmax over it")
    return x


RULES: dict[str, AxesRule] = {
    "scaled_dot_product_attention": AxesRule(attention, resize_attention),
    "softmax": AxesRule(softmax),
    "_softmax": AxesRule(softmax),
    "log_softmax": AxesRule(softmax),
    "_log_softmax": AxesRule(softmax),
    "_safe_softmax": AxesRule(softmax),
}
