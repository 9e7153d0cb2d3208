"""Residual blocks: branches that can be taken away together, found from the graph and from which module called what.

    x + f(x) becomes x

A block is the largest module call whose layers all belong to residual branches, and in which no part occurs twice: a
layer of a transformer with its attention and its feed-forward, not the stack of layers around it.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from torch import Tensor
from torch.fx import Node

from .cost import cost, example_shape
from .dataflow import dataflow
from .errors import where
from .operators import arg, base_name
from .program import Program
from .residuals import POINTWISE, SUMS, VIEWS, ResidualJoin, residual_joins

UNITS = ("block", "branch")
# What may stand between a weight and the layer that reads it.
TRANSPOSED = VIEWS | {"t", "numpy_T", "to"}
# A module call: the keys of `nn_module_stack` down to it, which tell the calls of one module apart.
Call = tuple[str, ...]

_NO_STREAM = (
    "none of its branches is added to the stream as it came in: the shortcut has layers of its own, or the stream "
    "changes its shape"
)


@dataclass(frozen=True)
class Cut:
    """What is left of a graph in which branches are zero.

    Attributes:
        left: For every addition that loses a branch, in graph order, the operand that stays.
        gone: The nodes that no result depends on any more.
        refused: Why there is no such graph; empty if there is.
    """

    left: Mapping[Node, Node] = field(default_factory=dict)
    gone: frozenset[Node] = frozenset()
    refused: str = ""


@dataclass(frozen=True)
class ResidualBlock:
    """Residual branches that go together.

    Attributes:
        number: In graph order, those that are refused included.
        name: Fully qualified name of the module: for a branch that of its last layer.
        kinds: Of its branches, ``attention`` or ``mlp``.
        branches: Their numbers, as `residual_joins` counts them.
        joins: The same as it gives them.
        cut: What its removal leaves, or why it is refused.
    """

    number: int
    name: str
    kinds: tuple[str, ...]
    branches: tuple[int, ...]
    joins: tuple[ResidualJoin, ...]
    cut: Cut

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the parameters and buffers that its layers read, whether others read them too or not."""
        reads = (source for node in self.cut.gone for source in node.all_input_nodes if source.op == "get_attr")
        return tuple(sorted({str(source.target) for source in reads}))


@dataclass(frozen=True)
class Blocks:
    """The residual blocks of a program.

    Attributes:
        blocks: In graph order.
        others: Why modules of a class of which others are blocks are none, by name.
    """

    blocks: tuple[ResidualBlock, ...]
    others: Mapping[str, str]


def residual_blocks(program: Program, unit: str = "block") -> Blocks:
    """Return the blocks, or every residual branch as one of its own with ``unit="branch"``.

    A branch whose layers are needed elsewhere (a returned key-value cache, layers that a parallel branch shares) or whose
    addition does more than to add it is refused with the reason. Branches that no module call holds together, such as
    those of layers that are called one by one in a loop, are blocks of their own.

    Args:
        program: Any program; on the ``meta`` device too.
        unit: One of `UNITS`.
    """
    return _Search(program).blocks(unit)


def cut_branches(program: Program, branches: Iterable[Node]) -> Cut:
    """Return what is left where the values of ``branches`` are zero. See `Cut`."""
    return _Search(program).cut(branches)


