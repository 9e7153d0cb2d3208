"""What an operator rule is, and the two contexts it works in.

A rule knows two things, side by side: `axes`, how the operator's dimensions relate, and `resize`, how its
literal arguments change when axes shrink. It need not know more: shapes follow from the axes, tensors are cut
by `graphwright.graph.resize`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from ..axes import CONCAT, Axes, Axis, Size, factors, find, leaves, pieces
from ..operators import arg as arg
from ..operators import base_name
from ..operators import set_arg as set_arg

Dims = tuple[Axis, ...]
_MOVES = frozenset("view reshape transpose t mT permute slice select unsqueeze squeeze".split())

# The dims of a node's value: one tensor's, a tuple of those for several outputs, None for what is no tensor.
Value = Any


class AxesRule(NamedTuple):
    """The two halves of one operator's rule. ``resize`` is None where no literal depends on a size."""

    axes: Callable[[Analysis, Node], Value]
    resize: Callable[[Resizer, Node], None] | None = None


def sizes(tensor: Tensor) -> tuple[Size, ...]:
    """Return the shape with dynamic sizes as symbolic expressions (comparing SymInts would add guards)."""
    return tuple(s.node.expr if isinstance(s, torch.SymInt) else s for s in tensor.shape)


class Constraint(NamedTuple):
    """The kept size of ``axis`` must stay a multiple of ``groups`` (group normalisation)."""

    axis: Axis
    groups: int
    node: Node


class Role(NamedTuple):
    """What ``axis`` is to an attention, provided that a softmax runs over a witness (if there are any)."""

    axis: Axis
    name: str
    witnesses: tuple[Axis, ...]


class Place(NamedTuple):
    """One dimension of a node's value: of its only tensor, or of tensor number ``output`` of several."""

    node: Node
    dim: int
    output: int | None = None


class Sum(NamedTuple):
    """``node`` sums over ``axis``, the dimensions ``places`` of what it multiplies or adds up."""

    axis: Axis
    node: Node
    places: tuple[Place, ...]


class Label(NamedTuple):
    """A statistic over ``axis`` is computed at ``node``: removal changes it."""

    axis: Axis
    text: str
    node: Node


