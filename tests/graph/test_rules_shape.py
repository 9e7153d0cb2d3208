"""Operators that regroup, reorder and repeat dimensions, by the law of ``rule_oracle``; no number occurs twice."""

from __future__ import annotations

import pytest
import torch
from rule_oracle import Call, Case, Draw, Table, aten, call, check_case

table = Table(exact=True)


def grouped(d: Draw, atoms: list[int]) -> list[int]:
    """Draw a shape whose sizes are products of neighbouring ``atoms``, with ones in between."""
    shape = [1] if d.int(0, 4) == 0 else []
    for atom in atoms:
        if shape and d.flag():
            shape[-1] *= atom
        else:
            shape.append(atom)
    return [*shape, 1] if d.int(0, 4) == 0 else shape


@table("view reshape _unsafe_view _reshape_copy view_copy")
def reshape_merges_and_splits_products(d: Draw) -> Call:
    atoms = [d.pick(2, 3) for _ in range(d.int(1, 4))]
    x, shape = d.ids(*grouped(d, atoms)), grouped(d, atoms)
    if d.flag():
        shape[d.int(0, len(shape) - 1)] = -1
    op = d.pick(
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten._reshape_copy.default,
        aten.view_copy.default,
    )
    return call(op, x, shape, expect="f" * x.dim())


@table("view reshape")
def reshape_that_does_not_align_freezes_only_what_does_not(d: Draw) -> Call:
    n = d.size()
    x = d.ids(n, 6, 4, n)
    return call(d.pick(aten.view.default, aten.reshape.default), x, [n, 4, 6, n], expect="f!!f", out="f!!f")


@table("view view_copy")
def bytes_read_as_another_type_freeze(d: Draw) -> Call:
    x = d.ids(*d.shape(1, 3))
    word = "!" * x.dim()
    other = d.pick(torch.int64, torch.int32)
    return call(d.pick(aten.view.dtype, aten.view_copy.dtype), x, other, expect=word, out=word)


@table("flatten ravel")
def flatten_neighbours(d: Draw) -> Call:
    x = d.ids(*d.shape(1, 4))
    rank = x.dim()
    start = d.int(0, rank - 1)
    end = d.int(start, rank - 1)
    if d.flag():
        start, end = start - rank, end - rank
    return d.pick(
        call(aten.flatten.using_ints, x, start, end, expect="f" * rank),
        call(aten.ravel.default, x, expect="f" * rank),
    )


