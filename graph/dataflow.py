"""Who reads what: operands, and what operators in place have written into the memory that a node reads.

An operator in place (``add_``, ``copy_`` into a slice) changes every tensor that shares memory with the one it writes
into, and readers of those need not name it as an operand. Here they depend on it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from .operators import base_name
from .program import Program

# Give their operand itself in evaluation, which their schemas do not say.
_IDENTITIES = frozenset({"dropout", "feature_dropout", "alpha_dropout", "native_dropout"})
_SIZES = frozenset({"sym_size", "sym_stride", "sym_numel", "sym_storage_offset"})


@dataclass(frozen=True)
class Dataflow:
    """The dependencies of a graph.

    Attributes:
        order: Place of every node in the graph.
        memory: For every node the nodes that made the memory its result may lie in; itself, if it made its own.
        writes: For every operator in place the makers of the memory that it writes into.
        reads: For every node its operands, and the last operators that wrote into the operands' memory before.
    """

    order: dict[Node, int]
    memory: dict[Node, frozenset[Node]]
    writes: dict[Node, frozenset[Node]]
    reads: dict[Node, tuple[Node, ...]]

    def ancestors(self, own: Callable[[Node], int]) -> dict[Node, int]:
        """Return for every node the union of the bits ``own`` of itself and of all whose values it depends on.

        The size of a tensor is not taken for one of its values: a time that is expanded to the batch of the sample
        does not come from the sample.
        """
        out: dict[Node, int] = {}
        for node, sources in self.reads.items():
            bits = own(node)
            for source in sources if base_name(node) not in _SIZES else ():
                bits |= out[source]
            out[node] = bits
        return out

    def live(self, cut: Collection[Node] = ()) -> set[Node]:
        """Return the nodes that the results, or tensors that outlive a call, depend on.

        Args:
            cut: Nodes taken for given, so that what they depend on does not count for them.
        """
        return self._reached([node for node in self.reads if self.is_seen(node)], cut)

    def sources(self, node: Node, cut: Collection[Node] = ()) -> set[Node]:
        """Return ``node`` and all that it depends on, other than through nodes of ``cut``."""
        return self._reached([node], cut)

    def is_seen(self, node: Node) -> bool:
        """Whether a node does something besides giving its result, or is the output."""
        if node.op in ("output", "call_module", "call_method"):
            return True
        owners = self.writes.get(node)
        return owners is not None and (not owners or any(n.op in ("placeholder", "get_attr") for n in owners))

    def _reached(self, work: list[Node], cut: Collection[Node]) -> set[Node]:
        found: set[Node] = set()
        while work:
            node = work.pop()
            if node not in found and node not in cut:
                found.add(node)
                work.extend(self.reads[node])
        return found


def dataflow(program: Program) -> Dataflow:
    """Analyse a program. Linear in the number of nodes; views of one tensor are taken to overlap."""
    flow = Dataflow({node: i for i, node in enumerate(program.nodes)}, {}, {}, {})
    written: dict[Node, Node] = {}  # of a maker the last operator that wrote into its memory
    for node in flow.order:
        sources = dict.fromkeys(node.all_input_nodes)
        for operand in node.all_input_nodes:
            sources.update((written[maker], None) for maker in flow.memory[operand] if maker in written)
        flow.reads[node] = tuple(sources)
        shared, changed = _aliases(node)
        flow.memory[node] = frozenset(m for n in shared for m in flow.memory[n]) or frozenset({node})
        if getattr(getattr(node.target, "_schema", None), "is_mutable", False) and node.op == "call_function":
            flow.writes[node] = frozenset(m for n in changed for m in flow.memory[n])
            written.update(dict.fromkeys(flow.writes[node], node))
    return flow


def _aliases(node: Node) -> tuple[list[Node], list[Node]]:
    """Return the operands that the result may share memory with, and those that are written into."""
    if node.op != "call_function":
        return [], []
    schema: Any = getattr(node.target, "_schema", None)
    if node.target is operator.getitem or (base_name(node) in _IDENTITIES and not schema.is_mutable):
        return node.all_input_nodes[:1], []
    if schema is None or _converts(node):
        return [], []
    shared, changed = [], []
    returns = any(r.alias_info is not None for r in schema.returns)
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is None:
            continue
        value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        nodes = list(_nodes(value))
        shared += nodes if returns else []
        changed += nodes if argument.alias_info.is_write else []
    return shared, changed


def _converts(node: Node) -> bool:
    """Whether a cast makes another tensor: between equal dtypes it gives its operand."""
    if base_name(node) != "to":
        return False
    source, result = node.all_input_nodes[0].meta.get("val"), node.meta.get("val")
    return isinstance(source, Tensor) and isinstance(result, Tensor) and source.dtype is not result.dtype


def _nodes(value: Any) -> Iterator[Node]:
    if isinstance(value, Node):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _nodes(item)


__all__ = ["Dataflow", "dataflow"]
