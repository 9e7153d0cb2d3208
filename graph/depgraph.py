"""DepGraph: which dimensions of which parameters must change together.

Paper: DepGraph: Towards Any Structural Pruning (arXiv 2301.12900). The paper groups layers by reachability over
local dependencies; here one pass over the captured graph gives every dimension an axis expression, and a coupling
group is one axis that nothing freezes. See docs/methods/depgraph.md for how the two correspond.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np
from torch import Tensor, nn
from torch.fx import Node

from . import keys
from .axes import CONCAT, LEAF, Axis, Reason, factors, find, leaves, pieces
from .errors import PreconditionError, module_path, where
from .exactness import Zeros
from .program import Program, get_tensor
from .rules import Analysis, rule_for
from .rules.base import Constraint, is_tensor, sizes

INPUT, OUTPUT = "program input", "program output"


@dataclass(frozen=True)
class Member:
    """One dimension of one parameter or buffer that carries a group's axis.

    Attributes:
        name: Fully qualified name of the tensor (the first one, if it is tied).
        dim: Dimension of the tensor.
        trainable: Whether the tensor is a parameter (else a buffer or constant).
        layout: What the dimension is made of.
    """

    name: str
    dim: int
    trainable: bool
    layout: Axis
    _leaf: Axis

    def positions(self) -> np.ndarray:
        """Return ``[size of the axis, k]``: the k indices of this dimension that belong to each index of the axis."""
        return positions(self.layout, self._leaf)


@dataclass(frozen=True)
class CouplingGroup:
    """One axis whose indices can be removed, with every tensor dimension that carries it.

    Attributes:
        name: Stable, readable: the module that first produces the axis, and the kind.
        kind: ``channel`` (a convolution carries it), ``hidden`` (other), ``head`` (key-value heads under grouped-query
            attention), ``head group`` (query heads per key-value head), ``head dim`` (of queries and keys), ``value dim``.
        size: Number of indices.
        members: Parameters and buffers.
        exactness: ``exact`` (removal equals masking to zero) or ``renormalised`` (a statistic runs over the axis).
        because: For ``renormalised``: which statistics, one sentence each.
        constraints: Group norms whose channels must stay divisible.
        step: The number of removed indices must be a multiple of this.
        blocks: Indices fall into this many equal blocks (the groups of a group norm), from each of which equally many
            should go so that statistics keep their channels.
    """

    name: str
    kind: str
    size: int
    members: tuple[Member, ...]
    exactness: str
    because: tuple[str, ...]
    constraints: tuple[Constraint, ...]
    step: int
    blocks: int
    axis: Axis

    @property
    def parameters(self) -> tuple[Member, ...]:
        """The members that are trained."""
        return tuple(m for m in self.members if m.trainable)

    def legal_keep(self, keep: int) -> int:
        """Return the legal kept size nearest to ``keep``, at least 1 and at most `size`."""
        removed = round((self.size - keep) / self.step) * self.step
        most = (self.size - 1) // self.step * self.step
        return self.size - min(max(removed, 0), most)


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
        self.analysis = analyse(program)
        self._tensor_dims = _tensor_dims(program, self.analysis)

    @cached_property
    def groups(self) -> tuple[CouplingGroup, ...]:
        """Every removable axis that a parameter carries, in graph order."""
        return _groups(self)

    @cached_property
    def frozen(self) -> tuple[FrozenAxis, ...]:
        """Every axis of a parameter that is not removable, with the reason."""
        found: dict[Axis, list[tuple[str, int]]] = {}
        for name, dims, trainable in self._tensor_dims:
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

    @property
    def unknown(self) -> tuple[str, ...]:
        """Operators without a rule that occur; everything they touch is frozen."""
        return tuple(dict.fromkeys(str(node.target) for node in self.analysis.unknown))

    def __getitem__(self, name: str) -> CouplingGroup:
        """Return the group called ``name``; KeyError names the nearest ones."""
        for group in self.groups:
            if group.name == name:
                return group
        import difflib

        near = difflib.get_close_matches(name, [g.name for g in self.groups], 3)
        raise KeyError(f"no coupling group {name!r}" + (f"; near: {', '.join(near)}" if near else ""))

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
        for node, value in self.analysis.dims.items():
            for output, dims in enumerate(_tensors_of(value)):
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
    shared: dict[int, Any] = {}
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
            key = _identity(tensor)
            if key not in shared:
                shared[key] = an.fresh(tensor)
            an.dims[node] = shared[key]
        elif node.op == "placeholder":
            value = node.meta.get("val")
            an.dims[node] = an.fresh(value, INPUT) if is_tensor(value) else None
        elif node.op == "output":
            for result in node.all_input_nodes:
                for dims in _tensors_of(an.dims.get(result)):
                    an.freeze_all(dims, OUTPUT)
        else:
            an.dims[node] = _unknown(an, node)
    an.node = None
    return an


def _identity(tensor: Tensor) -> Any:
    if tensor.is_meta or tensor.numel() == 0:
        return id(tensor)
    storage = tensor.untyped_storage().data_ptr()
    return (storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()) if storage else id(tensor)


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
        for dims in _tensors_of(an.dims.get(source)):
            an.freeze_all(dims, reason)
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return tuple(an.fresh(v, reason) if is_tensor(v) else None for v in value)
    return an.fresh(value, reason) if is_tensor(value) else None


def _tensors_of(value: Any) -> list[tuple[Axis, ...]]:
    """Return the dims of every tensor in a node's value."""
    if value is None:
        return []
    if isinstance(value, tuple) and (not value or isinstance(value[0], Axis)):
        return [value]
    return [dims for v in value for dims in _tensors_of(v)]


