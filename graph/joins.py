"""Where streams meet again: skip connections of a U-shaped network, and residual branches.

Both are found from the graph alone. A *heavy* node is one that multiplies and accumulates (convolution, linear layer,
attention); sets of ancestors are bitsets of one bit a heavy node, or a node, so the search takes nodes times bits / 64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.fx import Node

from .cost import cost
from .errors import module_path
from .operators import base_name
from .program import Program

CONCATENATIONS = frozenset({"cat", "concat", "concatenate"})
ATTENTIONS = frozenset({"scaled_dot_product_attention", "softmax", "_softmax", "_safe_softmax"})
# What may stand between a branch and the addition that ends it: the gate, a rescaling, dropout, a cast.
POINTWISE = frozenset({"mul", "div", "dropout", "to", "_to_copy", "type_as", "neg", "clone", "contiguous"})


@dataclass(frozen=True)
class SkipJoin:
    """A concatenation of a decoder's main path with a skip connection.

    Attributes:
        branch: Number of the skip connection, from the shallowest (that of the output) on.
        node: The concatenation.
        main: Its operand that comes from the deeper layers.
        skip: Its other operand.
        module: Fully qualified name of the module that joins them, for reports.
    """

    branch: int
    node: Node
    main: Node
    skip: Node
    module: str


@dataclass(frozen=True)
class ResidualJoin:
    """An addition of a stream and a branch that was computed from it.

    Attributes:
        node: The addition.
        stream: Its operand that the branch starts from.
        branch: The branch's last node before what depends on other inputs alone scales it (a gate): the part that
            can be kept from an earlier evaluation while the gate is new.
        kind: ``attention`` if a softmax or an attention lies in the branch, else ``mlp``.
        module: Fully qualified name of the module that computed the branch, for reports.
    """

    node: Node
    stream: Node
    branch: Node
    kind: str
    module: str


def skip_joins(program: Program) -> tuple[SkipJoin, ...]:
    """Return the skip connections, the shallowest first.

    A concatenation of two joins a skip connection if the heavy ancestors of the one operand are some of those of the
    other, and not all of them: what the main path computes beyond the skip is what a reuse step leaves out. That the
    skip is itself an ancestor of the main path is not asked for: residuals of a ControlNet are added to it.

    Args:
        program: Any program; on the ``meta`` device too.
    """
    heavy = _heavy_ancestors(program)
    found = []
    for node in program.nodes:
        operands = node.args[0] if base_name(node) in CONCATENATIONS else ()
        if not isinstance(operands, (list, tuple)) or len(operands) != 2:
            continue
        first, second = operands
        if not isinstance(first, Node) or not isinstance(second, Node):
            continue
        for main, skip in ((first, second), (second, first)):
            beyond = heavy[main] & ~heavy[skip]
            if heavy[skip] and not heavy[skip] & ~heavy[main] and beyond:
                found.append((node, main, skip))
    return tuple(
        SkipJoin(i, node, main, skip, module_path(node)[0]) for i, (node, main, skip) in enumerate(reversed(found))
    )


def residual_joins(program: Program) -> tuple[ResidualJoin, ...]:
    """Return the residual branches that hold heavy nodes, in graph order; of nested ones the innermost.

    Args:
        program: Any program; on the ``meta`` device too.
    """
    heavy = _heavy(program)
    order = {node: i for i, node in enumerate(program.nodes)}
    above = _ancestors(program, lambda node: 1 << order[node])
    nodes = list(order)
    found = []
    for node in nodes:
        ends = _ends(node, above, order)
        if ends is None:
            continue
        stream, branch = ends
        region = _between(stream, branch, above, order, nodes)
        if any(n in heavy for n in region):
            kind = "attention" if any(base_name(n) in ATTENTIONS for n in region) else "mlp"
            found.append((ResidualJoin(node, stream, branch, kind, module_path(branch)[0]), region))
    joins = {join.node for join, _ in found}
    return tuple(join for join, region in found if not joins & region)


def _heavy(program: Program) -> set[Node]:
    names = {n.node for n in cost(program).nodes if n.macs}
    return {node for node in program.nodes if node.name in names}


def _heavy_ancestors(program: Program) -> dict[Node, int]:
    number = {node: i for i, node in enumerate(_heavy(program))}
    return _ancestors(program, lambda node: 1 << number[node] if node in number else 0)


def _ancestors(program: Program, own: Callable[[Node], int]) -> dict[Node, int]:
    """Return for every node the union of ``own`` over itself and its ancestors."""
    out: dict[Node, int] = {}
    for node in program.nodes:
        bits = own(node)
        for n in node.all_input_nodes:
            bits |= out[n]
        out[node] = bits
    return out


def _ends(node: Node, above: dict[Node, int], order: dict[Node, int]) -> tuple[Node, Node] | None:
    """Return stream and branch of an addition of two activations of one shape, of which one comes from the other."""
    if base_name(node) != "add" or len(node.args) != 2 or not all(isinstance(n, Node) for n in node.args):
        return None
    a, b = node.args
    assert isinstance(a, Node) and isinstance(b, Node)
    if a is b or _shape(a) is None or _shape(a) != _shape(b):
        return None
    if above[b] >> order[a] & 1:
        stream, branch = a, b
    elif above[a] >> order[b] & 1:
        stream, branch = b, a
    else:
        return None
    return stream, _peeled(branch, stream, above, order)


def _peeled(branch: Node, stream: Node, above: dict[Node, int], order: dict[Node, int]) -> Node:
    """Walk up from ``branch`` through pointwise operators with one operand that depends on ``stream``."""
    while base_name(branch) in POINTWISE:
        dependent = [n for n in branch.all_input_nodes if above[n] >> order[stream] & 1]
        if len(dependent) != 1 or dependent[0] is stream:
            break
        branch = dependent[0]
    return branch


def _between(
    stream: Node, branch: Node, above: dict[Node, int], order: dict[Node, int], nodes: list[Node]
) -> set[Node]:
    """Return the nodes on the paths from ``stream`` to ``branch``, with ``branch`` and without ``stream``."""
    mark, within = order[stream], above[branch]
    found = nodes[mark + 1 : order[branch] + 1]
    return {n for n in found if within >> order[n] & 1 and above[n] >> mark & 1}


def _shape(node: Node) -> tuple[object, ...] | None:
    value = node.meta.get("val")
    return tuple(map(str, value.shape)) if isinstance(value, Tensor) else None
