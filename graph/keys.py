"""Names of the attributes that nodes and edges of the networkx graphs carry.

Operator graph (``DepGraph.operators``): nodes are FX node names.
Coupling graph (``DepGraph.coupling``): bipartite; a node is ``("axis", i)`` or ``("dim", fx node name, output, dim)``.
Group graph (``isomorphism.group_graphs``): nodes are FX node names.
"""

from __future__ import annotations

OP = "op"  # operator graph: FX opcode; coupling graph edge: the operator that made the link
TARGET = "target"  # operator graph: the operator, or the parameter's name
MODULE = "module"  # operator graph: fully qualified name of the innermost module
SHAPE = "shape"  # operator graph: shape, dynamic sizes as text
PART = "bipartite"  # coupling graph: 0 for axes, 1 for tensor dimensions (networkx's convention)
SIZE = "size"  # coupling graph, axes: number of indices
FROZEN = "frozen"  # coupling graph, axes: the reason in words, None if removable
GROUP = "group"  # coupling graph, axes: name of the coupling group, None if there is none
LABEL = "label"  # group graph: kind of an operator, or of a parameter and the dimensions that carry the axis
