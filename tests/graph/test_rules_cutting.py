"""Operators that join, cut and pad dimensions, by the law of ``rule_oracle``, on numbers that are all unlike."""

from __future__ import annotations

import sys

import pytest
import torch
from rule_oracle import Call, Case, Draw, Table, aten, call, check_case

table = Table(exact=True)


@table("cat concat concatenate")
def join_along_one_dimension(d: Draw) -> Call:
    shape = d.shape(1, 3)
    dim = d.dim(len(shape))
    tensors = []
    for _ in range(d.int(1, 3)):
        shape[dim] = d.size()
        tensors.append(d.ids(*shape))
    if d.int(0, 3) == 0:
        tensors.append(torch.zeros(0, dtype=torch.float64))  # a legacy empty vector is skipped
    elif d.int(0, 3) == 0:
        tensors.append(tensors[0])
    words = dict.fromkeys(tensors, "f" * len(shape))
    op = d.pick(aten.cat.default, aten.concat.default, aten.concatenate.default)
    return call(op, tensors, dim, expect=" ".join(words[t] if t.numel() else "?" for t in words))


@table("stack")
def stack_on_a_new_dimension(d: Draw) -> Call:
    shape = d.shape(0, 3)
    tensors = [d.ids(*shape) for _ in range(d.int(1, 3))]
    words = " ".join("f" * len(shape) or "-" for _ in tensors)
    return call(aten.stack.default, tensors, d.dim(len(shape) + 1), expect=words)


@table("pad constant_pad_nd")
def pad_with_a_constant(d: Draw) -> Call:
    x = d.ids(*d.shape(1, 3))
    widths = [d.int(0, 2) for _ in range(2 * d.int(1, x.dim()))]
    op, rest = d.pick(
        (aten.pad.default, ("constant", 7.0)), (aten.pad.default, ()), (aten.constant_pad_nd.default, (7.0,))
    )
    return call(op, x, widths, *rest, expect="f" * x.dim())


@table("pad constant_pad_nd")
def pad_with_own_values_or_cropping_freezes(d: Draw) -> Call:
    x = d.ids(2, 3, 4)
    mode = d.pick("reflect", "replicate", "circular")
    return d.pick(
        call(aten.pad.default, x, [1, 2], mode, expect="ff!", out="ff!"),
        call(aten.pad.default, x, [1, -1, 0, 1], expect="ff!", out="fp!"),
        call(aten.constant_pad_nd.default, x, [-1, 0], expect="ff!", out="ff!"),
    )


def bounds(d: Draw, size: int) -> tuple[int | None, int | None]:
    """Draw the bounds of a slice as people and export write them: missing, negative, beyond the end, empty."""
    start = d.pick(None, 0, *range(1, size + 1), *range(-size - 1, 0))
    end = d.pick(None, sys.maxsize, *range(size + 2), *range(-size, 0))
    return start, end


@table("slice")
def slice_a_section(d: Draw) -> Call:
    x = d.ids(*d.shape(1, 3))
    dim = d.dim(x.dim())
    start, end = bounds(d, x.shape[dim])
    return call(aten.slice.Tensor, x, dim, start, end, expect="f" * x.dim())


@table("slice")
def slice_with_a_step(d: Draw) -> Call:
    x = d.ids(*d.shape(1, 2), 12)
    step, start = d.int(2, 4), d.int(0, 4)
    length = d.int(0, 8)
    word = "f" * (x.dim() - 1)
    divides = length > step and length % step == 0
    return call(aten.slice.Tensor, x, -1, start, start + length, step, expect=word + ("p" if divides else "?"))


@table("narrow")
def narrow_to_a_section(d: Draw) -> Call:
    x = d.ids(*d.shape(1, 3))
    dim = d.dim(x.dim())
    size = x.shape[dim]
    start = d.int(0, size)
    length = d.pick(size - start, d.int(0, size - start))
    if start and d.flag():
        start -= size
    return call(aten.narrow.default, x, dim, start, length, expect="f" * x.dim())


@table("narrow")
def narrow_at_a_place_from_data_freezes(d: Draw) -> Call:
    return call(aten.narrow.Tensor, d.ids(3, 4), 1, torch.tensor(1), 2, expect="f! -", out="f!")


@table("select")
def select_one_index(d: Draw) -> Call:
    x = d.ids(*d.shape(1, 3))
    dim = d.dim(x.dim())
    word = ["f"] * x.dim()
    word[dim] = "p" if x.shape[dim] > 3 else "?"  # a single index left on each side is frozen, as every size of 1
    return call(aten.select.int, x, dim, d.dim(x.shape[dim]), expect="".join(word))


@table("unbind")
def unbind_freezes_what_it_spreads(d: Draw) -> Call:
    x = d.ids(*d.shape(1, 3))
    dim = d.dim(x.dim())
    word = ["f"] * x.dim()
    word[dim] = "!"
    return call(aten.unbind.int, x, dim, expect="".join(word))


@table("split chunk split_with_sizes unsafe_split unsafe_chunk unsafe_split_with_sizes tensor_split")
def split_into_sections(d: Draw) -> Call:
    x = d.ids(*d.shape(1, 3))
    dim = d.dim(x.dim())
    size = x.shape[dim]
    cuts = sorted(d.int(0, size) for _ in range(d.int(0, 3)))
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, size], strict=True)]
    op, how = d.pick(
        (aten.split.Tensor, d.int(1, size + 1)),
        (aten.split.sizes, sizes),
        (aten.chunk.default, d.int(1, size + 1)),
        (aten.split_with_sizes.default, sizes),
        (aten.unsafe_split.Tensor, d.int(1, size + 1)),
        (aten.unsafe_chunk.default, d.int(1, size + 1)),
        (aten.unsafe_split_with_sizes.default, sizes),
        (aten.tensor_split.sections, d.int(1, size + 1)),
        (aten.tensor_split.indices, cuts),
    )
    return call(op, x, how, dim, expect="f" * x.dim())


@table("tensor_split")
def tensor_split_at_unsorted_places_freezes(d: Draw) -> Call:
    cuts = d.pick([4, 2], [2, 9], [-2, 1])
    return call(aten.tensor_split.indices, d.ids(6, 3), cuts, expect="?f")


@table("tensor_split")
def tensor_split_by_a_tensor(d: Draw) -> Call:
    places = d.pick(torch.tensor(2), torch.tensor([1, 3]))
    return call(
        aten.tensor_split.tensor_indices_or_sections, d.ids(6, 3), places, expect=f"?f {'?' * places.dim() or '-'}"
    )


@table("glu", exact=False)
def gated_halves_are_tied(d: Draw) -> Call:
    shape = d.shape(1, 3)
    dim = d.dim(len(shape))
    shape[dim] *= 2
    return call(aten.glu.default, d.tensor(*shape), dim, expect="f" * len(shape))


@pytest.mark.parametrize("case", table.parameters())
def test_operator_commutes_with_removal(case: Case) -> None:
    check_case(case)


def covered() -> set[str]:
    """Return the operators that these tests cover."""
    return {name for case in table.cases for name in case.names}
