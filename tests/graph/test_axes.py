"""The axis algebra against brute force: what is unified stays the same, however it is refined afterwards."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from graphwright.graph.axes import Axes, Axis, find, leaves
from graphwright.graph.groups import positions
from graphwright.graph.rules.base import Analysis, Resizer


@dataclass
class Pool:
    """Axes made at random, and what each of them was made of: the relations that must hold for ever."""

    data: Any
    axes: Axes = field(default_factory=Axes)
    made: list[Axis] = field(default_factory=list)
    equal: list[tuple[Axis, Axis]] = field(default_factory=list)
    joined: list[tuple[Axis, list[Axis]]] = field(default_factory=list)
    crossed: list[tuple[Axis, list[Axis]]] = field(default_factory=list)
    cut: list[tuple[Axis, Axis, int, int]] = field(default_factory=list)
    frozen: list[Axis] = field(default_factory=list)

    def draw(self, strategy: Any) -> Any:
        return self.data.draw(strategy)

    def pick(self) -> Axis:
        return self.draw(st.sampled_from(self.made))

    def step(self) -> None:
        """Make one more axis, or tie two, or freeze one."""
        kind = self.draw(st.sampled_from(("leaf", "concat", "product", "section", "unify", "unify", "every", "freeze")))
        getattr(self, kind)() if self.made else self.leaf()

    def leaf(self) -> None:
        self.made.append(self.axes.leaf(self.draw(st.sampled_from((2, 3, 4, 6, 1, 5)))))

    def concat(self) -> None:
        parts = [self.pick() for _ in range(self.draw(st.integers(1, 3)))]
        if sum(p.size for p in parts) <= 48:
            self.made.append(self.axes.concat(parts))
            self.joined.append((self.made[-1], parts))

    def product(self) -> None:
        parts = [self.pick() for _ in range(self.draw(st.integers(1, 3)))]
        if math.prod(p.size for p in parts) <= 48:
            self.made.append(self.axes.product(parts))
            self.crossed.append((self.made[-1], parts))

    def section(self) -> None:
        axis = self.pick()
        start = self.draw(st.integers(0, axis.size - 1))
        stop = self.draw(st.integers(start + 1, axis.size))
        section = self.axes.section(axis, start, stop)
        assert section is not None
        self.made.append(section)
        self.cut.append((section, axis, start, stop))

    def unify(self) -> None:
        a = self.pick()
        same = [axis for axis in self.made if axis.size == a.size]
        b = self.draw(st.sampled_from(same))
        self.axes.unify(a, b)
        self.equal.append((a, b))

    def every(self) -> None:
        """Tie an axis to a new product of its size, as a reshape does."""
        axis = self.pick()
        inner = self.draw(st.sampled_from([n for n in range(1, axis.size + 1) if axis.size % n == 0]))
        parts = [self.axes.leaf(axis.size // inner), self.axes.leaf(inner)]
        whole = self.axes.product(parts)
        self.axes.unify(whole, axis)
        self.made += parts
        self.crossed.append((whole, parts))
        self.equal.append((whole, axis))

    def freeze(self) -> None:
        axis = self.pick()
        if self.draw(st.integers(0, 3)) == 0:
            self.axes.freeze(axis, "test")
            self.frozen.append(axis)

    def free(self) -> list[Axis]:
        """Return the leaves that may lose indices."""
        found = {leaf: None for axis in self.made for leaf in leaves(axis) if leaf.frozen is None}
        return list(found)

    def resizer(self) -> Resizer:
        """Draw what stays of each free leaf."""
        rng = np.random.default_rng(self.draw(st.integers(0, 2**16)))
        keep = {}
        for leaf in self.free():
            if rng.random() < 0.7:
                keep[leaf] = np.sort(rng.choice(leaf.size, int(rng.integers(1, leaf.size + 1)), replace=False))
        return Resizer(Analysis(), keep)


def stays(rz: Resizer, axis: Axis) -> list[int]:
    kept = rz.kept(axis)
    return list(range(find(axis).size)) if kept is None else kept.tolist()


def check(pool: Pool) -> int:
    """Compare every recorded relation with index sets computed by hand; return how many indices went."""
    rz = pool.resizer()
    for a, b in pool.equal:
        assert stays(rz, a) == stays(rz, b), (a, b)
    for out, parts in pool.joined:
        offsets = np.cumsum([0, *(p.size for p in parts)]).tolist()
        want = [i + offset for part, offset in zip(parts, offsets, strict=False) for i in stays(rz, part)]
        assert stays(rz, out) == want
    for out, parts in pool.crossed:
        want = [0]
        for part in parts:
            want = [i * part.size + j for i in want for j in stays(rz, part)]
        assert stays(rz, out) == want
    for out, axis, start, stop in pool.cut:
        assert stays(rz, out) == [i - start for i in stays(rz, axis) if start <= i < stop]
    for axis in pool.frozen:
        assert rz.kept(axis) is None
    return sum(axis.size - len(stays(rz, axis)) for axis in pool.made)


def test_relations_hold_after_any_later_refinement() -> None:
    removed = 0

    @given(st.data())
    def holds(data: st.DataObject) -> None:
        nonlocal removed
        pool = Pool(data)
        for _ in range(data.draw(st.integers(2, 14))):
            pool.step()
        removed += check(pool)

    holds()
    assert removed > 0


@given(st.data())
def test_positions_are_the_indices_that_go_with_each_index_of_a_leaf(data: st.DataObject) -> None:
    pool = Pool(data)
    for _ in range(data.draw(st.integers(2, 10))):
        pool.step()
    for axis in pool.made:
        for leaf in {leaf: None for leaf in leaves(axis) if leaf.size > 1}:
            found = positions(axis, leaf)
            assert found.shape[0] == leaf.size
            for i in range(leaf.size):
                without = Resizer(Analysis(), {leaf: np.delete(np.arange(leaf.size), i)})
                assert sorted(set(range(axis.size)) - set(stays(without, axis))) == sorted(set(found[i].tolist()))


# ---------------------------------------------------------------------- chains of shape operators on unlike numbers


def test_what_survives_a_chain_of_reshapes_cats_and_slices_is_what_survived_at_its_start() -> None:
    cells = {"all": 0, "gone": 0}

    @given(st.data())
    def survives(data: st.DataObject) -> None:
        chain = Chain(data)
        for _ in range(data.draw(st.integers(1, 8))):
            chain.step()
        rz = chain.resizer()
        ids, dims = chain.history[0]
        alive = ids[np.ix_(*(stays(rz, axis) for axis in dims))]
        for ids, dims in chain.history:
            mask = np.zeros(ids.shape, dtype=bool)
            mask[np.ix_(*(stays(rz, axis) for axis in dims))] = True
            assert (mask == np.isin(ids, alive)).all()
            cells["all"] += mask.size
            cells["gone"] += int((~mask).sum())

    survives()
    assert 0 < cells["gone"] < cells["all"]


class Chain:
    """One tensor of unlike numbers, moved about by numpy, beside its dims, moved about by the algebra."""

    def __init__(self, data: st.DataObject) -> None:
        self.data, self.axes = data, Axes()
        shape = data.draw(st.lists(st.sampled_from((4, 2, 3, 6)), min_size=1, max_size=3))
        self.ids = np.arange(math.prod(shape)).reshape(shape)
        self.dims = [self.axes.leaf(size) for size in shape]
        self.history = [(self.ids, list(self.dims))]

    def step(self) -> None:
        getattr(self, self.data.draw(st.sampled_from(("reshape", "transpose", "slice", "cat", "stride"))))()
        self.history.append((self.ids, list(self.dims)))

    def integer(self, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high))

    def reshape(self) -> None:
        """Merge two neighbours, or split a dimension in two."""
        d = self.integer(0, self.ids.ndim - 1)
        shape = list(self.ids.shape)
        if d + 1 < len(shape) and self.integer(0, 1):
            shape[d : d + 2] = [shape[d] * shape[d + 1]]
        else:
            inner = self.data.draw(st.sampled_from([n for n in range(1, shape[d] + 1) if shape[d] % n == 0]))
            shape[d : d + 1] = [shape[d] // inner, inner]
        out = [self.axes.leaf(size) for size in shape]
        self.axes.unify(self.axes.product(self.dims), self.axes.product(out))
        self.ids, self.dims = self.ids.reshape(shape), out

    def transpose(self) -> None:
        order = self.data.draw(st.permutations(range(self.ids.ndim)))
        self.ids, self.dims = self.ids.transpose(order), [self.dims[i] for i in order]

    def slice(self) -> None:
        d = self.integer(0, self.ids.ndim - 1)
        start = self.integer(0, self.ids.shape[d] - 1)
        stop = self.integer(start + 1, self.ids.shape[d])
        section = self.axes.section(self.dims[d], start, stop)
        assert section is not None
        self.ids, self.dims[d] = self.ids[(slice(None),) * d + (slice(start, stop),)], section

    def cat(self) -> None:
        """Two sections of one dimension, one after the other, in either order, overlapping or not."""
        d, size = self.integer(0, self.ids.ndim - 1), 0
        size = self.ids.shape[d]
        if size > 12:
            return
        cuts = [sorted((self.integer(0, size - 1), self.integer(1, size))) for _ in range(2)]
        cuts = [(a, b if b > a else a + 1) for a, b in cuts]
        parts = [self.axes.section(self.dims[d], *cut) for cut in cuts]
        assert None not in parts
        self.ids = np.concatenate([self.ids[(slice(None),) * d + (slice(*cut),)] for cut in cuts], axis=d)
        self.dims[d] = self.axes.concat([p for p in parts if p is not None])

    def stride(self) -> None:
        """Every second index: one index of an inner factor, which is frozen."""
        d = self.integer(0, self.ids.ndim - 1)
        if self.ids.shape[d] % 2 == 0:
            outer = self.axes.leaf(self.ids.shape[d] // 2)
            self.axes.unify(self.dims[d], self.axes.product([outer, self.axes.leaf(2, "stride")]))
            self.ids, self.dims[d] = self.ids[(slice(None),) * d + (slice(None, None, 2),)], outer

    def resizer(self) -> Resizer:
        rng = np.random.default_rng(self.integer(0, 2**16))
        free = {leaf: None for _, dims in self.history for a in dims for leaf in leaves(a) if leaf.frozen is None}
        keep = {x: np.sort(rng.choice(x.size, int(rng.integers(1, x.size + 1)), replace=False)) for x in free}
        return Resizer(Analysis(), keep)
