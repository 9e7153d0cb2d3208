"""Reading and writing by index, by the law of ``rule_oracle``, on numbers that are all unlike."""

from __future__ import annotations

import pytest
import torch
from rule_oracle import Call, Case, Draw, Table, aten, call, check_case
from torch import Tensor

table = Table(exact=True)


@table("embedding")
def look_up_in_a_table(d: Draw) -> Call:
    weight = torch.nn.Parameter(d.ids(5, d.size()))
    index = d.integers(5, *d.shape(0, 2))
    rest = (0, False, False) if d.flag() else ()
    return call(aten.embedding.default, weight, index, *rest, expect=f"!f {'f' * index.dim() or '-'}")


def index_list(d: Draw, x: Tensor, broadcast: list[int]) -> tuple[list[Tensor | None], list[int]]:
    """Draw an integer index for some dimensions of ``x``, and return at which."""
    at = sorted(d.permutation(x.dim())[: d.int(1, x.dim())])
    last = d.pick(at[-1] + 1, x.dim())
    indices = [d.integers(x.shape[i], *d.stretched(broadcast)) if i in at else None for i in range(last)]
    return indices, at


@table("index _unsafe_index")
def read_by_integer_indices(d: Draw) -> Call:
    x = d.ids(*d.shape(1, 4))
    indices, at = index_list(d, x, d.shape(0, 2))
    words = ["".join("!" if i in at else "f" for i in range(x.dim()))]
    words += ["f" * i.dim() or "-" for i in indices if i is not None]
    op = d.pick(aten.index.Tensor, aten._unsafe_index.Tensor)
    return call(op, x, indices, expect=" ".join(words))


@table("index")
def read_by_a_mask_freezes(d: Draw) -> Call:
    x = d.ids(3, 4, 2)
    mask = d.booleans(*x.shape[: d.int(1, 3)])
    mask[0] = True
    if d.flag():
        mask = mask.to(torch.uint8)
    return call(aten.index.Tensor, x, [mask], expect="!!! " + "!" * mask.dim())


@table("index_put _unsafe_index_put")
def write_by_integer_indices(d: Draw) -> Call:
    x = d.ids(*d.shape(1, 3))
    count = d.int(1, x.dim())
    points = d.size()
    indices = [torch.zeros(points, dtype=torch.int64) + d.integers(x.shape[i], 1) for i in range(count)]
    indices[0] = torch.arange(points) % x.shape[0]
    values = d.ids(*d.stretched([points, *x.shape[count:]]))
    accumulate = True  # with repeated points, the order of plain writes is undefined
    op = d.pick(aten.index_put.default, aten.index_put_.default, aten._unsafe_index_put.default)
    own = "!" * count + "f" * (x.dim() - count)
    return call(op, x, indices, values, accumulate, expect=own + " !" * count + " " + ("?" * values.dim() or "-"))


@table("masked_scatter")
def what_is_written_where_a_mask_is_true_freezes(d: Draw) -> Call:
    x, mask = d.ids(2, 4), torch.tensor([True, False, False, True])
    op = d.pick(aten.masked_scatter.default, aten.masked_scatter_.default)
    return call(op, x, mask.expand(2, 4), d.ids(4), expect="!! !! !", out="!!")


@table("index_put")
def write_at_later_dimensions_freezes(d: Draw) -> Call:
    x, index = d.ids(2, 4, 3), torch.tensor([2, 0])
    return call(aten.index_put_.default, x, [None, index], d.ids(2, 2, 3), expect="!!! ! !!!")


@table("index_put")
def write_by_a_mask(d: Draw) -> Call:
    x = d.ids(3, 4, 2)
    rank = d.int(1, 3)
    mask = d.booleans(*x.shape[:rank])
    mask.flatten()[0] = True
    if d.flag():
        values = d.ids()
    else:
        values = d.ids(int(mask.sum()), *x.shape[rank:])
    words = "!" * rank + "f" * (3 - rank), "!" * rank, "!" * (values.dim() > 0) + "f" * (values.dim() - 1) or "-"
    return call(d.pick(aten.index_put.default, aten.index_put_.default), x, [mask], values, expect=" ".join(words))


@table("index_select")
def select_by_a_vector(d: Draw) -> Call:
    x = d.ids(*d.shape(1, 3))
    dim = d.dim(x.dim())
    index = d.integers(x.shape[dim], *([] if d.int(0, 3) == 0 else [d.size()]))
    word = ["f"] * x.dim()
    word[dim] = "!"
    return call(aten.index_select.default, x, dim, index, expect="".join(word) + " " + ("f" * index.dim() or "-"))


