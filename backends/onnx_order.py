"""The order of the nodes of an ONNX file, from which ONNX Runtime makes the order it computes in.

ONNX Runtime does not compute in the order of the file. It goes backwards from the last results, depth first, and of a node's
operands takes the one first that stands last in the file. In ``x + gate * kept`` that is usually the product, as ``x`` was there
before: of a program that adds twelve kept branches to its input, it would compute the twelve products first, keep them all, and
then add. As for the registers of a processor (Sethi and Ullman, "The Generation of Optimal Code for Arithmetic Expressions",
1970) the operand that takes more to compute should come first: the sum so far, then the next product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any


def order_for_runtime(model: Any) -> None:
    """Sort the nodes of an ``onnx_ir.Model`` in place: of a node's operands, those that take more nodes stand later.

    The nodes have to be sorted already, operands before readers, and they still are afterwards. Graphs inside of nodes, such
    as the branches of an ``If``, stay as they are.
    """
    nodes = list(model.graph)
    operands = _operands(nodes)
    sizes = _sizes(operands)
    read = {operand for found in operands.values() for operand in found}
    waiting = _small_on_top((node for node in nodes if node not in read), sizes)
    opened: set[Any] = set()
    ordered: dict[Any, None] = {}
    while waiting:
        node = waiting[-1]
        if node not in opened:
            opened.add(node)
            waiting += _small_on_top((operand for operand in operands[node] if operand not in opened), sizes)
        else:
            ordered[waiting.pop()] = None
    model.graph.extend(ordered)  # moves those that it has


def _operands(nodes: Sequence[Any]) -> dict[Any, list[Any]]:
    """Return for each node, in order, the nodes whose results it or a graph inside of it reads."""
    among = set(nodes)
    return {
        node: list(dict.fromkeys(producer for value in _read(node) if (producer := value.producer()) in among))
        for node in nodes
    }


def _read(node: Any) -> Iterator[Any]:
    import onnx_ir as ir

    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        graphs = {ir.AttributeType.GRAPH: [attribute.value], ir.AttributeType.GRAPHS: attribute.value}
        for graph in graphs.get(attribute.type, ()):
            for inner in graph:
                yield from _read(inner)


def _sizes(operands: Mapping[Any, Sequence[Any]]) -> dict[Any, tuple[int, int]]:
    """Return how many nodes each node takes, itself included and one that is read twice once, and its place."""
    # Sets as the bits of numbers: thousands of nodes have thousands each.
    taken: dict[Any, int] = {}
    for place, (node, found) in enumerate(operands.items()):
        bits = 1 << place
        for operand in found:
            bits |= taken[operand]
        taken[node] = bits
    return {node: (bits.bit_count(), place) for place, (node, bits) in enumerate(taken.items())}


def _small_on_top(nodes: Iterable[Any], sizes: Mapping[Any, tuple[int, int]]) -> list[Any]:
    """Return a stack whose top is the smallest, of equal ones the first."""
    return sorted(nodes, key=sizes.__getitem__, reverse=True)
