"""Which sizes changed inside each module: what write-back chooses attribute values from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.fx import Node

from ..graph.axes import CONCAT, LEAF, PRODUCT, Axis, factors, find, leaves, pieces
from ..graph.depgraph import DepGraph
from ..graph.resize import RemovalRecord
from ..graph.rules import Resizer

HEAD, KV_HEAD, GROUP = "head", "kv head", "head group"
HEAD_DIM, VALUE_DIM, INNER, CHANNEL = "head dim", "value dim", "inner", "channel"


@dataclass(frozen=True)
class SizeChange:
    """A size that occurs inside a module, before and after the removal (equal where nothing goes).

    Attributes:
        old: Before.
        new: After.
        role: What the axis is: a head count, a head width, heads times width (``inner``), or a channel.
        direct: Whether it occurs in an operator of the module's own forward (else in a submodule's).
    """

    old: int
    new: int
    role: str
    direct: bool


def module_paths(node: Node) -> list[str]:
    """Return the fully qualified names of the modules that ``node`` comes from, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    # A module that is called twice is entered as `path@1` the second time.
    return [re.sub(r"@\d+", "", path) for path, _kind in stack.values()]


class SizeChanges:
    """The sizes inside every module of a program, before and after a removal.

    Args:
        graph: Analysis of the program as it was before.
        record: What was removed.
    """

    def __init__(self, graph: DepGraph, record: RemovalRecord) -> None:
        self._graph = graph
        self._resizer = Resizer(graph.analysis, kept_by_leaf(graph, record))
        self._explicit, self._leaf_roles = _roles(graph)
        self._by_module: dict[str, dict[SizeChange, None]] = {}
        for node in graph.program.nodes:
            self._visit(node)

    def inside(self, path: str) -> list[SizeChange]:
        """Return the sizes in module ``path`` and its submodules, those of its own operators first."""
        return sorted(self._by_module.get(path, ()), key=lambda change: not change.direct)

    def new_size(self, axis: Axis) -> int:
        """Return the size of an axis of the original analysis after the removal."""
        return int(self._resizer.size(axis))

    def _visit(self, node: Node) -> None:
        if node.op == "get_attr":
            own = str(node.target).rpartition(".")[0]
            paths = [own[:i] for i, char in enumerate(own) if char == "."] + [own]
            paths = ["", *paths] if own else [""]
        else:
            paths = module_paths(node)
        if not paths:
            return
        for dims in self._graph.analysis.tensors(node):
            for axis in dims:
                for part in _parts(axis):
                    self._add(paths, part)

    def _add(self, paths: list[str], axis: Axis) -> None:
        size = find(axis).size
        if type(size) is not int or size < 2:
            return
        new = self.new_size(axis)
        role = self._role(axis)
        for path in paths:
            change = SizeChange(size, new, role, path == paths[-1])
            self._by_module.setdefault(path, {})[change] = None

    def _role(self, axis: Axis) -> str:
        explicit = self._explicit.get(find(axis))
        if explicit is not None:
            return explicit
        roles = [self._leaf_roles.get(leaf, set()) for leaf in leaves(axis)]
        if len(roles) == 1 and roles[0]:
            # A factor of the query heads that is not the group count: the key-value heads.
            return GROUP if GROUP in roles[0] else KV_HEAD if HEAD in roles[0] else min(roles[0])
        flat = set().union(*roles) if roles else set()
        heads, widths = flat & {HEAD, GROUP}, flat & {HEAD_DIM, VALUE_DIM}
        if heads and widths:
            return INNER
        if heads and all(roles):
            return HEAD
        return min(widths) if len(widths) == 1 and all(roles) else CHANNEL


def kept_by_leaf(graph: DepGraph, record: RemovalRecord) -> dict[Axis, np.ndarray]:
    """Return the kept indices of every axis that ``record`` shrank, from the record's cuts of the tensors.

    Tensors are taken rather than groups, because a record of several removals names the groups of each.
    """
    kept: dict[Axis, np.ndarray] = {}
    for group in graph.groups:
        for member in group.members:
            cut = record.tensors.get(member.name, {}).get(member.dim)
            if cut is None:
                continue
            stays = np.zeros(cut.of, dtype=bool)
            stays[list(cut.kept)] = True
            indices = np.flatnonzero(stays[member.positions()].any(axis=1))
            if len(indices) < group.size:
                kept[find(group.axis)] = indices
            break
    return kept


def _roles(graph: DepGraph) -> tuple[dict[Axis, str], dict[Axis, set[str]]]:
    explicit: dict[Axis, str] = {}
    by_leaf: dict[Axis, set[str]] = {}
    named = graph.analysis.attention_roles()
    for axis, role in named:
        if find(axis).kind != LEAF or role == GROUP:
            explicit.setdefault(find(axis), role)
        for leaf in leaves(axis):
            by_leaf.setdefault(leaf, set()).add(role)
    for axis, role in named:
        # A leaf that is all of an attention's heads or widths; a group count keeps its more telling name.
        if find(axis).kind == LEAF and by_leaf[find(axis)] == {role}:
            explicit.setdefault(find(axis), role)
    return explicit, by_leaf


def _parts(axis: Axis) -> Iterator[Axis]:
    """Yield ``axis``, its pieces, its factors, and products of neighbouring factors."""
    axis = find(axis)
    yield axis
    if axis.kind == CONCAT:
        for piece in pieces(axis):
            yield from _parts(piece)
    elif axis.kind == PRODUCT:
        parts = factors(axis)
        for start in range(len(parts)):
            for stop in range(start + 1, min(len(parts), start + 4) + 1):
                if stop - start < len(parts):
                    yield from _section(parts[start:stop])


def _section(parts: list[Axis]) -> Iterator[Axis]:
    if len(parts) == 1:
        yield from _parts(parts[0])
        return
    size: Any = 1
    for part in parts:
        size = size * find(part).size
    yield Axis(size, PRODUCT, tuple(parts))
