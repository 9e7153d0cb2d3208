"""What a program costs: multiply-accumulates, parameters, activation bytes, per node and in all."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from .errors import module_path
from .operators import LAYERS, RECURRENT, arg, base_name, is_transposed, weight_of
from .program import Program, distinct


@dataclass(frozen=True)
class NodeCost:
    """The cost of one node at the example sizes.

    Attributes:
        node: FX node name.
        module: Fully qualified name of its module.
        target: Operator.
        macs: Multiply-accumulates.
        product: Whether the node multiplies activations with each other (attention), which some counters leave out.
        bytes: Bytes of its result.
    """

    node: str
    module: str
    target: str
    macs: int
    product: bool
    bytes: int


@dataclass(frozen=True)
class Cost:
    """The cost of a program at its example sizes.

    Attributes:
        macs: Multiply-accumulates of weight layers (linear, convolution, recurrent).
        product_macs: Multiply-accumulates of activations with activations (attention scores and values).
        parameters: Elements of all distinct parameters the graph reads.
        parameter_bytes: Their size.
        activation_bytes: Sum of the sizes of all results, views left out.
        nodes: The nodes that cost something.
    """

    macs: int
    product_macs: int
    parameters: int
    parameter_bytes: int
    activation_bytes: int
    nodes: tuple[NodeCost, ...]

    @property
    def total_macs(self) -> int:
        """Weight layers and attention products together."""
        return self.macs + self.product_macs


def cost(program: Program) -> Cost:
    """Count ``program`` at its example sizes. Works on the ``meta`` device: only shapes are read."""
    weights: set[Node] = set()
    found: list[NodeCost] = []
    for node in program.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and all(n in weights for n in node.all_input_nodes)):
            weights.add(node)
        if node.op != "call_function":
            continue
        count = _COUNTERS.get(base_name(node))
        macs = count(node) if count else 0
        size = 0 if _is_view(node) else _bytes(node.meta.get("val"))
        if macs or size:
            product = macs > 0 and not any(n in weights for n in _factors(node))
            found.append(NodeCost(node.name, module_path(node)[0], str(node.target), macs, product, size))
    return Cost(
        sum(n.macs for n in found if not n.product),
        sum(n.macs for n in found if n.product),
        parameter_count(program),
        sum(p.nbytes for p in distinct(program.parameters().values())),
        sum(n.bytes for n in found),
        tuple(found),
    )


def _factors(node: Node) -> list[Node]:
    """Return the operands that are multiplied: not a mask or a bias that is added, which may be constant."""
    name = base_name(node)
    if name == "scaled_dot_product_attention":
        chosen = node.args[:3]
    elif name in ("addmm", "baddbmm", "addbmm"):
        chosen = node.args[1:3]
    else:
        return node.all_input_nodes
    return [n for n in chosen if isinstance(n, Node)]


def example_shape(value: Tensor) -> list[int]:
    """Return a recorded shape with the example sizes in place of dynamic ones."""
    return [_example_size(size) for size in value.shape]


def _example_size(size: int | torch.SymInt) -> int:
    if not isinstance(size, torch.SymInt):
        return size
    return 1 if size.node.hint is None else int(size.node.hint)


def _shape(node: Any) -> list[int]:
    return example_shape(node.meta["val"])


def _bytes(value: Any) -> int:
    if isinstance(value, (tuple, list)):
        return sum(map(_bytes, value))
    return math.prod(example_shape(value)) * value.element_size() if isinstance(value, Tensor) else 0


def _is_view(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return True
    return any(r.alias_info is not None for r in schema.returns)


def _linear(node: Node) -> int:
    return math.prod(_shape(node)) * _shape(weight_of(node))[-1]


def _matmul(node: Node) -> int:
    return math.prod(_shape(node)) * _shape(node.args[0])[-1]


def _addmm(node: Node) -> int:
    return math.prod(_shape(node)) * _shape(node.args[1])[-1]


def _convolution(node: Node) -> int:
    """Every output (input, if transposed) element meets the weight's other dimensions."""
    weight = _shape(weight_of(node))
    return math.prod(_shape(arg(node, 0, "input") if is_transposed(node) else node)) * math.prod(weight[1:])


def _attention(node: Node) -> int:
    q, k, v = (_shape(n) for n in node.args[:3])
    return math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _einsum(node: Node) -> int:
    """Every combination of the letters is one product; an ellipsis stands for the dimensions that no letter names."""
    terms = str(node.args[0]).replace(" ", "").split("->")[0].split(",")
    letters: dict[str, int] = {}
    batch: tuple[int, ...] = ()
    for term, operand in zip(terms, node.args[1], strict=True):  # type: ignore[arg-type]
        shape = _shape(operand)
        before, dots, after = term.partition("...")
        unnamed = shape[len(before) : len(shape) - len(after)] if dots else []
        batch = torch.broadcast_shapes(batch, unnamed)
        named = shape[: len(before)] + shape[len(shape) - len(after) :] if dots else shape
        for letter, size in zip(before + after, named, strict=True):
            letters[letter] = max(letters.get(letter, 1), size)
    return math.prod(letters.values()) * math.prod(batch)


def _bilinear(node: Node) -> int:
    return math.prod(_shape(node)) * math.prod(_shape(node.args[2])[1:])


def _recurrent(node: Node) -> int:
    x = _shape(node.args[0])
    steps = math.prod(x[:-1])
    weights = node.args[2] if isinstance(node.args[2], (list, tuple)) else ()
    return steps * sum(math.prod(_shape(w)) for w in weights if len(_shape(w)) == 2)


_COUNTERS: dict[str, Callable[[Node], int]] = {
    "linear": _linear,
    **{name: _matmul for name in ("matmul", "mm", "bmm", "mv", "dot", "_grouped_mm")},
    "addmm": _addmm,
    "baddbmm": _addmm,
    **{name: _convolution for name, layer in LAYERS.items() if layer.groups is not None},
    "scaled_dot_product_attention": _attention,
    "einsum": _einsum,
    "bilinear": _bilinear,
    **{name: _recurrent for name in RECURRENT},
}


def parameter_count(of: Program | nn.Module) -> int:
    """Return the number of elements of the distinct parameters of a program or module; tied ones count once."""
    parameters = of.parameters().values() if isinstance(of, Program) else of.parameters()
    return sum(p.numel() for p in distinct(parameters))


__all__ = ["Cost", "NodeCost", "cost", "example_shape", "parameter_count"]
