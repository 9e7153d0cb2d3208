"""Operators that act index by index: operands broadcast, the result has their dims."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from .base import Analysis, AxesRule, Dims, Value, arg, out_sizes, sizes

DRAWN = "random numbers of this size are drawn"
COMPUTED = "its size is computed with"


def broadcast(an: Analysis, node: Node) -> Value:
    """Unify the dims of all tensor operands, right-aligned. Several results (``frexp``) have the same dims."""
    value = node.meta["val"]
    several = isinstance(value, (tuple, list))
    dims = an.broadcast([an.of(n) for n in node.all_input_nodes], sizes(value[0]) if several else sizes(value))
    return tuple(dims for _ in value) if several else dims


def same(an: Analysis, node: Node) -> Dims:
    """Return the dims of the first operand: copies, casts, dropout, zeros_like."""
    return an.of(node.args[0])


def prelu(an: Analysis, node: Node) -> Dims:
    """A slope per channel (dimension 1), or one for all."""
    x, slope = an.of(node.args[0]), an.of(node.args[1])
    if len(x) > 1 and slope and slope[0].size == x[1].size:
        an.unify(x[1], slope[0])
    return x


def copy_into(an: Analysis, node: Node) -> Dims:
    """``copy_``: the source broadcasts into the destination."""
    return an.broadcast([an.of(node.args[0]), an.of(node.args[1])], out_sizes(node))


def drawn(an: Analysis, node: Node) -> Dims:
    """Random numbers in the shape of the operands: another size draws others."""
    if not node.all_input_nodes:
        return an.fresh(node.meta["val"], DRAWN)
    dims = broadcast(an, node)
    for axis in dims:
        an.label(axis, DRAWN)
    return dims


def dropout(train: int) -> Callable[[Analysis, Node], Dims]:
    """Make the axes half of an operator that draws random numbers if argument number ``train`` is true."""

    def axes(an: Analysis, node: Node) -> Dims:
        training = arg(node, train, "train") or node.kwargs.get("training", False)
        return drawn(an, node) if training else same(an, node)

    return axes


def size_of(an: Analysis, node: Node) -> Value:
    """A size read as a number, which other operators compute with (heads times batch, divided by heads)."""
    x = an.of(node.args[0])
    dim = arg(node, 1, "dim")
    an.freeze_all(x if dim is None else [x[dim]], COMPUTED)
    return None


def layout_of(an: Analysis, node: Node) -> Value:
    """A stride or an offset: products of several sizes."""
    an.freeze_all(an.of(node.args[0]), COMPUTED)
    return None


def value_of(an: Analysis, node: Node) -> Value:
    """A number read from a tensor's values: every index matters."""
    an.freeze_all(an.of(arg(node, 0, "self")), "its values become a Python number")
    return None


_SAME = (
    "alias clone contiguous detach to _to_copy lift_fresh lift_fresh_copy type_as zeros_like ones_like full_like empty_like "
    "positive relu6 hardswish hardtanh requires_grad resolve_conj resolve_neg _conj data fill zero"
)
_DRAWN = "rand_like randn_like bernoulli normal uniform"
# Operators that torch does not tag as pointwise, or whose in-place form it does not.
_BROADCAST = (
    "where masked_fill square rsub add sub mul div true_divide floor_divide subtract multiply divide clamp clip clamp_min "
    "clamp_max softplus selu celu mish hardsigmoid log_sigmoid logaddexp isclose silu gelu fmod remainder __and__ __or__ "
    "__xor__ __lshift__ __rshift__ logical_and logical_or logical_not bitwise_and bitwise_or isnan isinf isfinite lerp "
    "float_power absolute negative arctan2 greater less greater_equal less_equal not_equal eq ne lt gt le ge maximum minimum "
    "nan_to_num xlogy special_expit expm1 log1p exp2 polar complex real imag threshold hardshrink softshrink "
    "_autocast_to_reduced_precision _autocast_to_full_precision logit fix abs copysign heaviside gcd lcm"
)

RULES: dict[str, AxesRule] = {
    **{name: AxesRule(broadcast) for name in _BROADCAST.split()},
    **{name: AxesRule(same) for name in _SAME.split()},
    **{name: AxesRule(drawn) for name in _DRAWN.split()},
    **{name: AxesRule(dropout(2)) for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")},
    "rrelu": AxesRule(dropout(3)),
    "prelu": AxesRule(prelu),
    "_prelu_kernel": AxesRule(broadcast),
    "copy": AxesRule(copy_into),
    "sym_size": AxesRule(size_of),
    "sym_numel": AxesRule(size_of),
    "sym_stride": AxesRule(layout_of),
    "sym_storage_offset": AxesRule(layout_of),
    "item": AxesRule(value_of),
    "_local_scalar_dense": AxesRule(value_of),
}

# Unary operators with f(0) = 0, whatever their other arguments: what is masked to zero stays zero behind them.
ZERO_PRESERVING = frozenset(
    "alias clone contiguous detach dropout feature_dropout to _to_copy lift_fresh lift_fresh_copy type_as zeros_like positive "
    "nan_to_num relu6 hardswish requires_grad resolve_conj resolve_neg _conj data zero rrelu relu leaky_relu elu silu gelu tanh "
    "sin sinh asin asinh atan atanh tan abs absolute neg negative sign square sqrt expm1 log1p erf mish selu celu hardshrink "
    "softshrink floor ceil round trunc fix prelu _prelu_kernel real imag view_as_complex view_as_real".split()
)
