"""Operators that act index by index: operands broadcast, the result has their dims."""

from __future__ import annotations

from torch.fx import Node

from .base import Analysis, AxesRule, Dims, Value, arg, out_sizes


def broadcast(an: Analysis, node: Node) -> Dims:
    """Unify the dims of all tensor operands, right-aligned."""
    return an.broadcast([an.of(n) for n in node.all_input_nodes], out_sizes(node))


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


def feature_dropout(an: Analysis, node: Node) -> Dims:
    """Dropout; while training it draws a mask, whose shape follows the input."""
    return same(an, node)


def masked_fill(an: Analysis, node: Node) -> Dims:
    """``masked_fill`` and relatives: every tensor operand broadcasts into the first."""
    return broadcast(an, node)


def no_tensor(an: Analysis, node: Node) -> Value:
    """A number read from a tensor's shape: nothing depends on indices."""
    return None


def value_of(an: Analysis, node: Node) -> Value:
    """A number read from a tensor's values: every index matters."""
    an.freeze_all(an.of(arg(node, 0, "self")), "its values become a Python number")
    return None


_SAME = (
    "alias clone contiguous detach dropout feature_dropout alpha_dropout to _to_copy lift_fresh lift_fresh_copy type_as "
    "zeros_like ones_like full_like empty_like rand_like randn_like positive nan_to_num relu6 hardswish hardtanh "
    "float double half bfloat16 int long bool requires_grad_ resolve_conj resolve_neg _conj data bernoulli "
    "fill zero normal uniform rrelu"
)
_BROADCAST = (
    "where masked_fill square rsub add sub mul div true_divide floor_divide subtract multiply divide clamp clip clamp_min "
    "clamp_max softplus selu celu mish hardsigmoid log_sigmoid logaddexp isclose silu gelu fmod remainder __and__ __or__ "
    "__xor__ __lshift__ __rshift__ logical_and logical_or logical_not bitwise_and bitwise_or isnan isinf isfinite lerp "
    "float_power absolute negative arctan2 greater less greater_equal less_equal not_equal eq ne lt gt le ge maximum minimum "
    "nan_to_num xlogy special_expit expm1 log1p exp2 polar complex real imag threshold hardshrink softshrink tanhshrink "
    "softsign _autocast_to_reduced_precision _autocast_to_full_precision logit fix swish_ glu_jvp prelu_ view_as_real_copy"
)

RULES: dict[str, AxesRule] = {
    **{name: AxesRule(broadcast) for name in _BROADCAST.split()},
    **{name: AxesRule(same) for name in _SAME.split()},
    "prelu": AxesRule(prelu),
    "_prelu_kernel": AxesRule(broadcast),
    "copy": AxesRule(copy_into),
    "sym_size": AxesRule(no_tensor),
    "sym_stride": AxesRule(no_tensor),
    "sym_numel": AxesRule(no_tensor),
    "sym_storage_offset": AxesRule(no_tensor),
    "item": AxesRule(value_of),
    "_local_scalar_dense": AxesRule(value_of),
}

# Unary operators with f(0) = 0: what is masked to zero stays zero behind them.
ZERO_PRESERVING = frozenset(
    (
        _SAME.replace("ones_like", "").replace("full_like", "")
        + " relu leaky_relu elu silu gelu tanh sin sinh asin asinh atan atanh tan abs absolute neg negative sign square sqrt "
        "pow float_power expm1 log1p erf mish selu celu hardswish softsign hardshrink softshrink tanhshrink floor ceil round "
        "trunc fix relu6 hardtanh prelu _prelu_kernel clamp_min real imag rrelu view_as_complex view_as_real"
    ).split()
)
