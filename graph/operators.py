"""Facts about operators that more than one analysis needs: names, arguments, and where layers have their weights."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from torch.fx import Node


@cache
def operator_name(target: Any) -> str:
    """Return an operator's name without overload and without the underscore of in-place forms.

    ``relu`` for ``aten.relu_.default``, ``__and__`` for ``aten.__and__.Tensor``. Operators of other libraries keep
    their namespace (``mylib::scale``), so that none is taken for an operator of ATen; a Python function has its name.
    """
    schema = getattr(target, "_schema", None)
    if schema is None:
        return getattr(target, "__name__", str(target))
    name = schema.name.removeprefix("aten::")
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def base_name(node: Node) -> str:
    """Return `operator_name` of what ``node`` calls, an empty string if it calls nothing."""
    return operator_name(node.target) if node.op == "call_function" else ""


def arg(node: Node, index: int, name: str, default: Any = None) -> Any:
    """Return an argument given by position or by name."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def set_arg(node: Node, index: int, name: str, value: Any) -> None:
    """Set an argument that was given by position or by name."""
    if len(node.args) > index:
        node.update_arg(index, value)
    else:
        node.update_kwarg(name, value)


class Layer(NamedTuple):
    """Where an operator has the weight that makes features of features, and what the weight's dimensions are.

    Attributes:
        weight: Position and name of the weight among the arguments.
        outputs: Dimension of the weight that the result's features come from.
        inputs: Dimension that meets the input's features (each group's, in a grouped convolution).
        bias: Position and name of the bias, None where the operator takes none.
        groups: Position of the argument ``groups``, None where the operator is no convolution.
    """

    weight: tuple[int, str] = (1, "weight")
    outputs: int = 0
    inputs: int = 1
    bias: tuple[int, str] | None = (2, "bias")
    groups: int | None = None


_CONVOLUTION = Layer(groups=6)
_TRANSPOSED = Layer(outputs=1, inputs=0, groups=6)
_GENERAL = "convolution", "_convolution", "convolution_overrideable"
# The weight of a product is [..., in, out], that of `linear` [out, in].
LAYERS: dict[str, Layer] = {
    "linear": Layer(),
    "matmul": Layer((1, "other"), -1, -2, None),
    "mm": Layer((1, "mat2"), -1, -2, None),
    "addmm": Layer((2, "mat2"), -1, -2, (0, "self")),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _CONVOLUTION),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _TRANSPOSED),
    **dict.fromkeys(_GENERAL, Layer(groups=8)),
}

# Operators that take a list of weights, ``[gates * out, in]`` each, and biases.
RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})


def layer_of(node: Node) -> Layer | None:
    """Return where ``node`` has its weight, if it is a linear layer, a convolution or a product."""
    name = base_name(node)
    layer = LAYERS.get(name)
    if layer is not None and name in _GENERAL and arg(node, 6, "transposed", False):
        return layer._replace(outputs=1, inputs=0)
    return layer


def weight_of(node: Node) -> Any:
    """Return the weight among the arguments of ``node``, None if it is no layer."""
    layer = layer_of(node)
    return None if layer is None else arg(node, *layer.weight)


def bias_of(node: Node) -> Any:
    """Return the bias among the arguments of ``node``, None if it has none."""
    layer = layer_of(node)
    return None if layer is None or layer.bias is None else arg(node, *layer.bias)


def is_convolution(node: Node) -> bool:
    """Whether ``node`` is a convolution, transposed or not."""
    layer = LAYERS.get(base_name(node))
    return layer is not None and layer.groups is not None


def is_transposed(node: Node) -> bool:
    """Whether ``node`` is a transposed convolution, whose weight is ``[in, out of a group, kernel...]``."""
    layer = layer_of(node)
    return layer is not None and layer.groups is not None and layer.outputs == 1


def groups_of(node: Node) -> Any:
    """Return the number of groups of a convolution; a `Node` where it is computed."""
    layer = layer_of(node)
    return 1 if layer is None or layer.groups is None else arg(node, layer.groups, "groups", 1)


def set_groups(node: Node, groups: int) -> None:
    """Set the number of groups of a convolution."""
    layer = layer_of(node)
    assert layer is not None and layer.groups is not None
    set_arg(node, layer.groups, "groups", groups)


__all__ = [
    "LAYERS",
    "RECURRENT",
    "Layer",
    "arg",
    "base_name",
    "bias_of",
    "groups_of",
    "is_convolution",
    "is_transposed",
    "layer_of",
    "operator_name",
    "set_arg",
    "set_groups",
    "weight_of",
]

# Operators that give their input itself where there is nothing to do, and whose schemas do not say so.
MAY_GIVE_INPUT = frozenset(
    ("type_as", "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "view_as")
)
# Operators that write into their arguments ``running_*`` if this argument says so, which their schemas do not say.
STATISTICS = {"batch_norm": (5, "training"), "instance_norm": (5, "use_input_stats")}
