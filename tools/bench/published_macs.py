"""Multiply-accumulates as the published tables of pruned networks count them.

Those tables come from a counter that adds up what the modules of a network do when they are called. So they hold more
than `graphwright.graph.cost` counts, and in attention something else:

- a convolution's bias, once for every output element; a linear layer's bias once, however many rows it has;
- two operations for every element of a norm with weights, one for every element of ReLU and GELU (SiLU is no part of the
  counter) and for every element that a pooling reads;
- nothing of what is no module: attention products, additions, interpolation;
- but for timm's attention, which has an entry of its own: scores and values, the scaling of the queries, one operation
  for every score's softmax, biases for every token, and an output projection of the width of the values *squared*, also
  where pruning has made its other side another width.

The published code of Diff-Pruning has 1x1 convolutions in its attention and counts 1.3 M more there, in the fourth digit.
Earlier releases of the counter know no layer norm; which release a table comes from is inferred from its figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch.fx import Node

from ...graph.cost import cost, example_shape
from ...graph.operators import arg, base_name, bias_of
from ...graph.program import Program

# Norms, and where their arguments have the weight.
NORMS = {"batch_norm": 1, "group_norm": 2, "layer_norm": 2}
ACTIVATIONS = frozenset({"gelu", "relu", "relu_", "hardtanh", "hardtanh_"})


def printed_macs(program: Program, timm_attention: bool = False, layer_norms: bool = True) -> int:
    """Return what the counter prints for a program at its example sizes.

    Args:
        program: With attention as ``scaled_dot_product_attention``.
        timm_attention: Whether its attention would be timm's module; else only its projections count.
        layer_norms: Whether layer norms count.
    """
    attentions = [n for n in program.nodes if _name(n) == "scaled_dot_product_attention"] if timm_attention else []
    projections = {_linear_before(n) for attention in attentions for n in _operands(attention)}
    total = cost(program).macs + sum(_attention(attention) for attention in attentions)
    for node in program.nodes:
        name = _name(node)
        if name and isinstance(bias_of(node), Node):
            once = name == "linear" and node not in projections
            total += _shape(node)[-1] if once else _elements(node)
        elif name in NORMS and (layer_norms or name != "layer_norm"):
            total += _elements(node) * (2 if isinstance(arg(node, NORMS[name], "weight"), Node) else 1)
        elif name in ACTIVATIONS:
            total += _elements(node)
        elif "pool" in name:
            total += _elements(node.args[0])
    return total


def _attention(node: Node) -> int:
    """Return what timm's attention counts beyond the multiply-accumulates and biases of its queries, keys and values."""
    queries, keys, values = (_shape(n) for n in _operands(node))
    tokens = math.prod(queries[:-1])  # of all heads
    products = tokens * keys[-2] * (queries[-1] + values[-1])
    softmax = tokens * keys[-2]
    scaling = _elements(node.args[0])
    width = queries[1] * values[-1]
    output = _linear_after(node)
    rows = _elements(output) // _shape(output)[-1]
    projection = rows * width * (width + 1)
    # Its multiply-accumulates are in `cost`, and the bias that other linear layers have is added to all of them.
    counted = _elements(output) * width + _shape(output)[-1]
    return products + softmax + scaling + projection - counted


def _operands(attention: Node) -> Iterator[Node]:
    return (n for n in attention.args[:3] if isinstance(n, Node))


def _linear_before(node: Node) -> Node:
    while _name(node) != "linear":
        node = node.all_input_nodes[0]
    return node


def _linear_after(node: Node) -> Node:
    while _name(node) != "linear":
        node = next(iter(node.users))
    return node


def _name(node: Node) -> str:
    return base_name(node) if node.op == "call_function" else ""


def _shape(node: Node) -> list[int]:
    return example_shape(node.meta["val"])


def _elements(node: object) -> int:
    assert isinstance(node, Node)
    return math.prod(_shape(node))