@table("unflatten")
def unflatten_one_dimension(d: Draw) -> Call:
    x = d.ids(*d.shape(1, 3))
    dim = d.dim(x.dim())
    size = x.shape[dim]
    inner = d.pick(*[n for n in range(1, size + 1) if size % n == 0])
    sizes = [size // inner, inner, 1]
    if d.flag():
        sizes[d.int(0, 2)] = -1
    return call(aten.unflatten.int, x, dim, sizes, expect="f" * x.dim())


@table("reshape_as view_as")
def reshape_like_another_tensor(d: Draw) -> Call:
    atoms = [d.pick(2, 3) for _ in range(d.int(1, 4))]
    x, like = d.ids(*grouped(d, atoms)), d.ids(*grouped(d, atoms))
    op = d.pick(aten.reshape_as.default, aten.view_as.default)
    return call(op, x, like, expect=f"{'f' * x.dim()} {'f' * like.dim()}")


@table("expand broadcast_to")
def expand_new_and_stretched_dimensions(d: Draw) -> Call:
    shape = d.shape(1, 4)
    x = d.ids(*d.stretched(shape))
    lead = len(shape) - x.dim()
    keeps = [i for i, size in enumerate(shape) if i >= lead and x.shape[i - lead] == size]
    sizes = [-1 if i in keeps and d.flag() else size for i, size in enumerate(shape)]
    op = d.pick(aten.expand.default, aten.broadcast_to.default)
    return call(op, x, sizes, expect="f" * x.dim() or "-", out="f" * len(shape))


@table("expand_as")
def expand_like_another_tensor(d: Draw) -> Call:
    like = d.ids(*d.shape(1, 3))
    x = d.ids(*d.stretched(like.shape))
    return call(aten.expand_as.default, x, like, expect=f"{'f' * x.dim() or '-'} {'f' * like.dim()}")


@table("repeat tile")
def repeat_whole_dimensions(d: Draw) -> Call:
    x = d.ids(*d.shape(1, 3))
    tile = d.flag()
    times = [d.int(1, 3) for _ in range(d.int(1, 4) if tile else x.dim() + d.int(0, 2))]
    op = aten.tile.default if tile else aten.repeat.default
    return call(op, x, times, expect="f" * x.dim())


@table("repeat_interleave")
def repeat_every_index(d: Draw) -> Call:
    x = d.ids(*d.shape(1, 3))
    dim, times = d.dim(x.dim()), d.int(1, 3)
    options = {"output_size": x.shape[dim] * times} if d.flag() else {}
    return call(aten.repeat_interleave.self_int, x, times, dim, expect="f" * x.dim(), **options)


@table("repeat_interleave")
def repeat_by_data_or_flattened_freezes(d: Draw) -> Call:
    x = d.ids(*d.shape(1, 2))
    word, dim = "!" * x.dim(), d.dim(x.dim())
    times = d.integers(3, x.shape[dim]) + 1
    return d.pick(
        call(aten.repeat_interleave.self_int, x, 2, expect=word),
        call(aten.repeat_interleave.self_Tensor, x, times, dim, expect=f"{word} !"),
        call(aten.repeat_interleave.Tensor, times, expect="!", out="!"),
    )


@table("transpose swapaxes swapdims")
def swap_two_dimensions(d: Draw) -> Call:
    x = d.ids(*d.shape(1, 4))
    ops = aten.transpose.int, aten.transpose_.default, aten.swapaxes.default, aten.swapdims_.default
    return call(d.pick(*ops), x, d.dim(x.dim()), d.dim(x.dim()), expect="f" * x.dim())


@table("t mT adjoint mH matrix_H numpy_T")
def swap_the_last_two_or_reverse(d: Draw) -> Call:
    flat = d.flag()
    x = d.ids(*d.shape(0, 2)) if flat else d.ids(*d.shape(2, 4))
    ops = (
        (aten.t.default, aten.t_.default)
        if flat
        else (aten.mT.default, aten.adjoint.default, aten.mH.default, aten.numpy_T.default)
    )
    if x.dim() == 2:
        ops = (*ops, aten.matrix_H.default)
    return call(d.pick(*ops), x, expect="f" * x.dim() or "-")


@table("permute movedim moveaxis")
def reorder_dimensions(d: Draw) -> Call:
    x = d.ids(*d.shape(1, 4))
    rank, word = x.dim(), "f" * x.dim()
    signs = [d.pick(0, rank) for _ in range(rank)]
    order = [i - s for i, s in zip(d.permutation(rank), signs, strict=True)]
    count = d.int(1, rank)
    return d.pick(
        call(aten.permute.default, x, order, expect=word),
        call(aten.movedim.intlist, x, order[:count], d.permutation(rank)[:count], expect=word),
        call(aten.moveaxis.int, x, d.dim(rank), d.dim(rank), expect=word),
        call(aten.moveaxis.intlist, x, order, d.permutation(rank), expect=word),
    )


@table("unsqueeze")
def unsqueeze_a_dimension(d: Draw) -> Call:
    x = d.ids(*d.shape(0, 3))
    op = d.pick(aten.unsqueeze.default, aten.unsqueeze_.default)
    return call(op, x, d.dim(x.dim() + 1), expect="f" * x.dim() or "-")


@table("squeeze")
def squeeze_only_what_was_of_size_one(d: Draw) -> Call:
    x = d.ids(*[d.pick(2, 1, 3) for _ in range(d.int(1, 4))])
    word, dims = "f" * x.dim(), d.permutation(x.dim())[: d.int(1, 3)]
    return d.pick(
        call(d.pick(aten.squeeze.default, aten.squeeze_.default), x, expect=word),
        call(d.pick(aten.squeeze.dim, aten.squeeze_.dim), x, d.dim(x.dim()), expect=word),
        call(d.pick(aten.squeeze.dims, aten.squeeze_.dims), x, dims, expect=word),
    )


@table("view_as_complex view_as_real view_as_real_copy")
def complex_pairs(d: Draw) -> Call:
    x = d.ids(*d.shape(1, 3), 2)
    word = "f" * (x.dim() - 1)
    return d.pick(
        call(aten.view_as_complex.default, x, expect=word + "!", out=word),
        call(aten.view_as_real.default, torch.view_as_complex(x), expect=word, out=word + "!"),
        call(aten.view_as_real_copy.default, torch.view_as_complex(x), expect=word, out=word + "!"),
    )


@table("diagonal triu tril")
def positions_on_a_diagonal_freeze(d: Draw) -> Call:
    x = d.ids(*d.shape(2, 4))
    rank = x.dim()
    a, b = d.permutation(rank)[:2]
    word = "".join("!" if i in (a, b) else "f" for i in range(rank))
    last = "f" * (rank - 2) + "!!"
    return d.pick(
        call(aten.diagonal.default, x, d.int(-1, 1), a, b - rank, expect=word),
        call(aten.triu.default, x, d.int(-1, 1), expect=last),
        call(aten.tril_.default, x, expect=last),
    )


@pytest.mark.parametrize("case", table.parameters())
def test_operator_commutes_with_removal(case: Case) -> None:
    check_case(case)


def covered() -> set[str]:
    """Return the operators that these tests cover."""
    return {name for case in table.cases for name in case.names}