class _Search:
    def __init__(self, program: Program) -> None:
        self.flow, self.program = dataflow(program), program
        self.live = self.flow.live()
        self.joins = residual_joins(program)
        names = {n.node for n in cost(program).nodes if n.macs}
        self.heavy = {node: _calls(node) for node in self.flow.order if node.name in names and node in self.live}
        self.scopes = [_common([_calls(n) for n in (join.node, *join.layers)]) for join in self.joins]
        self.masked = [_masked(join.layers) for join in self.joins]
        self.known: dict[Call, tuple[int, ...]] = {}
        #: Name and class of the module of every call.
        self.modules = {call: entry for node in self.heavy for call, entry in _modules(node)}

    def blocks(self, unit: str) -> Blocks:
        members: list[tuple[Call, tuple[int, ...]]] = []
        taken: set[int] = set()
        for i in range(len(self.joins)):
            if i not in taken:
                members.append(self._around(i) if unit == "block" else ((), (i,)))
                taken.update(members[-1][1])
        found = tuple(self._block(number, *entry) for number, entry in enumerate(members))
        return Blocks(found, self._others([call for call, _ in members if call]))

    def cut(self, branches: Iterable[Node]) -> Cut:
        """Follow the zeros of ``branches`` to the additions that they end in."""
        zero, left = set(branches), dict[Node, Node]()
        work = [(self.flow.order[node], node) for node in zero]
        heapq.heapify(work)
        while work:
            node = heapq.heappop(work)[1]
            for user in node.users:
                if user not in self.live or user in zero:
                    continue
                name = base_name(user)
                if name in SUMS:
                    # A sum of two branches that both go is a zero itself, which is known when the later one is.
                    other = _other(user, zero)
                    if other is None:
                        return Cut(refused=f"{where(user)} does more than to add it to a stream of the same shape")
                    left[user] = other
                    if other is user:
                        del left[user]
                        zero.add(user)
                        heapq.heappush(work, (self.flow.order[user], user))
                elif name in POINTWISE | VIEWS and not (name == "div" and arg(user, 1, "other") is node):
                    zero.add(user)
                    heapq.heappush(work, (self.flow.order[user], user))
                else:
                    return Cut(refused=f"{where(user)} reads what it computes")
        ordered = {node: left[node] for node in sorted(left, key=self.flow.order.__getitem__)}
        return Cut(ordered, frozenset(self.live - self._live(ordered)))

    def _live(self, left: Mapping[Node, Node]) -> set[Node]:
        """Return what the results depend on with the operands that are left in the place of the additions."""
        found, work = set[Node](), [node for node in self.flow.reads if self.flow.is_seen(node)]
        while work:
            node = work.pop()
            while node in left:
                node = left[node]
            if node not in found:
                found.add(node)
                work.extend(self.flow.reads[node])
        return found

    def _around(self, number: int) -> tuple[Call, tuple[int, ...]]:
        """Return the largest module call around a branch that is a block, and its branches."""
        scope = self.scopes[number]
        for depth in range(1, len(scope) + 1):
            inside = self._inside(scope[:depth])
            if inside:
                # Calls around that hold no other branches (an encoder of one layer) have the name of the innermost.
                return _common([self.scopes[i] for i in inside]), inside
        return (), (number,)

    def _inside(self, call: Call) -> tuple[int, ...]:
        """Return the branches of a call that is a block, none for any other."""
        if call not in self.known:
            inside = tuple(i for i, scope in enumerate(self.scopes) if scope[: len(call)] == call)
            whole = not self._repeats(call, inside) and self._is_all_of(call, inside)
            self.known[call] = inside if whole else ()
        return self.known[call]

    def _repeats(self, call: Call, inside: Collection[int]) -> bool:
        """Whether parts of a call do the same with other weights, so that each of them is what people call a block."""
        parts = {self.scopes[i] for i in inside if self.scopes[i] != call}
        # An attention and a cross-attention of one class are two parts of a layer.
        kinds = {(re.sub(r"\d+", "*", self.modules[part][0]), self.modules[part][1]) for part in parts}
        # Elements of a list that are called in a loop of the module itself.
        masked = {self.masked[i] for i in inside}
        return len(kinds) < len(parts) or len(masked) < len(inside)

    def _is_all_of(self, call: Call, inside: Collection[int]) -> bool:
        """Whether nothing of a call multiplies and accumulates when its branches are gone."""
        own = {n for n, calls in self.heavy.items() if calls[: len(call)] == call}
        rest = own.difference(*(self.joins[i].layers for i in inside))
        if not rest:
            return True
        cut = self.cut(self.joins[i].branch for i in inside)
        return not cut.refused and rest <= cut.gone

    def _block(self, number: int, call: Call, inside: tuple[int, ...]) -> ResidualBlock:
        joins = tuple(self.joins[i] for i in inside)
        cut = self.cut(join.branch for join in joins)
        layers = {n for join in joins for n in join.layers} & self.live
        kept = sorted(layers - cut.gone, key=self.flow.order.__getitem__)
        if not cut.refused and not cut.left:
            cut = Cut(refused="no result depends on it; eliminate-dead-code erases it")
        elif not cut.refused and kept:
            cut = Cut(refused=f"others need layers of it, {where(kept[0])} first")
        name = (self.modules[call][0] if call else joins[0].module) or self.program.name
        kinds = tuple(dict.fromkeys(join.kind for join in joins))
        return ResidualBlock(number, name, kinds, inside, joins, cut)

    def _others(self, blocks: Collection[Call]) -> dict[str, str]:
        kinds = {self.modules[call][1] for call in blocks}
        found = (call for call, (_, kind) in self.modules.items() if kind in kinds and call not in blocks)
        alone = (c for c in found if not any(c == b[: len(c)] or b == c[: len(b)] for b in blocks))
        return {self.modules[call][0]: _NO_STREAM for call in alone}


def _other(node: Node, zero: Collection[Node]) -> Node | None:
    """Return the operand that a sum is equal to when others are zero, the sum itself if all are, None if there is none."""
    a, b = (*node.args[:2], None, None)[:2]
    name = base_name(node)
    if name in ("add", "sub") and a in zero and b in zero:
        return node
    if name in ("add", "sub") and b in zero:
        left = a
    elif name == "add" and a in zero and arg(node, 2, "alpha", 1) == 1:
        left = b
    elif name == "addcmul" and a not in zero:
        left = a
    else:
        return None
    return left if isinstance(left, Node) and _shape(left) is not None and _shape(left) == _shape(node) else None


def _shape(node: Node) -> list[int] | None:
    value = node.meta.get("val")
    return example_shape(value) if isinstance(value, Tensor) else None


def _stack(node: Node) -> list[tuple[str, tuple[Any, ...]]]:
    return list((node.meta.get("nn_module_stack") or {}).items())


def _calls(node: Node) -> Call:
    return tuple(key for key, _ in _stack(node))


def _modules(node: Node) -> Iterable[tuple[Call, tuple[str, Any]]]:
    """Return the calls that a node is in, outermost first, with the names and classes of their modules."""
    calls = _calls(node)
    return ((calls[: i + 1], entry[:2]) for i, (_, entry) in enumerate(_stack(node)))


def _common(calls: Collection[Call]) -> Call:
    """Return the innermost call that all of ``calls`` are in."""
    levels = takewhile(lambda level: len(set(level)) == 1, zip(*calls, strict=False))
    return tuple(level[0] for level in levels)


def _masked(layers: Iterable[Node]) -> frozenset[str]:
    """Return the names of the tensors that layers read, without the places in lists of modules."""
    names, work = set[str](), [n for layer in layers for n in layer.all_input_nodes]
    while work:
        node = work.pop()
        if node.op == "get_attr":
            names.add(str(node.target))
        elif base_name(node) in TRANSPOSED:
            work.extend(node.all_input_nodes)
    return frozenset(".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names)


__all__ = ["UNITS", "Blocks", "Cut", "ResidualBlock", "cut_branches", "residual_blocks"]
