"""Tensors made from nothing, by the law of ``rule_oracle``: constants resize, what depends on positions freezes."""

from __future__ import annotations

import pytest
import torch
from rule_oracle import Call, Case, Draw, Table, aten, call, check_case

table = Table(exact=True)


@table("zeros ones full empty empty_permuted")
def constant_of_a_given_size(d: Draw) -> Call:
    shape = d.shape(1, 3)
    word = "f" * len(shape)
    return d.pick(
        call(aten.zeros.default, shape, out=word),
        call(aten.ones.default, shape, dtype=torch.float64, out=word),
        call(aten.full.default, shape, 2.5, out=word),
        call(aten.empty.memory_format, shape, out=word, random=True),
        call(aten.empty_permuted.default, shape, d.permutation(len(shape)), out=word, random=True),
    )


@table("new_zeros new_ones new_full new_empty")
def constant_beside_another_tensor(d: Draw) -> Call:
    x, shape = d.ids(*d.shape(1, 2)), d.shape(1, 3)
    words = {"expect": "f" * x.dim(), "out": "f" * len(shape)}
    return d.pick(
        call(aten.new_zeros.default, x, shape, **words),
        call(aten.new_ones.default, x, shape, **words),
        call(aten.new_full.default, x, shape, 2.5, **words),
        call(aten.new_empty.default, x, shape, random=True, **words),
    )


@table("arange linspace eye scalar_tensor tril_indices triu_indices")
def positions_freeze(d: Draw) -> Call:
    n = d.size()
    return d.pick(
        call(aten.arange.default, n, out="!"),
        call(aten.arange.start_step, 0, 2 * n, 2, out="!"),
        call(aten.linspace.default, 0.0, 1.0, n, out="!"),
        call(aten.eye.m, n, 3, out="!!"),
        call(aten.scalar_tensor.default, 1.0),
        call(aten.tril_indices.default, n, n, out="!!"),
        call(aten.triu_indices.default, n, n, out="!!"),
    )


@table("rand randn randint randperm normal_functional")
def random_numbers_freeze(d: Draw) -> Call:
    shape = d.shape(1, 3)
    word = "!" * len(shape)
    return d.pick(
        call(aten.rand.default, shape, out=word, random=True),
        call(aten.randn.default, shape, out=word, random=True),
        call(aten.randint.low, 2, 7, shape, out=word, random=True),
        call(aten.randperm.default, shape[0], out="!", random=True),
        call(aten.normal_functional.default, d.ids(*shape), expect=word, out=word, random=True),
    )


@table("meshgrid one_hot")
def grids_and_classes_freeze(d: Draw) -> Call:
    x, y = d.ids(d.size()), d.ids(d.size())
    return d.pick(
        call(aten.meshgrid.default, [x, y], expect="! !", out="!! !!"),
        call(aten.meshgrid.indexing, [x, y], indexing="xy", expect="! !", out="!! !!"),
        call(aten.one_hot.default, d.integers(4, d.size()), 4, expect="!", out="!!"),
    )


@table(
    "histc bincount nonzero nonzero_numpy masked_select unique_consecutive _unique2 unique_dim searchsorted "
    "bucketize where _is_all_true _is_any_true"
)
def what_is_counted_or_picked_by_value_freezes(d: Draw) -> Call:
    x, grid = d.ids(3, 4), d.ids(5)
    return d.pick(
        call(aten.where.default, x > 2, expect="!!", out="! !"),
        call(aten.histc.default, x, 4, expect="!!", out="!"),
        call(aten.bincount.default, d.integers(4, 6), expect="!", out="!"),
        call(aten.nonzero.default, x, expect="!!", out="!!"),
        call(aten._is_all_true.default, x > 3, expect="!!", out="-"),
        call(aten._is_any_true.default, x > 3, expect="!!", out="-"),
        call(aten.nonzero_numpy.default, x, expect="!!", out="! !"),
        call(aten.masked_select.default, x, x > 2, expect="!! !!", out="!"),
        call(aten.unique_consecutive.default, x, expect="!!"),
        call(aten._unique2.default, x, expect="!!"),
        call(aten.unique_dim.default, x, 0, expect="!!"),
        call(aten.searchsorted.Tensor, grid, x, expect="! !!", out="!!"),
        call(aten.bucketize.Tensor, x, grid, expect="!! !", out="!!"),
    )


@pytest.mark.parametrize("case", table.parameters())
def test_operator_commutes_with_removal(case: Case) -> None:
    check_case(case)


def covered() -> set[str]:
    """Return the operators that these tests cover."""
    return {name for case in table.cases for name in case.names}