def _tensor_dims(program: Program, an: Analysis) -> list[tuple[str, tuple[Axis, ...], bool]]:
    """Return ``(name, dims, trainable)`` of every tensor the graph reads, tied ones once."""
    out, seen = [], set()
    for node in program.nodes:
        if node.op != "get_attr":
            continue
        tensor = get_tensor(program.graph_module, str(node.target))
        if tensor is None or _identity(tensor) in seen:
            continue
        seen.add(_identity(tensor))
        out.append((str(node.target), an.dims[node], isinstance(tensor, nn.Parameter)))
    return out


def positions(axis: Axis, leaf: Axis) -> np.ndarray:
    """Return ``[size of leaf, k]``: the indices of ``axis`` that belong to each index of ``leaf``."""
    axis = find(axis)
    if axis is leaf:
        return np.arange(axis.size)[:, None]
    none = np.zeros((leaf.size, 0), dtype=np.int64)
    if axis.kind == LEAF:
        return none
    if axis.kind == CONCAT:
        found, offset = [], 0
        for piece in pieces(axis):
            found.append(positions(piece, leaf) + offset)
            offset += piece.size
        return np.concatenate(found, axis=1)
    found, before, rest = [], 1, int(axis.size)
    for factor in factors(axis):
        rest //= factor.size
        inner = positions(factor, leaf)  # [n, k]
        if inner.shape[1]:
            grid = np.arange(before)[None, :, None, None] * (factor.size * rest)
            grid = grid + inner[:, None, :, None] * rest + np.arange(rest)
            found.append(grid.reshape(leaf.size, -1))
        before *= factor.size
    return np.concatenate(found, axis=1) if found else none


# ---------------------------------------------------------------------- groups


def _groups(graph: DepGraph) -> tuple[CouplingGroup, ...]:
    an = graph.analysis
    members: dict[Axis, list[Member]] = {}
    conv = {
        find(leaf)
        for node in an.dims
        if _is_convolution(node)
        for axis in an.of(_weight(node))
        for leaf in leaves(axis)
    }
    for name, dims, trainable in graph._tensor_dims:
        for dim, axis in enumerate(dims):
            for leaf in dict.fromkeys(leaves(axis)):
                if leaf.frozen is None:
                    members.setdefault(leaf, []).append(Member(name, dim, trainable, axis, leaf))
    members = {leaf: found for leaf, found in members.items() if any(m.trainable for m in found)}
    roles = _by_leaf((axis, role) for axis, role in an.roles)
    because = _statistics(graph, members)
    constraints = _by_leaf((c.axis, c) for c in an.constraints)
    names: dict[str, int] = {}
    out = []
    for leaf, found in members.items():
        kind = _kind(roles.get(leaf, ()), leaf in conv)
        bound = tuple(constraints.get(leaf, ()))
        reasons = tuple(because.get(leaf, ()))
        out.append(
            CouplingGroup(
                _name(found, kind, names),
                kind,
                leaf.size,
                tuple(found),
                "renormalised" if reasons else "exact",
                reasons,
                bound,
                _step(leaf, bound),
                max((c.groups for c in bound if find(c.axis) is leaf), default=1),
                leaf,
            )
        )
    return tuple(out)


