"""The axis algebra: what a dimension of a tensor is made of.

Every dimension of every tensor has an `Axis`. An axis is a *leaf* (the unit in which indices are removed), a
*concat* of axes one after the other, or a row-major *product* of axes, outermost first. Axes live in a
union-find: `Axes.unify` makes two of them the same, refining leaves as needed:

    heads * head_dim meets a leaf of 32      the leaf becomes Product(heads 4, head_dim 8), everywhere at once
    a leaf of 32 is sliced at 16             the leaf becomes Concat(16, 16)
    Concat(a, b) meets Concat(c, d)          both are cut at the union of their cut points, piece by piece

What cannot be aligned is frozen with the reason. Every refinement splits a finite leaf, so unification ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import sympy
from torch.fx import Node

# A size is an int, or a symbolic expression for a dynamic dimension (which is always frozen).
Size = Any

LEAF, CONCAT, PRODUCT = 0, 1, 2

# Why an axis of symbolic size is frozen. Its static factors are not: batch times heads freezes the batch only.
DYNAMIC = "dynamic dimension"

# A concat finer than this freezes: constant reorderings can explode an axis into single indices.
MAX_PIECES = 256


class Reason(NamedTuple):
    """Why an axis is frozen, in words for a person, and the node where it was found."""

    text: str
    node: Node | None


class Axis:
    """One axis expression; always look at it through `find`."""

    __slots__ = ("frozen", "kind", "parent", "parts", "size")

    def __init__(self, size: Size, kind: int = LEAF, parts: tuple[Axis, ...] = ()) -> None:
        self.size = size
        self.kind = kind
        self.parts = parts
        self.parent: Axis | None = None
        self.frozen: Reason | None = None

    def __repr__(self) -> str:
        axis = find(self)
        if axis.kind == LEAF:
            return f"{axis.size}{'!' if axis.frozen else ''}@{id(axis) % 9973}"
        name = "Concat" if axis.kind == CONCAT else "Product"
        return f"{name}({', '.join(map(repr, axis.parts))})"


def find(axis: Axis) -> Axis:
    """Return the representative of ``axis``, compressing the path to it."""
    root = axis
    while root.parent is not None:
        root = root.parent
    while axis.parent is not None:
        axis.parent, axis = root, axis.parent
    return root


def pieces(axis: Axis) -> list[Axis]:
    """Return the pieces of a concat, nested concats flattened; any other axis is its own one piece."""
    return _flat(axis, (CONCAT,))


def factors(axis: Axis) -> list[Axis]:
    """Return the factors of a product, outermost first, nested products flattened, sizes of 1 dropped."""
    return _flat(axis, (PRODUCT,))


def leaves(axis: Axis) -> Iterator[Axis]:
    """Yield the leaves of ``axis`` in order, repeated ones as often as they occur."""
    yield from _flat(axis, (CONCAT, PRODUCT))


def _flat(axis: Axis, kinds: tuple[int, ...]) -> list[Axis]:
    """Return the parts of ``axis`` in order, those of ``kinds`` replaced by their own; nesting may be deep."""
    out, todo = [], [axis]
    while todo:
        axis = find(todo.pop())
        if axis.kind in kinds:
            todo.extend(reversed(axis.parts))
        else:
            out.append(axis)
    return out


@lru_cache(maxsize=4096)
def _symbolic_quotient(a: Size, b: Size) -> Size | None:
    quotient = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
    numerator, denominator = quotient.as_numer_denom()
    if denominator != 1 or numerator == 1:
        return None
    return int(numerator) if numerator.is_Integer else numerator


def quotient(a: Size, b: Size) -> Size | None:
    """Return ``a / b`` where it is whole and above 1, else None. Sizes may be symbolic."""
    if type(a) is int and type(b) is int:
        return a // b if b and a % b == 0 and a > b else None
    if type(a) is int:
        return None
    return _symbolic_quotient(a, b)


def total(sizes: Sequence[Size]) -> Size:
    """Return the product of ``sizes``."""
    out: Size = 1
    for size in sizes:
        out = out * size
    return out


class Axes:
    """Makes, refines and unifies axes.

    ``node`` is the operator being analysed; every freezing reason carries it.
    """

    def __init__(self) -> None:
        self.node: Node | None = None

    def leaf(self, size: Size, frozen: str | None = None) -> Axis:
        """Make a new leaf. A size of 1 and a symbolic size are frozen from the start."""
        axis = Axis(size)
        if frozen is not None:
            axis.frozen = Reason(frozen, self.node)
        elif size == 1:
            axis.frozen = Reason("size 1", self.node)
        elif type(size) is not int:
            axis.frozen = Reason(DYNAMIC, self.node)
        return axis

    def concat(self, parts: Sequence[Axis]) -> Axis:
        """Return ``parts`` one after the other; empty ones vanish."""
        flat = [piece for part in parts for piece in pieces(part) if not (type(piece.size) is int and piece.size == 0)]
        if len(flat) == 1:
            return flat[0]
        if not flat:
            return self.leaf(0, "empty")
        return Axis(sum(piece.size for piece in flat), CONCAT, tuple(flat))

    def product(self, parts: Sequence[Axis]) -> Axis:
        """Return the row-major product of ``parts``, outermost first; sizes of 1 vanish."""
        flat = [f for part in parts for f in factors(part) if not (type(f.size) is int and f.size == 1)]
        if len(flat) == 1:
            return flat[0]
        if not flat:
            return self.leaf(1)
        return Axis(total([f.size for f in flat]), PRODUCT, tuple(flat))

    def freeze(self, axis: Axis, reason: str | Reason) -> None:
        """Make no index of ``axis`` removable. The first reason stays, unless it was only that a size is dynamic."""
        why = reason if isinstance(reason, Reason) else Reason(reason, self.node)
        todo = [axis]
        while todo:
            axis = find(todo.pop())
            dynamic = axis.frozen is not None and axis.frozen.text == DYNAMIC and why.text != DYNAMIC
            if axis.frozen is None or dynamic:
                axis.frozen = why
                todo.extend(reversed(axis.parts))

    def freeze_all(self, dims: Sequence[Axis], reason: str) -> None:
        """Freeze every axis of ``dims``."""
        for axis in dims:
            self.freeze(axis, reason)

    def cut(self, axis: Axis, offset: int) -> tuple[Axis, Axis] | None:
        """Return ``axis[:offset]`` and ``axis[offset:]``; None where the sizes are symbolic."""
        axis = find(axis)
        if type(axis.size) is not int or not 0 < offset < axis.size:
            return None
        left, right = self.leaf(offset), self.leaf(axis.size - offset)
        if axis.frozen is not None:  # what keeps all indices anyway need not be refined (thousands of time steps)
            left.frozen = right.frozen = axis.frozen
            return left, right
        if axis.kind == LEAF:
            self._refine(axis, CONCAT, (left, right))
            return left, right
        if axis.kind == CONCAT:
            return self._cut_concat(axis, offset)
        return self._cut_product(axis, offset)

    def section(self, axis: Axis, start: int, stop: int) -> Axis | None:
        """Return ``axis[start:stop]``, cutting it there; None where the sizes are symbolic."""
        if type(find(axis).size) is not int:
            return None
        if start >= stop:
            return self.leaf(0, "empty")
        if stop < find(axis).size:
            both = self.cut(axis, stop)
            assert both is not None
            axis = both[0]
        if start > 0:
            both = self.cut(axis, start)
            assert both is not None
            axis = both[1]
        return axis

    def unify(self, a: Axis, b: Axis) -> None:
        """Make ``a`` and ``b`` the same axis, refining both; freeze what does not align."""
        a, b = find(a), find(b)
        if a is b:
            return
        if a.size != b.size:
            self._freeze_both(a, b, f"sizes {a.size} and {b.size} are tied by an operator")
        elif a.kind == LEAF or b.kind == LEAF:
            if a.kind != LEAF:
                a, b = b, a
            self._link(a, b)
        elif a.kind == PRODUCT and b.kind == PRODUCT:
            self._unify_products(a, b)
        elif a.kind == CONCAT and b.kind == CONCAT:
            self._unify_concats(a, b)
        elif a.kind == PRODUCT:
            self._unify_mixed(a, b)
        else:
            self._unify_mixed(b, a)

    def unify_all(self, first: Sequence[Axis], second: Sequence[Axis]) -> None:
        """Unify two lists of the same length, pair by pair."""
        for a, b in zip(first, second, strict=True):
            self.unify(a, b)

    # ------------------------------------------------------------------ refinement

    def _refine(self, leaf: Axis, kind: int, parts: tuple[Axis, ...]) -> None:
        leaf.kind, leaf.parts = kind, parts
        reason, leaf.frozen = leaf.frozen, None
        if reason is not None and reason.text != DYNAMIC:
            self.freeze(leaf, reason)

    def _freeze_both(self, a: Axis, b: Axis, reason: str) -> None:
        self.freeze(a, reason)
        self.freeze(b, reason)

    def _cut_concat(self, axis: Axis, offset: int) -> tuple[Axis, Axis] | None:
        parts = pieces(axis)
        left: list[Axis] = []
        for i, part in enumerate(parts):
            if offset == 0:
                return self.concat(left), self.concat(parts[i:])
            if offset < part.size:
                both = self.cut(part, offset)
                if both is None:
                    return None
                return self.concat([*left, both[0]]), self.concat([both[1], *parts[i + 1 :]])
            left.append(part)
            offset -= part.size
        raise AssertionError("offset lies within the axis")

    def _cut_product(self, axis: Axis, offset: int) -> tuple[Axis, Axis] | None:
        outer, *inner = factors(axis)
        rest = self.product(inner)
        block, within = divmod(offset, rest.size)
        if within == 0:
            both = self.cut(outer, block)
            return both and (self.product([both[0], rest]), self.product([both[1], rest]))
        # The cut falls inside one block of the outer factor: that block stands alone, and `rest` is cut too.
        before = self.section(outer, 0, block)
        after = self.section(outer, block + 1, outer.size)
        both = self.cut(rest, within)
        if before is None or after is None or both is None:
            return None
        left = [self.product([before, rest])] if before.size else []
        right = [self.product([after, rest])] if after.size else []
        return self.concat([*left, both[0]]), self.concat([both[1], *right])

    # ------------------------------------------------------------------ unification of composites

    def _unify_products(self, a: Axis, b: Axis) -> None:
        left, right = factors(a), factors(b)
        i = j = 0
        while i < len(left) and j < len(right):
            p, q = find(left[i]), find(right[j])
            if p.size == q.size:
                self.unify(p, q)
                i, j = i + 1, j + 1
                continue
            if (ratio := quotient(p.size, q.size)) is not None:
                left[i : i + 1] = self._split(p, q.size, ratio)
            elif (ratio := quotient(q.size, p.size)) is not None:
                right[j : j + 1] = self._split(q, p.size, ratio)
            else:
                i, j = self._freeze_unaligned(left, right, i, j)
        for rest in (*left[i:], *right[j:]):
            self.freeze(rest, "a reshape whose sizes do not align")
        if find(a) is not find(b):
            self._link(find(a), find(b))

    def _split(self, axis: Axis, outer: Size, inner: Size) -> list[Axis]:
        """Write ``axis`` as a product of ``outer`` and ``inner``."""
        parts = (self.leaf(outer), self.leaf(inner))
        if axis.kind == LEAF:
            self._refine(axis, PRODUCT, parts)
        else:
            self.unify(axis, Axis(axis.size, PRODUCT, parts))
        return list(parts)

    def _freeze_unaligned(self, left: list[Axis], right: list[Axis], i: int, j: int) -> tuple[int, int]:
        """Freeze both sides up to the next point where their running sizes agree."""
        lead, tail = left[i].size, right[j].size
        start = (i, j)
        i, j = i + 1, j + 1
        while lead != tail:
            shorter_left = bool(lead < tail) if type(lead) is int and type(tail) is int else i < len(left)
            if shorter_left and i < len(left):
                lead, i = lead * left[i].size, i + 1
            elif j < len(right):
                tail, j = tail * right[j].size, j + 1
            else:
                i, j = len(left), len(right)
                break
        for axis in (*left[start[0] : i], *right[start[1] : j]):
            self.freeze(axis, "a reshape whose sizes do not align")
        return i, j

    def _unify_concats(self, a: Axis, b: Axis) -> None:
        left, right = pieces(a), pieces(b)
        i = 0
        while i < len(left):
            # What was unified before may have refined what comes now.
            left[i : i + 1], right[i : i + 1] = pieces(left[i]), pieces(right[i])
            p, q = left[i], right[i]
            if p.size == q.size:
                self.unify(p, q)
                i += 1
                continue
            if type(p.size) is not int or type(q.size) is not int:
                self._freeze_both(a, b, "a concatenation of dynamic sizes")
                return
            # A product stays one piece of its concat when it is cut, so it is replaced in the list.
            longer, at = (left, q.size) if p.size > q.size else (right, p.size)
            both = self.cut(longer[i], at)
            assert both is not None
            longer[i : i + 1] = both
            if max(len(left), len(right)) > MAX_PIECES:
                break
        if i < len(left) or max(len(pieces(a)), len(pieces(b))) > MAX_PIECES:
            self._freeze_both(a, b, "a reordering too fine to follow")
        a, b = find(a), find(b)
        if a is not b:
            self._link(a, b)

    def _unify_mixed(self, product: Axis, concat: Axis) -> None:
        rest = product
        parts = pieces(concat)
        for part in parts[:-1]:
            size = find(part).size
            both = self.cut(rest, size) if type(size) is int else None
            if both is None:
                self._freeze_both(product, concat, "a concatenation of dynamic sizes")
                return
            self.unify(both[0], part)
            rest = both[1]
        self.unify(rest, parts[-1])
        a, b = find(concat), find(product)
        if a is not b:
            self._link(a, b)

    def _link(self, a: Axis, b: Axis) -> None:
        """Point ``a``, a leaf or a composite whose parts are those of ``b`` by now, at ``b``."""
        a.parent = b
        if a.frozen is not None and not (a.frozen.text == DYNAMIC and b.kind != LEAF):
            self.freeze(b, a.frozen)
