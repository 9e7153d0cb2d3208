"""Refinement of axes, case by case: what becomes what, what freezes and why."""

from __future__ import annotations

import math

import pytest
import sympy

from graphwright.graph.axes import LEAF, MAX_PIECES, PRODUCT, Axes, Axis, factors, find, leaves, pieces, quotient


def why(axis: Axis) -> str:
    """Return why an axis is frozen, an empty string if it is not."""
    reason = find(axis).frozen
    return "" if reason is None else reason.text


def test_leaf_that_meets_a_product_becomes_it_everywhere() -> None:
    axes = Axes()
    width, heads, dim = axes.leaf(32), axes.leaf(4), axes.leaf(8)
    seen_before = axes.concat([width, axes.leaf(3)])
    axes.unify(width, axes.product([heads, dim]))
    assert factors(width) == [heads, dim]
    assert list(leaves(seen_before))[:2] == [heads, dim]


def test_products_align_on_common_factors() -> None:
    axes = Axes()
    a, b = [axes.leaf(s) for s in (6, 4)], [axes.leaf(s) for s in (2, 12)]
    axes.unify(axes.product(a), axes.product(b))
    assert [f.size for f in factors(a[0])] == [2, 3]
    assert [f.size for f in factors(b[1])] == [3, 4]
    assert factors(a[0])[1] is factors(b[1])[0]
    assert not any(leaf.frozen for axis in (*a, *b) for leaf in leaves(axis))


def test_products_that_do_not_align_freeze_only_there() -> None:
    axes = Axes()
    a, b = [axes.leaf(s) for s in (5, 6, 4, 7)], [axes.leaf(s) for s in (5, 4, 6, 7)]
    axes.unify(axes.product(a), axes.product(b))
    assert [axis.frozen is not None for axis in map(find, a)] == [False, True, True, False]
    assert "align" in why(a[1])
    assert find(a[0]) is find(b[0]) and find(a[3]) is find(b[3])


def test_concat_of_equal_pieces_that_meets_a_product_unifies_them() -> None:
    axes = Axes()
    gates = [axes.leaf(5) for _ in range(4)]
    packed = axes.concat(gates)
    axes.unify(packed, axes.product([axes.leaf(4), axes.leaf(5)]))
    assert len({find(gate) for gate in gates}) == 1
    assert find(gates[0]).frozen is None


def test_concats_are_cut_at_each_others_bounds() -> None:
    axes = Axes()
    a, b = [axes.leaf(s) for s in (5, 7)], [axes.leaf(s) for s in (8, 4)]
    axes.unify(axes.concat(a), axes.concat(b))
    assert [p.size for p in pieces(a[1])] == [3, 4] and [p.size for p in pieces(b[0])] == [5, 3]
    assert find(pieces(a[1])[0]) is find(pieces(b[0])[1])


@pytest.mark.parametrize("sizes", [(4, 4), (4, 6), (3, 5), (13, 21), (89, 144)])
def test_cyclic_concats_end_in_pieces_of_the_common_divisor(sizes: tuple[int, int]) -> None:
    axes = Axes()
    a, b = axes.leaf(sizes[0]), axes.leaf(sizes[1])
    axes.unify(axes.concat([a, b]), axes.concat([b, a]))  # a rotation, as roll() would make it
    step = math.gcd(*sizes)
    for axis in (a, b):
        assert {leaf.size for leaf in leaves(axis)} == {step}
    assert len({leaf for axis in (a, b) for leaf in leaves(axis)}) == 1


def test_reordering_too_fine_to_follow_freezes() -> None:
    axes = Axes()
    a, b = axes.leaf(2 * 233), axes.leaf(2 * 377)
    axes.unify(axes.concat([a, b]), axes.concat([b, a]))
    assert (a.size + b.size) // 2 > MAX_PIECES
    assert all(leaf.frozen is not None for axis in (a, b) for leaf in leaves(axis))
    assert "too fine" in why(next(leaves(a)))


def test_shift_by_one_ties_all_indices() -> None:
    axes = Axes()
    x = axes.leaf(50)
    head, tail = axes.section(x, 0, 49), axes.section(x, 1, 50)
    assert head is not None and tail is not None
    axes.unify(head, tail)
    assert len(set(leaves(x))) == 1 and len(list(leaves(x))) == 50


