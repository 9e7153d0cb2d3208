"""Where a U-shaped network's streams meet again: its skip connections, and where each can be cut.

Found from the graph alone. A *heavy* node is one that multiplies and accumulates (convolution, linear layer, attention);
sets of them are bitsets, so the search takes nodes times heavy nodes / 64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.fx import Node

from .cost import cost, example_shape
from .dataflow import Dataflow, dataflow
from .errors import module_path
from .operators import base_name
from .program import Program
from .residuals import ResidualJoin, residual_joins

CONCATENATIONS = frozenset({"cat", "concat", "concatenate"})


@dataclass(frozen=True)
class SkipJoin:
    """A concatenation of a decoder's main path with a skip connection.

    Attributes:
        branch: Number of the skip connection, from the shallowest (that of the output) on.
        node: The concatenation.
        main: Its operand that comes from the deeper layers.
        skip: Its other operand; of several the one that comes from the deepest layers.
        cut: What to keep so that nothing beyond the skip connection runs: ``main``, or, where that is not the only way
            from there to the results, the node before it that is.
        module: Fully qualified name of the module that joins them, for reports.
    """

    branch: int
    node: Node
    main: Node
    skip: Node
    cut: Node
    module: str


@dataclass(frozen=True)
class _Candidate:
    """A concatenation whose ``skip`` carries some of the heavy ancestors of its ``main``, and no others."""

    node: Node
    main: Node
    skip: Node
    above_main: int
    above_skip: int


def skip_joins(program: Program) -> tuple[SkipJoin, ...]:
    """Return the skip connections, the shallowest first.

    A concatenation joins a skip connection if the heavy ancestors of one operand are all of those of the others and
    more: what the main path computes beyond the skip is what a reuse step leaves out. That the skip is itself an
    ancestor of the main path is not asked for: residuals of a ControlNet are added to it. Only layers that the sample
    goes through count, so that a map of times or classes is no skip. A skip that has layers of its own, or that is
    weighed by the main path, is none either.

    The skip connections of a U lie one within the other. Concatenations that are not part of the longest such nest
    (of dense blocks, of small U-shapes inside of one level, of another U before) are none of its skip connections.

    Args:
        program: Any program; on the ``meta`` device too.
    """
    flow, samples = dataflow(program), set(_samples(program))
    carries = flow.ancestors(lambda node: int(node in samples))
    names = {n.node: n.macs for n in cost(program).nodes if n.macs}
    macs = {node: names[node.name] for node in flow.order if node.name in names and carries[node]}
    number = {node: 1 << i for i, node in enumerate(macs)}
    above = flow.ancestors(lambda node: number.get(node, 0))
    found = [join for join in _candidates(flow, above) if not _is_gate(join, flow, macs)]
    nest = _longest_nest(found, flow)
    cuts = _Cuts(flow, number, above)
    return tuple(
        SkipJoin(i, join.node, join.main, join.skip, cuts.of(join), module_path(join.node)[0])
        for i, join in enumerate(nest)
    )


def _samples(program: Program) -> list[Node]:
    """Return the inputs that have the shape of a result but for one dimension, the channels; all inputs if none has."""
    inputs = program.graph_module.graph.find_nodes(op="placeholder")
    results = [shape for node in _results(program) if (shape := _shape(node)) is not None]

    def alike(shape: list[int] | None) -> bool:
        return shape is not None and any(
            len(shape) == len(result) > 1 and sum(a != b for a, b in zip(shape, result, strict=True)) <= 1
            for result in results
        )

    return [node for node in inputs if alike(_shape(node))] or inputs


def _results(program: Program) -> list[Node]:
    return next(iter(reversed(program.graph_module.graph.nodes))).all_input_nodes


def _shape(node: Node) -> list[int] | None:
    value = node.meta.get("val")
    return example_shape(value) if isinstance(value, Tensor) else None


def _candidates(flow: Dataflow, above: dict[Node, int]) -> Iterator[_Candidate]:
    for node in flow.order:
        operands = node.args[0] if base_name(node) in CONCATENATIONS else ()
        if not isinstance(operands, (list, tuple)):
            continue
        tensors = sorted((n for n in operands if isinstance(n, Node)), key=lambda n: above[n].bit_count())
        skips = [n for n in tensors[:-1] if above[n]]
        if not skips:
            continue
        main, most = tensors[-1], above[tensors[-1]]
        if all(not above[n] & ~most and above[n] != most for n in skips):
            yield _Candidate(node, main, skips[-1], most, above[skips[-1]])


def _is_gate(join: _Candidate, flow: Dataflow, macs: dict[Node, int]) -> bool:
    """Whether ``main`` is a skip connection that the decoder's main path, here ``skip``, weighs (an attention gate).

    Then the operand with fewer layers above is the main one: without it more is left to do than without the other, and
    what lies above it reaches the other on another way too.
    """
    if join.skip not in flow.sources(join.main):
        return False
    around = flow.sources(join.main, {join.skip})
    if not any(n in around for n in flow.sources(join.skip) if n in macs):
        return False
    without_main, without_skip = (flow.live({n}) for n in (join.main, join.skip))
    return sum(macs[n] for n in macs if n in without_main) > sum(macs[n] for n in macs if n in without_skip)


def _longest_nest(candidates: list[_Candidate], flow: Dataflow) -> list[_Candidate]:
    """Return the longest chain of concatenations that lie one within the other, outermost first.

    One lies within another if it comes before the other's main path and branches off after the other's skip. Of
    chains of one length the one that spans more heavy nodes is taken.
    """
    ends = {join.node: 1 << i for i, join in enumerate(candidates)}
    before = flow.ancestors(lambda node: ends.get(node, 0))
    best: list[tuple[int, int, int | None]] = []  # for every candidate as the outermost: length, span, the next inside
    for i, outer in enumerate(candidates):
        span = (outer.above_main & ~outer.above_skip).bit_count()
        inside = [
            k
            for k, inner in enumerate(candidates[:i])
            if before[outer.main] & ends[inner.node]
            and not before[outer.skip] & ends[inner.node]
            and not outer.above_skip & ~inner.above_skip
        ]
        deepest = max(inside, key=lambda k: best[k][:2], default=None)
        best.append((1 if deepest is None else best[deepest][0] + 1, span, deepest))
    at = max(range(len(best)), key=lambda k: best[k][:2], default=None)
    nest = []
    while at is not None:
        nest.append(candidates[at])
        at = best[at][2]
    return nest


class _Cuts:
    """Finds where the layers beyond a skip connection can be cut off."""

    def __init__(self, flow: Dataflow, number: dict[Node, int], above: dict[Node, int]) -> None:
        self.flow, self.number, self.above = flow, number, above
        self._after: dict[Node, tuple[int, Node | None]] | None = None

    def of(self, join: _Candidate) -> Node:
        """Return the last node on the main path without which no layer beyond the skip reaches a result."""
        if self._cuts_off(join.main, join):
            return join.main
        beyond = join.above_main & ~join.above_skip
        first = next(node for node, bit in self.number.items() if bit & beyond)
        on_path = self.flow.sources(join.main)
        all_ways = [n for n in self._on_all_ways(first) if n in on_path and isinstance(n.meta.get("val"), Tensor)]
        return next((n for n in reversed(all_ways) if self._cuts_off(n, join)), join.main)

    def _cuts_off(self, node: Node, join: _Candidate) -> bool:
        beyond = self.above[node] & ~join.above_skip
        return bool(beyond) and not any(self.number.get(n, 0) & beyond for n in self.flow.live({node}))

    def _on_all_ways(self, node: Node) -> list[Node]:
        """Return the nodes that lie on all ways from ``node`` to the results, the nearest first."""
        if self._after is None:
            self._after = _post_dominators(self.flow)
        found: list[Node] = []
        at: Node | None = node
        while at is not None and at in self._after:
            found.append(at)
            at = self._after[at][1]
        return found


def _post_dominators(flow: Dataflow) -> dict[Node, tuple[int, Node | None]]:
    """Return, for every live node, the first one after it that lies on all its ways to the results, None at their end.

    With it comes its depth: how many such nodes there are.
    """
    live = flow.live()
    users: dict[Node, list[Node]] = {node: [] for node in live}
    for node in live:
        for source in flow.reads[node]:
            users[source].append(node)
    after: dict[Node, tuple[int, Node | None]] = {}
    for node in sorted(live, key=flow.order.__getitem__, reverse=True):
        common = None if flow.is_seen(node) else _common(users[node], after)
        after[node] = (1 if common is None else after[common][0] + 1, common)
    return after


def _common(nodes: Iterable[Node], after: dict[Node, tuple[int, Node | None]]) -> Node | None:
    """Return the first node on all ways from all of ``nodes``."""
    first, *others = nodes
    found: Node | None = first
    for other in others:
        at: Node | None = other
        while found is not at:
            if found is None or at is None:
                return None
            if after[found][0] >= after[at][0]:
                found = after[found][1]
            else:
                at = after[at][1]
    return found


__all__ = ["ResidualJoin", "SkipJoin", "residual_joins", "skip_joins"]
