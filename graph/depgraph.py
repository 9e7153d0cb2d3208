"""DepGraph: which dimensions of which parameters must change together.

Paper: DepGraph: Towards Any Structural Pruning (arXiv 2301.12900). The paper groups layers by reachability over
local dependencies; here one pass over the captured graph gives every dimension an axis expression, and a coupling
group is one axis that nothing freezes. See docs/methods/depgraph.md for how the two correspond.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np
from torch import Tensor, nn
from torch.fx import Node

from . import keys
from .axes import Axis, find, leaves
from .errors import PreconditionError, module_path, unknown, where
from .groups import CouplingGroup, TensorDims, coupling_groups
from .program import Program, get_tensor, tensor_identity
from .rules import Analysis, rule_for
from .rules.base import is_tensor

INPUT, OUTPUT, UNREAD = "program input", "program output", "no operator reads it"


@dataclass(frozen=True)
class FrozenAxis:
    """An axis of a parameter that must keep all its indices.

    Attributes:
        reason: Why, in words.
        where: The node, module and source line at which that was found.
        size: Number of indices.
        members: ``(tensor name, dimension)`` of the parameters that carry it.
    """

    reason: str
    where: str
    size: Any
    members: tuple[tuple[str, int], ...]


class DepGraph:
    """The coupling analysis of one Program. It stays valid until the program is rewritten."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.version = program.version
        self.analysis = analyse(program)
        #: ``(name, dims, trainable)`` of every tensor the graph reads, tied ones once.
        self.tensors = _tensor_dims(program, self.analysis)

    @cached_property
    def groups(self) -> tuple[CouplingGroup, ...]:
        """Every removable axis that a parameter carries, in graph order."""
        return coupling_groups(self.analysis, self.program.graph_module, self.tensors, self.program.group_names)

    @cached_property
    def frozen(self) -> tuple[FrozenAxis, ...]:
        """Every axis of a parameter that is not removable, with the reason."""
        found: dict[Axis, list[tuple[str, int]]] = {}
        for name, dims, trainable in self.tensors:
            for dim, axis in enumerate(dims):
                for leaf in leaves(axis):
                    if trainable and leaf.frozen is not None and leaf.size != 1:
                        entry = found.setdefault(leaf, [])
                        if (name, dim) not in entry:
                            entry.append((name, dim))
        return tuple(
            FrozenAxis(leaf.frozen.text, where(leaf.frozen.node) if leaf.frozen.node else "", leaf.size, tuple(members))
            for leaf, members in found.items()
            if leaf.frozen is not None
        )

    def check_current(self) -> None:
        """Raise `PreconditionError` if the program was rewritten since."""
        if self.version != self.program.version:
            raise PreconditionError(
                f"this coupling analysis is of {self.program.name} before its last rewrite; call depgraph on the program "
                "again, and choose indices of the program as it is now"
            )

    @property
    def unknown(self) -> tuple[str, ...]:
        """Operators without a rule that occur; everything they touch is frozen."""
        return tuple(dict.fromkeys(str(node.target) for node in self.analysis.unknown))

    def __getitem__(self, name: str) -> CouplingGroup:
        """Return the group called ``name``; KeyError names the nearest ones."""
        found = self._by_name.get(name)
        if found is not None:
            return found
        raise KeyError(unknown("there is no coupling group", name, self._by_name))

    @cached_property
    def _by_name(self) -> dict[str, CouplingGroup]:
        return {group.name: group for group in self.groups}

    @cached_property
    def operators(self) -> nx.DiGraph:
        """The operator graph: one node per FX node, attributes in `graphwright.graph.keys`."""
        graph = nx.DiGraph()
        for node in self.program.nodes:
            value = node.meta.get("val")
            graph.add_node(
                node.name,
                **{
                    keys.OP: node.op,
                    keys.TARGET: str(node.target),
                    keys.MODULE: module_path(node)[0],
                    keys.SHAPE: tuple(map(str, value.shape)) if isinstance(value, Tensor) else None,
                },
            )
            graph.add_edges_from((source.name, node.name) for source in node.all_input_nodes)
        return graph

    @cached_property
    def coupling(self) -> nx.Graph:
        """The coupling graph: axis leaves and tensor dimensions, an edge where the dimension contains the axis."""
        graph = nx.Graph()
        number: dict[Axis, int] = {}
        names = {find(g.axis): g.name for g in self.groups}
        for node in self.analysis.dims:
            for output, dims in enumerate(self.analysis.tensors(node)):
                for dim, axis in enumerate(dims):
                    tensor_dim = ("dim", node.name, output, dim)
                    graph.add_node(tensor_dim, **{keys.PART: 1})
                    for leaf in leaves(axis):
                        i = number.setdefault(leaf, len(number))
                        if ("axis", i) not in graph:
                            reason = leaf.frozen.text if leaf.frozen else None
                            graph.add_node(
                                ("axis", i),
                                **{
                                    keys.PART: 0,
                                    keys.SIZE: leaf.size,
                                    keys.FROZEN: reason,
                                    keys.GROUP: names.get(leaf),
                                },
                            )
                        graph.add_edge(("axis", i), tensor_dim, **{keys.OP: str(node.target)})
        return graph


def depgraph(program: Program) -> DepGraph:
    """Analyse ``program``: its coupling groups, and what is frozen and why. Linear in the number of nodes."""
    return DepGraph(program)


