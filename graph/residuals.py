"""Residual branches: what is added to a stream after it was computed from it, found from the graph alone.

A *heavy* node is one that multiplies and accumulates. Sets of ancestors are bitsets of one bit a node, so the search
takes nodes times nodes / 64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.fx import Node

from .cost import cost, example_shape
from .dataflow import dataflow
from .errors import module_path
from .operators import base_name
from .program import Program

SUMS = frozenset({"add", "sub", "lerp", "addcmul"})
# What may stand between a branch or a stream and the addition: the gate, a rescaling, dropout, a cast.
POINTWISE = frozenset({"mul", "div", "dropout", "to", "_to_copy", "type_as", "neg", "clone", "contiguous"})
# What only arranges elements anew. A gate may stand behind it.
VIEWS = frozenset(
    {"view", "_unsafe_view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "permute", "transpose"}
)
# Products of activations with each other are what tells attention, linear attention too, from other layers.
PRODUCTS = frozenset({"scaled_dot_product_attention", "matmul", "mm", "bmm", "baddbmm", "einsum"})


@dataclass(frozen=True)
class ResidualJoin:
    """An addition of a stream and a branch that was computed from it.

    Attributes:
        node: The addition.
        stream: What the branch starts from: an operand of the addition, or what that was summed up, scaled or cast
            from.
        branch: The branch's last node before what depends on other inputs alone scales it (a gate): the part that
            can be kept from an earlier evaluation while the gate is new.
        kind: ``attention`` if activations are multiplied with each other in the branch, else ``mlp``.
        module: Fully qualified name of the module that computed the branch, for reports.
        layers: The heavy nodes on the ways from the stream to the branch.
    """

    node: Node
    stream: Node
    branch: Node
    kind: str
    module: str
    layers: frozenset[Node]


@dataclass(frozen=True)
class _Found:
    node: Node
    stream: Node
    branch: Node
    region: frozenset[Node]


def residual_joins(program: Program) -> tuple[ResidualJoin, ...]:
    """Return the residual branches that hold heavy nodes, in graph order; of nested ones the innermost.

    A branch that goes around another one, from the same stream, is no wrapper of it: parallel attention and
    feed-forward, or a feed-forward that reads the normalised sum while the stream itself goes on.

    Args:
        program: Any program; on the ``meta`` device too.
    """
    return _Search(program).joins()


class _Search:
    def __init__(self, program: Program) -> None:
        self.flow = dataflow(program)
        self.nodes = list(self.flow.order)
        self.above = self.flow.ancestors(lambda node: 1 << self.flow.order[node])
        macs = {n.node: n.product for n in cost(program).nodes if n.macs}
        self.heavy = {node for node in self.nodes if node.name in macs}
        self.products = {n for n in self.heavy if macs[n.name] and base_name(n) in PRODUCTS}

    def joins(self) -> tuple[ResidualJoin, ...]:
        found: dict[Node, _Found] = {}  # by branch: one that two streams share is kept once
        for node in self.nodes:
            for join in self._at(node):
                found.setdefault(join.branch, join)
        kept = []
        for join in found.values():
            inner = [other for other in found.values() if other is not join and other.node in join.region]
            own = self.heavy & join.region - frozenset().union(*(other.region for other in inner))
            if own and not any(other.stream in join.region for other in inner):
                kind = "attention" if own & self.products else "mlp"
                module, layers = module_path(join.branch)[0], self.heavy & join.region
                kept.append(ResidualJoin(join.node, join.stream, join.branch, kind, module, frozenset(layers)))
        return tuple(kept)

    def _at(self, node: Node) -> Iterator[_Found]:
        """Give the branches that end in an addition; attention and feed-forward that are summed up before it are two."""
        ends = self._ends(node)
        if ends is None:
            return
        stream, branch = ends
        for part in self._parts(stream, self._peeled(branch, stream)):
            region = frozenset(self._between(stream, part))
            if region & self.heavy:
                yield _Found(node, stream, part, region)

    def _ends(self, node: Node) -> tuple[Node, Node] | None:
        """Return stream and branch of a sum of two activations of one shape, of which one comes from the other."""
        operands = self._operands(node)
        if operands is None:
            return None
        a, b = operands
        forward, backward = self._stream(a, b), self._stream(b, a)
        if (forward is None) == (backward is None):
            return None
        return (forward, b) if forward is not None else (backward, a)  # type: ignore[return-value] (one is not None)

    def _operands(self, node: Node) -> tuple[Node, Node] | None:
        name = base_name(node)
        if name not in SUMS or len(node.args) < 2:
            return None
        a, b = node.args[:2]
        if name == "addcmul":  # the gate is the factor that does not come from the stream
            dependent = [
                n for n in node.all_input_nodes if n is not a and isinstance(a, Node) and self._comes_from(n, a)
            ]
            b = dependent[0] if len(dependent) == 1 else None
        if not isinstance(a, Node) or not isinstance(b, Node) or a is b:
            return None
        return (a, b) if _shape(a) is not None and _shape(a) == _shape(b) else None

    def _stream(self, operand: Node, other: Node) -> Node | None:
        """Return the latest node that ``operand`` was summed up, scaled or cast from and that ``other`` comes from."""
        found, work = None, [operand]
        seen: set[Node] = set()
        while work:
            node = work.pop()
            if node in seen or _shape(node) != _shape(operand):
                continue
            seen.add(node)
            if self._comes_from(other, node):
                found = node if found is None or self.flow.order[node] > self.flow.order[found] else found
            elif base_name(node) in POINTWISE | SUMS:
                work.extend(node.all_input_nodes)
        return found

    def _peeled(self, branch: Node, stream: Node) -> Node:
        """Walk up from ``branch`` through pointwise operators with one operand that depends on ``stream``.

        Through views only to a gate: without one, what they give is as good.
        """
        at, viewed = branch, False
        while base_name(at) in POINTWISE | VIEWS:
            dependent = [n for n in at.all_input_nodes if self._comes_from(n, stream)]
            if len(dependent) != 1 or dependent[0] is stream:
                break
            gates = len(at.all_input_nodes) > 1
            viewed |= base_name(at) in VIEWS
            at, passed = dependent[0], base_name(at) in POINTWISE and (gates or not viewed)
            if passed:
                branch, viewed = at, False
        return branch

    def _parts(self, stream: Node, branch: Node) -> list[Node]:
        """Return attention and feed-forward of a branch that is their sum, else the branch."""
        operands = self._operands(branch) if base_name(branch) == "add" else None
        if operands is None or any(self._comes_from(*pair) for pair in (operands, operands[::-1])):
            return [branch]
        if not all(self._comes_from(n, stream) for n in operands):
            return [branch]
        peeled = [self._peeled(n, stream) for n in operands]
        regions = [self._between(stream, n) & self.heavy for n in peeled]
        if not all(regions) or len({bool(region & self.products) for region in regions}) == 1:
            return [branch]
        return [part for n in peeled for part in self._parts(stream, n)]

    def _comes_from(self, node: Node, source: Node) -> bool:
        return bool(self.above[node] >> self.flow.order[source] & 1)

    def _between(self, stream: Node, branch: Node) -> set[Node]:
        """Return the nodes on the paths from ``stream`` to ``branch``, with ``branch`` and without ``stream``."""
        first, last, within = self.flow.order[stream] + 1, self.flow.order[branch] + 1, self.above[branch]
        return {
            n for i, n in enumerate(self.nodes[first:last], first) if within >> i & 1 and self._comes_from(n, stream)
        }


def _shape(node: Node) -> list[int] | None:
    value = node.meta.get("val")
    return example_shape(value) if isinstance(value, Tensor) else None


__all__ = ["ResidualJoin", "residual_joins"]
