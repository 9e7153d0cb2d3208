"""Normalisations. Per-channel ones are exact; those with statistics over an axis label it."""

from __future__ import annotations

from torch.fx import Node

from .base import Analysis, AxesRule, Dims, Resizer, Value, arg, set_arg

STATISTICS = "its statistics are taken over it"


def per_channel(an: Analysis, node: Node) -> Value:
    """Batch and instance norm: vectors beside dimension 1; statistics of the input run over the rest."""
    x = an.of(arg(node, 0, "input"))
    for vector in node.args[1:5]:
        for axis in an.of(vector):
            an.unify(x[1], axis)
    arguments = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    for name, dims in (("training", (x[0], *x[2:])), ("use_input_stats", x[2:])):
        if name in arguments and arg(node, arguments.index(name), name, False):
            for axis in dims:
                an.label(axis, STATISTICS)
    outputs = node.meta["val"]
    if not isinstance(outputs, (tuple, list)):
        return x
    # The native forms also return saved statistics.
    return (x, *(_vector(an, x, value) for value in outputs[1:]))


def _vector(an: Analysis, x: Dims, value: object) -> Value:
    dims = an.fresh(value)  # type: ignore[arg-type]
    if len(dims) == 1 and dims[0].size == x[1].size:
        an.unify(dims[0], x[1])
    return dims


def layer_norm(an: Analysis, node: Node) -> Value:
    """Layer and RMS norm over the trailing ``normalized_shape``."""
    x = an.of(arg(node, 0, "input"))
    rank = len(arg(node, 1, "normalized_shape"))
    for axis in x[-rank:]:
        an.label(axis, STATISTICS)
    for vector in (arg(node, 2, "weight"), arg(node, 3, "bias")):
        dims = an.of(vector)
        if dims:
            an.unify_all(x[-rank:], dims)
    outputs = node.meta["val"]
    if isinstance(outputs, (tuple, list)):
        # The native forms also return the statistics, of size 1 where they were taken.
        return (x, *((*x[:-rank], *(an.leaf(1) for _ in range(rank))) for _ in outputs[1:]))
    return x


def resize_layer_norm(rz: Resizer, node: Node) -> None:
    """``normalized_shape`` follows the trailing dims."""
    x = rz.of(arg(node, 0, "input"))
    rank = len(arg(node, 1, "normalized_shape"))
    if any(rz.changed(axis) for axis in x[-rank:]):
        set_arg(node, 1, "normalized_shape", [rz.size(axis) for axis in x[-rank:]])


def group_norm(an: Analysis, node: Node) -> Dims:
    """Statistics over channel groups and space; the number of groups stays, so channels stay divisible by it."""
    x = an.of(arg(node, 0, "input"))
    groups = arg(node, 1, "num_groups")
    if groups != x[1].size:
        an.label(x[1], STATISTICS)
    if type(x[1].size) is int:
        an.divisible(x[1], groups)
    elif groups > 1:
        an.freeze(x[1], "groups of a dynamic number of channels")
    if groups == x[1].size:
        an.freeze(x[1], "group norm with one channel per group: the number of groups is fixed")
    an.freeze_all(x[2:], "statistics over space")
    for vector in (arg(node, 2, "weight"), arg(node, 3, "bias")):
        for axis in an.of(vector):
            an.unify(x[1], axis)
    return x


def weight_norm(an: Analysis, node: Node) -> Dims:
    """``g * v / |v|`` with the norm over all dimensions but one, exact along that one; ``dim=-1`` means over all."""
    v, g = an.of(node.args[0]), an.of(node.args[1])
    dim = arg(node, 2, "dim", 0)
    dim = dim + len(v) if dim < -1 else dim
    for i, axis in enumerate(v):
        if i == dim:
            an.unify(axis, g[i if len(g) > 1 else 0])
        elif axis.size != 1:
            an.label(axis, "its norm is taken over it")
    return v


RULES: dict[str, AxesRule] = {
    "batch_norm": AxesRule(per_channel),
    "native_batch_norm": AxesRule(per_channel),
    "_native_batch_norm_legit": AxesRule(per_channel),
    "_native_batch_norm_legit_no_training": AxesRule(per_channel),
    "cudnn_batch_norm": AxesRule(per_channel),
    "instance_norm": AxesRule(per_channel),
    "layer_norm": AxesRule(layer_norm, resize_layer_norm),
    "native_layer_norm": AxesRule(layer_norm, resize_layer_norm),
    "rms_norm": AxesRule(layer_norm, resize_layer_norm),
    "_fused_rms_norm": AxesRule(layer_norm, resize_layer_norm),
    "group_norm": AxesRule(group_norm),
    "_weight_norm": AxesRule(weight_norm),
}
