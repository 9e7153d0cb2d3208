"""Random chains of operators: what one rule refines, every other rule's literals must follow.

Each operator is tested alone by the law of ``rule_oracle``. Here up to ten of them work on shared tensors, so that an
axis is cut, merged and tied after an earlier operator has already looked at it.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_oracle import aten
from torch import Tensor
from torch.fx import Graph, Node, map_arg

from graphwright.graph.axes import Axis, leaves
from graphwright.graph.rules import Analysis, Resizer, rule_for

MAX_SIZE = 300


class Net:
    """A graph that grows by random operators, run and analysed as it grows."""

    def __init__(self, data: st.DataObject) -> None:
        self.data, self.graph, self.analysis = data, Graph(), Analysis()
        self.generator = torch.Generator().manual_seed(0)
        self.inputs: dict[Node, Tensor] = {}
        self.values: dict[Node, Any] = {}
        self.tensors: list[Node] = []
        for _ in range(self.integer(1, 2)):
            self.tensors.append(self.leaf(*(self.pick(4, 2, 3, 6) for _ in range(self.integer(1, 3)))))

    def integer(self, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high))

    def pick(self, *values: Any) -> Any:
        return self.data.draw(st.sampled_from(values))

    def leaf(self, *shape: int, weight: bool = False) -> Node:
        """Add an operand with axes of its own."""
        node = self.graph.placeholder(f"x{len(self.inputs)}")
        value = torch.randn(shape, dtype=torch.float64, generator=self.generator)
        self.inputs[node] = self.values[node] = node.meta["val"] = value
        self.analysis.dims[node] = self.analysis.fresh(value)
        if weight:
            self.analysis.weights.add(node)
            self.analysis.parameters.add(node)
        return node

    def add(self, target: Any, *args: Any) -> Node:
        """Add one operator."""
        node = self.graph.call_function(target, args)
        plain, _ = map_arg((node.args, node.kwargs), lambda n: self.values[n])
        self.values[node] = node.meta["val"] = target(*plain)
        self.analysis.node = node
        rule = rule_for(target)
        assert rule is not None
        self.analysis.dims[node] = rule.axes(self.analysis, node)
        if isinstance(self.values[node], Tensor):
            self.tensors.append(node)
        return node

    def step(self) -> None:
        x = self.pick(*self.tensors)
        shape = list(self.values[x].shape)
        kinds = [self.regroup, self.permute, self.stretch, self.tie, self.gate]
        if shape:
            kinds += [self.cut, self.cut, self.join, self.split, self.project, self.repeat, self.drop]
        self.pick(*kinds)(x, shape)

    def dim(self, shape: list[int]) -> int:
        return self.integer(-len(shape), len(shape) - 1)

    def regroup(self, x: Node, shape: list[int]) -> None:
        size, new = math.prod(shape), []
        while size > 1 and len(new) < 3:
            new.append(self.pick(*[n for n in range(2, size + 1) if size % n == 0]))
            size //= new[-1]
        self.add(aten.reshape.default, x, [*new, size])

    def permute(self, x: Node, shape: list[int]) -> None:
        self.add(aten.permute.default, x, self.data.draw(st.permutations(range(len(shape)))))

    def stretch(self, x: Node, shape: list[int]) -> None:
        if math.prod(shape) * 2 <= MAX_SIZE and len(shape) < 4:
            wide = self.add(aten.unsqueeze.default, x, 0)
            self.add(aten.expand.default, wide, [2, *shape])

    def tie(self, x: Node, shape: list[int]) -> None:
        same = [t for t in self.tensors if list(self.values[t].shape) == shape]
        self.add(self.pick(aten.add.Tensor, aten.mul.Tensor), x, self.pick(*same))

    def gate(self, x: Node, shape: list[int]) -> None:
        even = [d for d, size in enumerate(shape) if size % 2 == 0]
        if even:
            self.add(aten.glu.default, x, self.pick(*even))

    def cut(self, x: Node, shape: list[int]) -> None:
        d = self.dim(shape)
        start = self.integer(0, shape[d] - 1)
        self.add(aten.slice.Tensor, x, d, start, self.integer(start + 1, shape[d]), self.pick(1, 1, 1, 2))

    def join(self, x: Node, shape: list[int]) -> None:
        d = self.dim(shape)
        fits = [t for t in self.tensors if _without(self.values[t].shape, d) == _without(shape, d)]
        both = [x, self.pick(*fits)]
        if sum(self.values[t].numel() for t in both) <= MAX_SIZE:
            self.add(aten.cat.default, both if self.integer(0, 1) else both[::-1], d)

    def split(self, x: Node, shape: list[int]) -> None:
        d = self.dim(shape)
        parts = self.add(aten.split.Tensor, x, self.integer(1, shape[d]), d)
        for i in range(min(2, len(self.values[parts]))):
            self.add(operator.getitem, parts, i)

    def project(self, x: Node, shape: list[int]) -> None:
        self.add(aten.linear.default, x, self.leaf(self.pick(4, 2, 6), shape[-1], weight=True))

    def repeat(self, x: Node, shape: list[int]) -> None:
        if math.prod(shape) * 2 <= MAX_SIZE:
            d = self.dim(shape)
            times = [2 if i == d % len(shape) else 1 for i in range(len(shape))]
            if self.integer(0, 1):
                self.add(aten.repeat_interleave.self_int, x, 2, d)
            else:
                self.add(aten.repeat.default, x, times)

    def drop(self, x: Node, shape: list[int]) -> None:
        d = self.dim(shape)
        self.add(aten.select.int, x, d, self.integer(-shape[d], shape[d] - 1))

    def keep(self) -> dict[Axis, np.ndarray]:
        rng = np.random.default_rng(self.integer(0, 2**16))
        nodes = (self.analysis.of(n) for n in (*self.inputs, *self.tensors))
        free = {leaf: None for dims in nodes for axis in dims for leaf in leaves(axis) if leaf.frozen is None}
        return {
            leaf: np.sort(rng.choice(leaf.size, int(rng.integers(1, leaf.size + 1)), replace=False))
            for leaf in free
            if rng.random() < 0.8
        }


def _without(shape: Any, d: int) -> list[int] | None:
    """Return a shape without one dimension, by a negative number; None where it has no such dimension."""
    shape = list(shape)
    if not -len(shape) <= d < len(shape):
        return None
    del shape[d]
    return shape


def cut(rz: Resizer, dims: Any, value: Tensor) -> Tensor:
    for d, axis in enumerate(dims):
        if (kept := rz.kept(axis)) is not None:
            value = value.index_select(d, torch.as_tensor(kept))
    return value


def masked(net: Net, rz: Resizer) -> dict[Node, Tensor]:
    """Return the inputs with every removed index of a weight set to zero."""
    out = dict(net.inputs)
    for node in net.analysis.parameters:
        for d, axis in enumerate(net.analysis.of(node)):
            if (kept := rz.kept(axis)) is not None:
                gone = np.setdiff1d(np.arange(axis.size), kept)
                out[node] = out[node].index_fill(d, torch.from_numpy(gone), 0)
    return out


def run(net: Net, inputs: dict[Node, Tensor]) -> dict[Node, Any]:
    env: dict[Node, Any] = dict(inputs)
    for node in net.graph.nodes:
        if node.op == "call_function":
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: env[n])
            env[node] = node.target(*args, **kwargs)
    return env


def test_every_tensor_of_a_random_chain_commutes_with_removal() -> None:
    tally = {"changed": 0, "tensors": 0}

    @settings(max_examples=5 * settings().max_examples)
    @given(st.data())
    def law(data: st.DataObject) -> None:
        net = Net(data)
        for _ in range(data.draw(st.integers(1, 10))):
            net.step()
        rz = Resizer(net.analysis, net.keep())
        inputs = masked(net, rz)
        before = run(net, inputs)
        for node in net.graph.nodes:
            rule = rule_for(node.target) if node.op == "call_function" else None
            if rule is not None and rule.resize is not None:
                rule.resize(rz, node)
        after = run(net, {node: cut(rz, net.analysis.of(node), value) for node, value in inputs.items()})
        for node in net.tensors:
            dims = net.analysis.of(node)
            want = cut(rz, dims, before[node])
            assert tuple(axis.size for axis in dims) == tuple(before[node].shape), node.format_node()
            assert after[node].shape == want.shape, node.format_node()
            torch.testing.assert_close(after[node], want, rtol=1e-10, atol=1e-10)
            tally["changed"] += want.shape != before[node].shape
            tally["tensors"] += 1

    law()
    assert tally["changed"] > tally["tensors"] / 4