def test_thousands_of_cuts_do_not_exhaust_the_stack() -> None:
    axes = Axes()
    x, time = axes.leaf(3000), axes.leaf(3000, "time steps")
    for i in range(3000):
        section = axes.section(time, i, i + 1)
        assert section is not None and why(section) == "time steps"
    for i in range(0, 2000, 2):
        axes.section(x, i, i + 2)
    assert len(list(leaves(x))) == 1001 and len(list(leaves(time))) == 1
    axes.freeze(x, "test")
    assert all(leaf.frozen is not None for leaf in leaves(x))


def test_concat_that_cuts_a_product_of_the_other_ends() -> None:
    axes = Axes()
    product = axes.product([axes.leaf(3), axes.leaf(4)])
    a, b = axes.concat([product, axes.leaf(2)]), axes.concat([axes.leaf(4), axes.leaf(10)])
    axes.unify(a, b)
    assert [leaf.size for leaf in leaves(b)] == [4, 2, 4, 2]
    assert not any(leaf.frozen for leaf in leaves(a) if leaf.size > 1)


def test_sizes_that_differ_freeze_both() -> None:
    axes = Axes()
    a, b = axes.leaf(3), axes.leaf(4)
    axes.unify(a, b)
    assert "3 and 4" in why(a) and b.frozen is not None


def test_first_reason_stays_and_reaches_what_is_refined_later() -> None:
    axes = Axes()
    x = axes.leaf(12)
    axes.freeze(x, "first")
    axes.freeze(x, "second")
    left, right = axes.cut(x, 5) or (x, x)
    axes.unify(left, axes.leaf(5))
    product = axes.product([axes.leaf(7)])
    axes.unify(product, right)
    assert {why(leaf) for leaf in (*leaves(x), *leaves(product))} == {"first"}


def test_unification_freezes_across() -> None:
    axes = Axes()
    frozen, composite = (
        axes.leaf(12, "outside"),
        axes.product([axes.leaf(3), axes.concat([axes.leaf(1), axes.leaf(3)])]),
    )
    axes.unify(composite, frozen)
    assert all(leaf.frozen is not None for leaf in leaves(composite))


def test_section_outside_a_cut_is_empty_and_whole() -> None:
    axes = Axes()
    x = axes.leaf(6)
    empty = axes.section(x, 4, 2)
    assert empty is not None and empty.size == 0
    assert axes.section(x, 0, 6) is x
    assert axes.cut(x, 0) is None and axes.cut(x, 6) is None
    assert find(x).kind == LEAF


# ---------------------------------------------------------------------- dynamic sizes

BATCH = sympy.Symbol("s0", integer=True, positive=True)


def test_dynamic_size_is_frozen_and_what_it_multiplies_is_not() -> None:
    axes = Axes()
    batch, heads, dim = axes.leaf(BATCH), axes.leaf(4), axes.leaf(8)
    merged = [axes.leaf(4 * BATCH), axes.leaf(8)]
    axes.unify(axes.product([batch, heads, dim]), axes.product(merged))
    assert find(batch).frozen is not None
    assert find(heads).frozen is None and find(dim).frozen is None
    assert find(merged[0]).kind == PRODUCT and factors(merged[0]) == [find(batch), find(heads)]


def test_dynamic_product_frozen_for_another_reason_freezes_its_factors() -> None:
    axes = Axes()
    merged, heads = axes.leaf(4 * BATCH), axes.leaf(4)
    axes.freeze(merged, "program output")
    axes.unify(axes.product([axes.leaf(BATCH), heads]), merged)
    assert why(heads) == "program output"


def test_dynamic_sizes_are_not_cut() -> None:
    axes = Axes()
    batch, other = axes.leaf(BATCH), axes.leaf(BATCH)
    assert axes.cut(batch, 2) is None and axes.section(batch, 0, 2) is None
    axes.unify(axes.concat([batch, axes.leaf(3)]), axes.concat([axes.leaf(3), other]))
    assert all(find(a).frozen is not None for a in (batch, other))


def test_quotient_of_sizes() -> None:
    assert quotient(12, 4) == 3 and quotient(4, 12) is None and quotient(12, 5) is None and quotient(4, 4) is None
    assert quotient(12 * BATCH, BATCH) == 12 and quotient(12 * BATCH, 4) == 3 * BATCH and quotient(4, BATCH) is None