def analyse(program: Program) -> Analysis:
    """Assign an axis to every dimension of every tensor by one walk over the graph."""
    an = Analysis()
    gm = program.graph_module
    shared: dict[Hashable, Any] = {}
    read = _read(program)
    for node in gm.graph.nodes:
        an.node = node
        if node.op == "call_function":
            an.dims[node] = _call(an, node)
            if all(n in an.weights for n in node.all_input_nodes):
                an.weights.add(node)
        elif node.op == "get_attr":
            an.weights.add(node)
            tensor = get_tensor(gm, str(node.target))
            if tensor is None:
                an.dims[node] = None
                continue
            # Two names of one tensor (tied weights) are one tensor.
            key = tensor_identity(tensor)
            if key not in shared:
                shared[key] = an.fresh(tensor, None if key in read else UNREAD)
            if isinstance(tensor, nn.Parameter):
                an.parameters.add(node)
            an.dims[node] = shared[key]
        elif node.op == "placeholder":
            value = node.meta.get("val")
            an.dims[node] = an.fresh(value, INPUT) if is_tensor(value) else None
        elif node.op == "output":
            for result in node.all_input_nodes:
                for dims in an.tensors(result):
                    an.freeze_all(dims, OUTPUT)
        else:
            an.dims[node] = _unknown(an, node)
    an.node = None
    return an


def _read(program: Program) -> set[Any]:
    """Return the identities of the tensors that some operator reads, under any of their names."""
    attributes = (n for n in program.nodes if n.op == "get_attr" and n.users)
    tensors = (get_tensor(program.graph_module, str(n.target)) for n in attributes)
    return {tensor_identity(t) for t in tensors if t is not None}


def _call(an: Analysis, node: Node) -> Any:
    value = node.meta.get("val")
    rule = rule_for(node.target)
    if rule is not None:
        return rule.axes(an, node) if _has_tensors(value) or node.all_input_nodes else None
    if not _has_tensors(value) and not any(_has_tensors(n.meta.get("val")) for n in node.all_input_nodes):
        return None  # arithmetic on sizes
    return _unknown(an, node)


def _has_tensors(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_has_tensors(v) for v in value)
    return is_tensor(value)


def _unknown(an: Analysis, node: Node) -> Any:
    reason = f"the operator {node.target} has no rule"
    an.unknown.append(node)
    for source in node.all_input_nodes:
        for dims in an.tensors(source):
            an.freeze_all(dims, reason)
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return tuple(an.fresh(v, reason) if is_tensor(v) else None for v in value)
    return an.fresh(value, reason) if is_tensor(value) else None


def _tensor_dims(program: Program, an: Analysis) -> list[TensorDims]:
    """Return ``(name, dims, trainable)`` of every tensor the graph reads, tied ones once."""
    out, seen = [], set()
    for node in program.nodes:
        if node.op != "get_attr":
            continue
        tensor = get_tensor(program.graph_module, str(node.target))
        if tensor is None or tensor_identity(tensor) in seen:
            continue
        seen.add(tensor_identity(tensor))
        out.append((str(node.target), an.dims[node], isinstance(tensor, nn.Parameter)))
    return out


def check_keep(graph: DepGraph, keep: dict[str, Any]) -> dict[Axis, np.ndarray]:
    """Check kept indices by group name and return them by leaf.

    Raises:
        PreconditionError: A name is unknown; indices are no whole numbers, or empty, repeated, unsorted or out of range.
    """
    out: dict[Axis, np.ndarray] = {}
    for name, indices in keep.items():
        try:
            group = graph[name]
        except KeyError as err:
            raise PreconditionError(str(err.args[0])) from None
        kept = _as_indices(group, indices)
        if kept.size == 0:
            raise PreconditionError(f"group {name!r} would keep no index; keep at least 1 of {group.size}")
        if (np.diff(kept) <= 0).any():
            at = int(np.argmax(np.diff(kept) <= 0))
            raise PreconditionError(
                f"the kept indices of group {name!r} must be sorted and without repeats, "
                f"got {kept[at]} before {kept[at + 1]}"
            )
        if kept[0] < 0 or kept[-1] >= group.size:
            raise PreconditionError(
                f"kept indices of group {name!r} must be in [0, {group.size}), got {kept[0]} to {kept[-1]}; "
                "they are indices of the program as it is now"
            )
        if kept.size < group.size:
            out[find(group.axis)] = kept
    return out


def _as_indices(group: CouplingGroup, given: Any) -> np.ndarray:
    """Return what a caller wants to keep of a group as int64: indices, or a truth value for every index."""
    try:
        found = np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given)
    except (ValueError, TypeError, RuntimeError):  # lists of different lengths, dtypes that numpy lacks
        found = np.asarray(None)
    if found.dtype == np.bool_ and found.shape == (group.size,):
        return np.flatnonzero(found)
    if found.shape == (0,):
        return found.astype(np.int64)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        what = f"{found.dtype} of shape {list(found.shape)}" if found.dtype != object else repr(given)[:80]
        raise PreconditionError(
            f"what stays of group {group.name!r} must be a list of whole numbers from 0 to {group.size - 1}, or "
            f"{group.size} truth values, got {what}"
        )
    return found.astype(np.int64)