class Analysis(Axes):
    """Assigns dims to nodes while walking the graph once, in topological order.

    Attributes:
        dims: What every node's value is made of.
        labels: Statistics that run over an axis (removal is ``renormalised``, not ``exact``).
        sums: Plain sums over an axis: exact only if what is summed is zero where the axis is masked.
        roles: What an axis is to an attention: ``head``, ``head group``, ``head dim``, ``value dim``.
        softmaxes: Axes that a softmax runs over.
        constraints: Divisibility of normalised dimensions.
        unknown: Nodes whose operator has no rule; all they touch is frozen.
        weights: Nodes computed from parameters and constants alone.
        parameters: Nodes that read a parameter, which masking sets to zero.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dims: dict[Node, Value] = {}
        self.labels: list[Label] = []
        self.sums: list[Sum] = []
        self.roles: list[Role] = []
        self.softmaxes: list[Axis] = []
        self.constraints: list[Constraint] = []
        self.unknown: list[Node] = []
        self.weights: set[Node] = set()
        self.parameters: set[Node] = set()

    def of(self, arg: object) -> Dims:
        """Return the dims of a tensor-valued argument; a number has none."""
        if isinstance(arg, Node):
            value = self.dims.get(arg)
            return value if value is not None else ()
        return ()

    def tensors(self, node: Node) -> list[Dims]:
        """Return the dims of every tensor in the value of ``node``: one, several for several outputs, or none."""
        return list(_tensors(self.dims.get(node)))

    def fresh(self, tensor: Tensor, frozen: str | None = None) -> Dims:
        """Make new leaves for a tensor of this shape."""
        return tuple(self.leaf(size, frozen) for size in sizes(tensor))

    def label(self, axis: Axis, text: str) -> None:
        """Say that a statistic runs over ``axis`` at the current node."""
        assert self.node is not None
        self.labels.append(Label(axis, text, self.node))

    def sum_over(self, axis: Axis, *places: tuple[object, int]) -> None:
        """Say that the current node sums over ``axis``.

        Args:
            axis: What is summed over.
            places: Where the axis is in what is multiplied or added up: ``(operand, dimension)``. The removal is exact
                if one of them is zero wherever the axis is masked; without any, that is never known.
        """
        assert self.node is not None
        found = (Place(n, d % len(self.of(n))) for n, d in places if isinstance(n, Node))
        self.sums.append(Sum(axis, self.node, tuple(found)))

    def role(self, axis: Axis, name: str, *witnesses: Axis) -> None:
        """Say what ``axis`` is to an attention; with ``witnesses``, if a softmax runs over one of them.

        A product of two activations looks the same in an attention and in a distance or a graph convolution.
        """
        self.roles.append(Role(axis, name, witnesses))

    def attention_roles(self) -> list[tuple[Axis, str]]:
        """Return the axes that are something to an attention, and what: roles whose witness a softmax runs over."""
        softmaxed = {leaf for axis in self.softmaxes for leaf in leaves(axis)}
        return [
            (role.axis, role.name)
            for role in self.roles
            if not role.witnesses or any(leaf in softmaxed for axis in role.witnesses for leaf in leaves(axis))
        ]

    def divisible(self, axis: Axis, groups: int) -> None:
        """Constrain the kept size of ``axis`` to multiples of ``groups``."""
        assert self.node is not None
        if groups > 1:
            self.constraints.append(Constraint(axis, groups, self.node))

    def is_weight(self, arg: object) -> bool:
        """Whether ``arg`` is computed from parameters and constants alone."""
        return isinstance(arg, Node) and arg in self.weights

    def is_masked(self, arg: object) -> bool:
        """Whether ``arg`` is a parameter with its entries at most moved about, so that masking makes it zero."""
        while isinstance(arg, Node) and base_name(arg) in _MOVES:
            arg = arg.args[0]
        return isinstance(arg, Node) and arg in self.parameters

    def broadcast(self, operands: Sequence[Dims], out: Sequence[Size]) -> Dims:
        """Unify right-aligned dims; a size of 1 stretches and is no relation."""
        result: list[Axis | None] = [None] * len(out)
        for dims in operands:
            shift = len(out) - len(dims)
            for i, axis in enumerate(dims):
                if find(axis).size == out[shift + i]:
                    known = result[shift + i]
                    if known is None:
                        result[shift + i] = axis
                    else:
                        self.unify(known, axis)
        return tuple(self.leaf(size) if axis is None else axis for axis, size in zip(result, out, strict=True))


class Resizer:
    """What an operator's literals are rewritten with, once it is known which indices stay.

    Args:
        analysis: The axes of the program before the removal.
        kept: Kept indices of each shrunk leaf (by representative), sorted.
    """

    def __init__(self, analysis: Analysis, kept: Mapping[Axis, np.ndarray]) -> None:
        self.analysis = analysis
        self._kept = kept
        self._memo: dict[Axis, np.ndarray | None] = {}
        self._original: Mapping[Node, Node] = {}

    def on_copy(self, original: Mapping[Node, Node]) -> Resizer:
        """Return a resizer for nodes of another graph that stand for nodes of the analysed one, by ``original``."""
        twin = Resizer(self.analysis, self._kept)
        twin._memo, twin._original = self._memo, original
        return twin

    def of(self, arg: object) -> Dims:
        """Return the dims of a tensor-valued argument before the removal."""
        return self.analysis.of(self._original.get(arg, arg) if isinstance(arg, Node) else arg)

    def kept(self, axis: Axis) -> np.ndarray | None:
        """Return the kept indices of ``axis``; None when all stay."""
        root = find(axis)
        if root in self._kept:
            return self._kept[root]
        if not root.parts:
            return None
        if root not in self._memo:
            self._memo[root] = self._kept_composite(root)
        return self._memo[root]

    def changed(self, axis: Axis) -> bool:
        """Whether any index of ``axis`` goes."""
        return self.kept(axis) is not None

    def size(self, axis: Axis) -> Size:
        """Return the size of ``axis`` after the removal."""
        kept = self.kept(axis)
        return find(axis).size if kept is None else len(kept)

    def prefix(self, axis: Axis, offset: int) -> int:
        """Return how many of the first ``offset`` indices of ``axis`` stay."""
        kept = self.kept(axis)
        return offset if kept is None else int(np.searchsorted(kept, offset))

    def _kept_composite(self, root: Axis) -> np.ndarray | None:
        parts = pieces(root) if root.kind == CONCAT else factors(root)
        kept = [self.kept(part) for part in parts]
        if all(k is None for k in kept):
            return None
        if type(root.size) is not int:
            # Batch times heads: there are no indices to list, only that it changed. Literals infer such a size.
            return np.zeros(0, dtype=np.int64)
        filled = [np.arange(p.size) if k is None else k for p, k in zip(parts, kept, strict=True)]
        if root.kind == CONCAT:
            offsets = np.cumsum([0, *(p.size for p in parts[:-1])])
            return np.concatenate([k + o for k, o in zip(filled, offsets, strict=True)])
        out = filled[0]
        for part, k in zip(parts[1:], filled[1:], strict=True):
            out = (out[:, None] * part.size + k[None, :]).reshape(-1)
        return out


def _tensors(value: Value) -> Iterator[Dims]:
    if value is None:
        return
    if isinstance(value, tuple) and (not value or isinstance(value[0], Axis)):
        yield value
        return
    for item in value:
        yield from _tensors(item)


def out_sizes(node: Node) -> tuple[Size, ...]:
    """Return the shape of a single-tensor node."""
    return sizes(node.meta["val"])


def resize_shape(index: int, name: str) -> Callable[[Resizer, Node], None]:
    """Make a ``resize`` for an operator with the shape of its result as argument ``index``."""

    def resize(rz: Resizer, node: Node) -> None:
        dims = rz.of(node)
        shape = arg(node, index, name)
        if shape is None or not any(rz.changed(axis) for axis in dims):
            return
        shape = list(shape) if isinstance(shape, (list, tuple)) else [*node.args[index:]]
        new = []
        for size, axis in zip(shape, dims, strict=True):
            if not rz.changed(axis) or size == -1:
                new.append(size)
            else:
                # A computed size (batch times heads) cannot be written as a literal: let the operator infer it.
                new.append(rz.size(axis) if isinstance(size, int) else -1)
        if new.count(-1) > 1:  # one of them was inferred before, and its size is known
            new = [
                rz.size(axis) if size == -1 and isinstance(rz.size(axis), int) else value
                for size, value, axis in zip(shape, new, dims, strict=True)
            ]
        set_arg(node, index, name, new)

    return resize


def is_tensor(value: object) -> TypeGuard[Tensor]:
    """Whether a recorded value is one tensor."""
    return isinstance(value, torch.Tensor)


def frozen(reason: str) -> Callable[[Analysis, Node], Value]:
    """Make the axes half of an operator that is deliberately not followed."""

    def axes(an: Analysis, node: Node) -> Value:
        for n in node.all_input_nodes:
            an.freeze_all(an.of(n), reason)
        value = node.meta["val"]
        if isinstance(value, (tuple, list)):
            return tuple(an.fresh(v, reason) for v in value)
        return an.fresh(value, reason)

    return axes