def _is_convolution(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.name.startswith(("aten::conv", "aten::_conv"))


def _weight(node: Node) -> object:
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")


def _by_leaf(pairs: Iterable[tuple[Axis, Any]]) -> dict[Axis, list[Any]]:
    out: dict[Axis, list[Any]] = {}
    for axis, value in pairs:
        for leaf in leaves(axis):
            if leaf.frozen is None:
                known = out.setdefault(leaf, [])
                if value not in known:
                    known.append(value)
    return out


def _kind(roles: Iterable[str], convolved: bool) -> str:
    roles = set(roles)
    if "head" in roles:
        return "head group" if "head group" in roles else "head"
    for role in ("head dim", "value dim"):
        if role in roles:
            return role
    return "channel" if convolved else "hidden"


def _name(members: list[Member], kind: str, taken: dict[str, int]) -> str:
    trained = [m for m in members if m.trainable]
    producer = next((m for m in trained if m.dim == 0 and m.name.endswith("weight")), trained[0])
    stem = producer.name.removesuffix(".weight")
    base = f"{stem}:{kind.replace(' ', '-')}"
    taken[base] = taken.get(base, 0) + 1
    return base if taken[base] == 1 else f"{base}.{taken[base]}"


def _statistics(graph: DepGraph, members: dict[Axis, list[Member]]) -> dict[Axis, list[str]]:
    """Say for each leaf which statistics run over it: labelled ones, and sums of what is not masked to zero."""
    an = graph.analysis
    zeros = Zeros(an, graph.program.graph_module)
    out: dict[Axis, list[str]] = {}
    for mark in an.labels:
        for leaf in dict.fromkeys(leaves(mark.axis)):
            if leaf in members:
                out.setdefault(leaf, []).append(f"{mark.text}: %{mark.node.name} = {mark.node.target}")
    for mark in an.sums:
        for leaf in dict.fromkeys(leaves(mark.axis)):
            if leaf in members and not zeros.any_zero(_summed(mark.node), leaf):
                out.setdefault(leaf, []).append(
                    f"values that masking does not zero are summed over it: %{mark.node.name} = {mark.node.target}"
                )
    return out


def _summed(node: Node) -> list[Node]:
    """Return the operands of a sum or contraction."""
    name = str(node.target)
    if "scaled_dot_product" in name:
        return list(node.all_input_nodes[:2])
    if "addmm" in name or "baddbmm" in name:
        return [n for n in node.args[1:3] if isinstance(n, Node)]
    return list(node.all_input_nodes)


def _step(leaf: Axis, constraints: Iterable[Constraint]) -> int:
    """Return the smallest count whose removal leaves every group norm's channels divisible."""
    step = 1
    for constraint in constraints:
        per_index = positions(constraint.axis, leaf).shape[1]
        step = int(np.lcm(step, constraint.groups // np.gcd(constraint.groups, per_index)))
    return step


def check_keep(graph: DepGraph, keep: dict[str, Any]) -> dict[Axis, np.ndarray]:
    """Check kept indices by group name and return them by leaf.

    Raises:
        PreconditionError: A name is unknown; indices are empty, repeated, unsorted or out of range.
    """
    out: dict[Axis, np.ndarray] = {}
    for name, indices in keep.items():
        try:
            group = graph[name]
        except KeyError as err:
            raise PreconditionError(str(err.args[0])) from None
        kept = np.asarray(indices.tolist() if isinstance(indices, Tensor) else list(indices), dtype=np.int64)
        if kept.size == 0:
            raise PreconditionError(f"group {name!r} would keep no index; keep at least 1 of {group.size}")
        if (np.diff(kept) <= 0).any():
            raise PreconditionError(f"the kept indices of group {name!r} must be sorted and without repeats")
        if kept[0] < 0 or kept[-1] >= group.size:
            raise PreconditionError(
                f"kept indices of group {name!r} must be in [0, {group.size}), got {kept[0]} to {kept[-1]}"
            )
        if kept.size < group.size:
            out[find(group.axis)] = kept
    return out


__all__ = [
    "CouplingGroup",
    "DepGraph",
    "FrozenAxis",
    "Member",
    "Reason",
    "analyse",
    "check_keep",
    "depgraph",
    "positions",
    "sizes",
]
