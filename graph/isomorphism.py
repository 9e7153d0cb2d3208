"""Isomorphic coupling groups: groups whose axes run through the same operators in the same way, whatever their widths.

Scores of such groups can be compared; scores of others often differ by orders of magnitude for no reason that concerns
the task (Isomorphic Pruning, arXiv 2407.04616).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import networkx as nx
from networkx.algorithms.isomorphism import DiGraphMatcher, categorical_node_match
from torch.fx import Node

from . import keys
from .axes import Axis, find, leaves
from .depgraph import DepGraph
from .groups import CouplingGroup
from .operators import base_name
from .rules.base import is_tensor

# Operators that move elements or do nothing at inference: how a model is written, not what it computes.
_MOVES = frozenset(
    "view reshape _unsafe_view flatten unflatten permute transpose t movedim swapaxes contiguous clone dropout alias "
    "detach squeeze unsqueeze expand expand_as to _to_copy type_as getitem identity".split()
)
# Digests of this many bytes tell any two groups of a model apart in practice; equal ones are compared exactly.
_ROUNDS = 4


def group_graphs(graph: DepGraph, groups: Iterable[CouplingGroup] | None = None) -> dict[str, nx.DiGraph]:
    """Return the computation that each group's axis takes part in.

    Vertices are operators, and parameters with the dimension that carries the axis, labelled with their kind
    (``keys.LABEL``); edges are values that carry it. Widths, names and the order of operands leave no trace.
    """
    chosen = graph.groups if groups is None else tuple(groups)
    names = {find(g.axis): g.name for g in chosen}
    found = {g.name: nx.DiGraph() for g in chosen}
    analysis = graph.analysis
    # For every value and axis: the vertices that a reader of the value is joined to.
    sources: dict[tuple[Node, Axis], list[str]] = {}
    for node in graph.program.nodes:
        if node.op == "output" or node not in analysis.dims:
            continue
        carried = _carried(graph, node, names)
        for axis in carried:
            into = [s for n in dict.fromkeys(node.all_input_nodes) for s in sources.get((n, axis), ())]
            if node.op == "call_function" and base_name(node) in _MOVES and into:
                sources[node, axis] = into
                continue
            whole = found[names[axis]]
            whole.add_node(node.name, **{keys.LABEL: _label(graph, node, axis)})
            whole.add_edges_from((source, node.name) for source in into)
            sources[node, axis] = [node.name]
        for n in node.all_input_nodes:  # axes that end here: a layer sums over them
            for axis in _carried(graph, n, names) - carried:
                whole = found[names[axis]]
                whole.add_node(node.name, **{keys.LABEL: _label(graph, node, axis)})
                whole.add_edges_from((source, node.name) for source in sources.get((n, axis), ()))
    return found


def isomorphism_classes(graph: DepGraph, groups: Iterable[CouplingGroup] | None = None) -> dict[str, str]:
    """Return for each group the name of the first group, in graph order, that it is isomorphic to.

    Graphs are told apart by Weisfeiler-Lehman hashes; those with equal hashes are compared exactly.
    """
    match = categorical_node_match(keys.LABEL, None)
    known: dict[str, list[str]] = {}
    graphs = group_graphs(graph, groups)
    classes: dict[str, str] = {}
    for name, found in graphs.items():
        digest = _digest(found)
        alike = known.setdefault(digest, [])
        first = next((n for n in alike if DiGraphMatcher(graphs[n], found, node_match=match).is_isomorphic()), None)
        if first is None:
            alike.append(name)
        classes[name] = first or name
    return classes


def _digest(graph: nx.DiGraph) -> str:
    with warnings.catch_warnings():
        # That other releases give other hashes does not matter: they are compared within one call.
        warnings.filterwarnings("ignore", "The hashes produced for directed graphs", UserWarning)
        return nx.weisfeiler_lehman_graph_hash(graph, node_attr=keys.LABEL, iterations=_ROUNDS)


def _carried(graph: DepGraph, node: Node, names: dict[Axis, str]) -> set[Axis]:
    if node not in graph.analysis.dims:
        return set()
    return {leaf for dims in graph.analysis.tensors(node) for axis in dims for leaf in leaves(axis) if leaf in names}


def _label(graph: DepGraph, node: Node, axis: Axis) -> str:
    """Return what a vertex is: an operator, or a parameter and its dimensions that carry the axis."""
    if node.op != "get_attr":
        return base_name(node) if node.op == "call_function" else node.op
    dims = graph.analysis.tensors(node)[0] if is_tensor(node.meta.get("val")) else ()
    return f"parameter {[d for d, expression in enumerate(dims) if axis in leaves(expression)]} of {len(dims)}"
