"""DepGraph as the paper draws it: layers with an input and an output side, and the two dependency rules.

Vertices are ``(component, "in")`` and ``(component, "out")``, a component being one operator of the captured graph.
Inter-layer edges join a component's output to the inputs it feeds; intra-layer edges join the two sides of a component
that removes the same slices on both (norms, elementwise operators, additions, concatenations, depthwise convolutions).
A connected component is a group of the paper. It is coarser than a coupling group, which tells the axes of one
dimension apart: heads from head dims, the pieces of a concatenation from each other.

Paper: DepGraph: Towards Any Structural Pruning (arXiv 2301.12900), section 3.
"""

from __future__ import annotations

import networkx as nx
from torch.fx import Node

from .axes import Axis, leaves
from .depgraph import DepGraph
from .operators import RECURRENT, base_name, layer_of
from .rules import Analysis
from .rules.base import is_tensor

INTER, INTRA = "inter-layer", "intra-layer"


def layer_dependencies(graph: DepGraph) -> nx.Graph:
    """Return the paper's local relation D over the operators of the captured graph.

    Edges carry ``kind`` (``inter-layer`` or ``intra-layer``); vertices carry ``weight``, the name of the operator's
    weight where it has one.
    """
    carried = _carried(graph)
    relation = nx.Graph()
    an = graph.analysis
    sides: dict[Node, tuple[set[Axis], set[Axis]]] = {}
    for node in graph.program.nodes:
        if node.op != "call_function" or (node in an.weights and not _is_embedding(node)):
            continue
        inputs = [n for n in node.all_input_nodes if n in sides or n.op == "placeholder"]
        into = {leaf for n in inputs for leaf in _leaves(an, n) if leaf in carried}
        out = {leaf for leaf in _leaves(an, node) if leaf in carried}
        sides[node] = (into, out)
        weight = _weight_name(node)
        for side in ("in", "out"):
            relation.add_node((node.name, side), weight=weight)
        if into & out:
            relation.add_edge((node.name, "in"), (node.name, "out"), kind=INTRA)
        for n in inputs:
            if n in sides and sides[n][1] & into:
                relation.add_edge((n.name, "out"), (node.name, "in"), kind=INTER)
    return relation


def layer_groups(graph: DepGraph) -> list[frozenset[tuple[str, str]]]:
    """Return the groups of the paper: sets of ``(weight name, "in" or "out")`` that must be pruned together.

    Only groups in which some convolution or linear layer's output shrinks are listed, in graph order; a group that
    reaches the program's output is among them, since the paper's algorithm leaves the choice to the user.
    """
    relation = layer_dependencies(graph)
    groups = []
    for component in nx.connected_components(relation):
        members = {(relation.nodes[v]["weight"], v[1]) for v in component if relation.nodes[v]["weight"]}
        if any(side == "out" and _is_producer(graph, name) for name, side in members):
            groups.append(frozenset(members))
    return groups


def _carried(graph: DepGraph) -> set[Axis]:
    """Return the leaves of the feature dimensions of layer weights, removable or not.

    A position table also is a parameter, but its tokens are no layer's.
    """
    an = graph.analysis
    out: set[Axis] = set()
    for node in an.dims:
        if _is_embedding(node):
            features = an.of(node.args[0])[1:]  # positions that are looked up may be constants too, and are no features
        elif layer_of(node) is not None or base_name(node) in RECURRENT:
            features = [axis for n in node.all_input_nodes if n in an.weights for axis in an.of(n)[:2]]
        else:
            continue
        out.update(leaf for axis in features for leaf in leaves(axis))
    return out


def _is_embedding(node: Node) -> bool:
    return base_name(node) == "embedding"


def _leaves(an: Analysis, node: Node) -> set[Axis]:
    return {leaf for dims in an.tensors(node) for axis in dims for leaf in leaves(axis) if leaf.size != 1}


def _weight_name(node: Node) -> str | None:
    """Return the name of the parameter that ``node`` applies, the one with most dimensions."""
    found = [n for n in node.all_input_nodes if n.op == "get_attr" and is_tensor(n.meta.get("val"))]
    return str(max(found, key=lambda n: n.meta["val"].dim()).target) if found else None


def _is_producer(graph: DepGraph, name: str) -> bool:
    dims = next((dims for known, dims, _ in graph.tensors if known == name), ())
    return len(dims) > 1
