"""Coupling groups: what one removable axis is, and every tensor dimension that carries it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.fx import GraphModule

from .axes import CONCAT, LEAF, Axis, factors, find, leaves, pieces
from .exactness import Zeros
from .names import GroupName, choose, cut_all, named
from .operators import is_convolution, weight_of
from .rules import Analysis
from .rules.base import Constraint

# Name of a tensor, what its dimensions are made of, and whether it is trained.
TensorDims = tuple[str, tuple[Axis, ...], bool]


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
    def exact(self) -> bool:
        """Whether removing indices equals masking them to zero (else a statistic over the axis changes)."""
        return self.exactness == "exact"

    @property
    def parameters(self) -> tuple[Member, ...]:
        """The members that are trained."""
        return tuple(m for m in self.members if m.trainable)

    def legal_keep(self, keep: int) -> int:
        """Return the legal kept size nearest to ``keep``, at least 1 and at most `size`."""
        removed = round((self.size - keep) / self.step) * self.step
        most = (self.size - 1) // self.step * self.step
        return self.size - min(max(removed, 0), most)


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


def coupling_groups(
    an: Analysis, gm: GraphModule, tensors: Sequence[TensorDims], known: Sequence[GroupName] = ()
) -> tuple[CouplingGroup, ...]:
    """Make one group of every unfrozen leaf that a trained parameter carries, in graph order.

    Args:
        an: The axes of the program.
        gm: The program's graph module.
        tensors: Every tensor the graph reads, tied ones once.
        known: Names that groups had before removals.
    """
    members: dict[Axis, list[Member]] = {}
    conv = {
        find(leaf)
        for node in an.dims
        if is_convolution(node)
        for axis in an.of(weight_of(node))
        for leaf in leaves(axis)
    }
    for name, dims, trainable in tensors:
        for dim, axis in enumerate(dims):
            for leaf in dict.fromkeys(leaves(axis)):
                if leaf.frozen is None:
                    members.setdefault(leaf, []).append(Member(name, dim, trainable, axis, leaf))
    members = {leaf: found for leaf, found in members.items() if any(m.trainable for m in found)}
    roles = _by_leaf(an.attention_roles())
    because = _statistics(an, gm, members)
    constraints = _by_leaf((c.axis, c) for c in an.constraints)
    kinds = [_kind(roles.get(leaf, ()), leaf in conv) for leaf in members]
    names = _names(list(members.values()), kinds, known)
    out = []
    for (leaf, found), kind, name in zip(members.items(), kinds, names, strict=True):
        bound = tuple(constraints.get(leaf, ()))
        reasons = tuple(because.get(leaf, ()))
        out.append(
            CouplingGroup(
                name,
                kind,
                leaf.size,
                tuple(found),
                "renormalised" if reasons else "exact",
                reasons,
                bound,
                _step(leaf, bound),
                _blocks(leaf, bound),
                leaf,
            )
        )
    return tuple(out)


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


def _producer(members: Sequence[Member]) -> Member:
    trained = [m for m in members if m.trainable]
    return next((m for m in trained if m.dim == 0 and m.name.endswith("weight")), trained[0])


def _base(producer: Member, kind: str) -> str:
    return f"{producer.name.removesuffix('.weight')}:{kind.replace(' ', '-')}"


def _names(members: Sequence[Sequence[Member]], kinds: Sequence[str], known: Sequence[GroupName]) -> list[str]:
    producers = [_producer(found) for found in members]
    bases = [_base(producer, kind) for producer, kind in zip(producers, kinds, strict=True)]
    noted = {k.tensor for k in known}
    # Positions matter only where there is a name to look up.
    none = np.zeros((0, 0), dtype=np.int64)
    places = [(p.name, p.dim, p.positions() if p.name in noted else none) for p in producers]
    return choose(bases, places, known)


def names_after(
    groups: Sequence[CouplingGroup],
    known: Sequence[GroupName],
    cuts: Mapping[str, Mapping[int, Sequence[int]]],
    gone: Collection[str] = (),
) -> tuple[GroupName, ...]:
    """Return what the analysis after a removal needs to give every group the name it has now.

    The names of groups that are none any more stay known too: a later pass can tell them from names that never were.

    Args:
        groups: Those before the removal.
        known: What earlier removals noted.
        cuts: Kept indices by tensor and dimension.
        gone: Names of the groups that the removal takes to width 1.
    """
    noted = {k.name for k in known}
    producers = [(g, _producer(g.members)) for g in groups]
    count = Counter(_base(p, g.kind) for g, p in producers)
    new = [
        named(g.name, p.name, p.dim, int(find(p.layout).size), p.positions())
        for g, p in producers
        if g.name not in noted and (g.name in gone or count[_base(p, g.kind)] > 1 or g.name != _base(p, g.kind))
    ]
    return cut_all([*known, *new], cuts)


def _statistics(an: Analysis, gm: GraphModule, members: dict[Axis, list[Member]]) -> dict[Axis, list[str]]:
    """Say for each leaf which statistics run over it: labelled ones, and sums of what is not masked to zero."""
    zeros = Zeros(an, gm)
    out: dict[Axis, list[str]] = {}
    for mark in an.labels:
        for leaf in dict.fromkeys(leaves(mark.axis)):
            if leaf in members:
                out.setdefault(leaf, []).append(f"{mark.text}: %{mark.node.name} = {mark.node.target}")
    for mark in an.sums:
        for leaf in dict.fromkeys(leaves(mark.axis)):
            if leaf in members and not zeros.any_zero(mark.places, leaf):
                out.setdefault(leaf, []).append(
                    f"values that masking does not zero are summed over it: %{mark.node.name} = {mark.node.target}"
                )
    return out


def _step(leaf: Axis, constraints: Iterable[Constraint]) -> int:
    """Return the smallest count whose removal leaves every group norm's channels divisible."""
    step = 1
    for constraint in constraints:
        per_index = positions(constraint.axis, leaf).shape[1]
        step = int(np.lcm(step, constraint.groups // np.gcd(constraint.groups, per_index)))
    return step


def _blocks(leaf: Axis, constraints: Iterable[Constraint]) -> int:
    """Return how many equal blocks keep every channel in its group of every group norm over this axis alone."""
    counts = [c.groups for c in constraints if find(c.axis) is leaf]
    blocks = int(np.lcm.reduce(counts)) if counts else 1
    return blocks if leaf.size % blocks == 0 else max(counts)