@table("index_add index_copy index_fill")
def write_slices_by_a_vector(d: Draw) -> Call:
    x = d.ids(*d.shape(1, 3))
    dim = d.dim(x.dim())
    index = torch.randperm(x.shape[dim])[: d.int(1, x.shape[dim])]
    source = d.ids(*(len(index) if i == dim % x.dim() else size for i, size in enumerate(x.shape)))
    word = ["f"] * x.dim()
    word[dim] = "!"
    own = "".join(word)
    add, copy = (aten.index_add.default, aten.index_add_.default), (aten.index_copy.default, aten.index_copy_.default)
    return d.pick(
        call(d.pick(*add), x, dim, index, source, expect=f"{own} ! {own}"),
        call(aten.index_add.default, x, dim, index, source, alpha=2, expect=f"{own} ! {own}"),
        call(d.pick(*copy), x, dim, index, source, expect=f"{own} ! {own}"),
        call(aten.index_fill.int_Scalar, x, dim, index, 7.0, expect=f"{own} !"),
        call(aten.index_fill_.int_Tensor, x, dim, index, torch.tensor(7.0, dtype=torch.float64), expect=f"{own} ! -"),
    )


def lookup(d: Draw) -> tuple[Tensor, int, Tensor, str]:
    """Draw a tensor, a dimension, an index of the same rank, and the letters of the tensor."""
    x = d.ids(*d.shape(1, 3))
    dim = d.dim(x.dim())
    shape = [d.size() if i == dim % x.dim() else d.pick(size, max(size - 1, 1)) for i, size in enumerate(x.shape)]
    word = "".join(
        "!" if i == dim % x.dim() or n != m else "f" for i, (n, m) in enumerate(zip(x.shape, shape, strict=True))
    )
    return x, dim, d.integers(x.shape[dim], *shape), word


@table("gather")
def gather_elements(d: Draw) -> Call:
    x, dim, index, word = lookup(d)
    own = "".join("f" if i == dim % x.dim() else c for i, c in enumerate(word))
    return call(aten.gather.default, x, dim, index, expect=f"{word} {own}")


@table("scatter scatter_add scatter_reduce")
def scatter_elements(d: Draw) -> Call:
    x, dim, index, word = lookup(d)
    at = dim % x.dim()
    index = torch.zeros_like(index) if d.flag() else index
    # Distinct places along the dimension, so that plain writes do not race.
    index = index[tuple(slice(0, 1) if i == at else slice(None) for i in range(x.dim()))]
    source = d.ids(*index.shape)
    words = f"{word} {word}"
    reduce = d.pick("sum", "amax", "mean")
    return d.pick(
        call(d.pick(aten.scatter.src, aten.scatter_.src), x, dim, index, source, expect=f"{words} {word}"),
        call(d.pick(aten.scatter.value, aten.scatter_.value), x, dim, index, 7.0, expect=words),
        call(
            d.pick(aten.scatter_add.default, aten.scatter_add_.default), x, dim, index, source, expect=f"{words} {word}"
        ),
        call(aten.scatter_reduce.two, x, dim, index, source, reduce, expect=f"{words} {word}"),
    )


@table("scatter_add")
def several_elements_scattered_to_one_place(d: Draw) -> Call:
    x, index = d.ids(2, 4), torch.tensor([[0, 0, 3], [1, 1, 1]])
    return call(aten.scatter_add_.default, x, 1, index, d.ids(2, 3), expect="f! f! f!")


@table("take_along_dim")
def take_along_a_dimension(d: Draw) -> Call:
    x = d.ids(*d.shape(1, 3))
    dim = d.dim(x.dim())
    at = dim % x.dim()
    if d.int(0, 3) == 0:
        index = d.integers(x.numel(), 3)
        return call(aten.take_along_dim.default, x, index, expect=f"{'!' * x.dim()} !")
    index = d.integers(x.shape[dim], *(d.size() if i == at else d.pick(size, 1) for i, size in enumerate(x.shape)))
    word = ["f"] * x.dim()
    word[dim] = "!"
    return call(aten.take_along_dim.default, x, index, dim, expect="".join(word) + " " + "f" * x.dim())


@table("slice_scatter select_scatter")
def write_into_a_section_freezes(d: Draw) -> Call:
    x = d.ids(3, 6, 2)
    return d.pick(
        call(aten.slice_scatter.default, x, d.ids(3, 2, 2), 1, 1, 5, 2, expect="!!! !!!"),
        call(aten.select_scatter.default, x, d.ids(3, 2), 1, -2, expect="!!! !!"),
    )


@table("embedding_bag _embedding_bag")
def rows_in_bags(d: Draw) -> Call:
    mode = d.int(0, 2)
    rows, offsets = torch.tensor([4, 1, 8, 1, 3]), torch.tensor([0, 2])
    op = d.pick(aten.embedding_bag.padding_idx, aten._embedding_bag.default)
    padding = -1 if op is aten._embedding_bag.default else None
    args = d.tensor(9, d.size()), rows, offsets, False, mode, False, None, False, padding
    return call(op, *args, expect=f"!{'!' if mode == 2 else 'f'} ! !")


@table("embedding_renorm")
def rows_of_limited_norm(d: Draw) -> Call:
    return call(aten.embedding_renorm_.default, d.tensor(9, 4), torch.tensor([4, 1]), 1.0, 2.0, expect="!! !")


@pytest.mark.parametrize("case", table.parameters())
def test_operator_commutes_with_removal(case: Case) -> None:
    check_case(case)


def covered() -> set[str]:
    """Return the operators that these tests cover."""
    return {name for case in table.cases for name in case.names}
