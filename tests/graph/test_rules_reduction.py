"""Reductions and operators along a dimension, by the law of ``rule_oracle``: sums, statistics, and what freezes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rule_oracle import Call, Case, Draw, Table, aten, call, check_case

table = Table()


def word(rank: int, dims: list[int], letter: str) -> str:
    """Return what is expected where ``dims`` are reduced."""
    at = {d % rank for d in dims} if rank else set()
    return "".join(letter if i in at else "f" for i in range(rank)) or "-"


def several(d: Draw, rank: int) -> list[int]:
    """Draw some dimensions, some of them negative."""
    return [i - d.pick(0, rank) for i in d.permutation(rank)[: d.int(1, rank)]]


@table("sum nansum")
def sum_is_exact_where_zero(d: Draw) -> Call:
    x = d.tensor(*d.shape(1, 3))
    rank, dims, keep = x.dim(), several(d, x.dim()), d.flag()
    op = d.pick(aten.sum.dim_IntList, aten.nansum.default)
    return d.pick(
        call(op, x, dims, keep, expect=word(rank, dims, "s")),
        call(op, x, d.pick(None, []), keep, expect="s" * rank),
        call(aten.sum.default, x, expect="s" * rank),
        call(aten.sum.dim_IntList, x, dims, dtype=torch.float64, expect=word(rank, dims, "s")),
    )


@table("linalg_vector_norm norm")
def vector_norm_is_a_sum_of_powers(d: Draw) -> Call:
    x = d.tensor(*d.shape(1, 3))
    rank, dims, keep, p = x.dim(), several(d, x.dim()), d.flag(), d.pick(1, 2, 3.0)
    return d.pick(
        call(aten.linalg_vector_norm.default, x, p, dims, keep, expect=word(rank, dims, "s")),
        call(aten.linalg_vector_norm.default, x, expect="s" * rank),
        call(aten.norm.ScalarOpt_dim, x, d.pick(p, None), dims, keep, expect=word(rank, dims, "s")),
        call(aten.norm.Scalar, x, p, expect="s" * rank),
        call(aten.norm.ScalarOpt_dtype, x, p, dtype=torch.float64, expect="s" * rank),
        call(aten.norm.ScalarOpt_dim_dtype, x, p, dims, keep, dtype=torch.float64, expect=word(rank, dims, "s")),
    )


@table("linalg_vector_norm norm")
def extreme_norm_freezes(d: Draw) -> Call:
    x = d.tensor(3, 4)
    p = d.pick(float("inf"), -float("inf"), 0, -1)
    return d.pick(
        call(aten.linalg_vector_norm.default, x, p, [1], expect="f!"),
        call(aten.norm.ScalarOpt_dim, x, p, [-1], expect="f!"),
    )


@table("mean nanmean var std var_mean std_mean")
def statistic_is_labelled(d: Draw) -> Call:
    x = d.tensor(*d.shape(1, 3, one=False))
    rank, dims, keep = x.dim(), several(d, x.dim()), d.flag()
    some, every = word(rank, dims, "l"), "l" * rank
    spread = d.pick("var", "std", "var_mean", "std_mean")
    return d.pick(
        call(aten.mean.dim, x, dims, keep, expect=some),
        call(aten.mean.default, x, dtype=torch.float64, expect=every),
        call(aten.nanmean.default, x, dims, keep, expect=some),
        call(getattr(aten, spread).correction, x, dims, correction=d.pick(0, None), keepdim=keep, expect=some),
        call(getattr(aten, spread).correction, x, correction=0, expect=every),
        call(getattr(aten, spread).dim, x, dims, d.flag(), keep, expect=some),
        call(getattr(aten, spread).default, x, d.flag(), expect=every),
    )


@table("amax amin max min any all argmax argmin logsumexp median nanmedian mode aminmax prod")
def extremum_freezes(d: Draw) -> Call:
    x = d.tensor(*d.shape(1, 3))
    rank, dims, keep, dim = x.dim(), several(d, x.dim()), d.flag(), d.dim(x.dim())
    one, some, every = word(rank, [dim], "!"), word(rank, dims, "!"), "!" * rank
    first = d.pick("max", "min", "any", "all", "argmax", "median", "nanmedian", "prod")
    return d.pick(
        call(d.pick(aten.amax.default, aten.amin.default, aten.logsumexp.default), x, dims, keep, expect=some),
        call(d.pick(aten.any.dims, aten.all.dims), x, dims, keep, expect=some),
        call(d.pick(aten.max.dim, aten.min.dim, aten.any.dim, aten.all.dim), x, dim, keep, expect=one),
        call(d.pick(aten.argmax.default, aten.argmin.default), x, dim, keep, expect=one),
        call(d.pick(aten.median.dim, aten.nanmedian.dim, aten.mode.default), x, dim, keep, expect=one),
        call(aten.mode.default, x, expect=word(rank, [-1], "!")),
        call(aten.prod.dim_int, x, dim, keep, expect=one),
        call(aten.aminmax.default, x, dim=dim, keepdim=keep, expect=one),
        call(aten.aminmax.default, x, expect=every),
        call(getattr(aten, first).default, x, expect=every),
    )


@table("max min")
def maximum_of_two_operands_broadcasts(d: Draw) -> Call:
    shape = d.shape(1, 3)
    x, y = d.tensor(*d.stretched(shape)), d.tensor(*d.stretched(shape))
    op = d.pick(aten.max.other, aten.min.other)
    if d.int(0, 3) == 0:
        return call(op, x, x, expect="f" * x.dim() or "-")
    return call(op, x, y, expect=f"{'f' * x.dim() or '-'} {'f' * y.dim() or '-'}")


@table("cumsum cumprod logcumsumexp cummax cummin sort argsort topk flip roll", exact=True)
def order_along_a_dimension_freezes_it(d: Draw) -> Call:
    x = d.ids(*d.shape(1, 3))
    rank, dim, dims = x.dim(), d.dim(x.dim()), several(d, x.dim())
    one, last, every = word(rank, [dim], "!"), word(rank, [-1], "!"), "!" * rank
    along = d.pick(
        aten.cumsum.default, aten.cumsum_.default, aten.cumprod.default, aten.logcumsumexp.default, aten.cummax.default
    )
    k = d.int(1, x.shape[dim])
    return d.pick(
        call(along, x, dim, expect=one),
        call(aten.cummin.default, x, dim, expect=one),
        call(d.pick(aten.sort.default, aten.argsort.default), x, dim, d.flag(), expect=one),
        call(d.pick(aten.sort.stable, aten.argsort.stable), x, stable=True, dim=dim, expect=one),
        call(d.pick(aten.sort.default, aten.argsort.default), x, expect=last),
        call(aten.topk.default, x, k, dim, expect=one),
        call(aten.topk.default, x, 1, expect=last),
        call(aten.flip.default, x, dims, expect=word(rank, dims, "!")),
        call(aten.roll.default, x, [1] * len(dims), dims, expect=word(rank, dims, "!")),
        call(aten.roll.default, x, [1], expect=every),
    )


@table("diff")
def differences_freeze_their_dimension(d: Draw) -> Call:
    x = d.tensor(*d.shape(1, 3))
    dim = d.dim(x.dim())
    edge = [1 if i == dim % x.dim() else size for i, size in enumerate(x.shape)]
    n = d.int(1, x.shape[dim] - 1) if x.shape[dim] > 1 else 1
    frozen = word(x.dim(), [dim], "!")
    return d.pick(
        call(aten.diff.default, x, n, dim, expect=frozen),
        call(aten.diff.default, x, 1, dim, d.tensor(*edge), expect=f"{frozen} {frozen}"),
        call(aten.diff.default, x, 1, dim, None, d.tensor(*edge), expect=f"{frozen} {frozen}"),
        call(aten.diff.default, x, expect=word(x.dim(), [-1], "!")),
    )


@table("cosine_similarity")
def cosine_is_labelled_where_it_sums(d: Draw) -> Call:
    shape = d.shape(2, 3, one=False)
    x, y = d.tensor(*shape), d.tensor(*(size if d.int(0, 3) else 1 for size in shape))
    dim = d.dim(len(shape))
    frozen = word(len(shape), [dim], "l")
    if d.flag():
        return call(
            aten.cosine_similarity.default, x, y, expect=f"{word(len(shape), [1], 'l')} " + word(len(shape), [1], "l")
        )
    return call(aten.cosine_similarity.default, x, y, dim, expect=f"{frozen} {frozen}")


def transforms() -> list[str]:
    kinds = [f"{inverse}{real}fft" for inverse in ("", "i") for real in ("", "r")]
    return [f"fft_{kind}{rank}" for kind in kinds for rank in ("", "2", "n")]


@table(" ".join(transforms()))
def fourier_transform_freezes_its_dimensions(d: Draw) -> Call:
    name = d.pick(*transforms())
    op = getattr(aten, name).default
    x: Any = d.tensor(3, 4, 6)
    x = x.to(torch.complex128) if "r" not in name else torch.fft.rfft(x) if "irfft" in name else x
    if name.endswith("2"):
        return d.pick(call(op, x, expect="f!!"), call(op, x, None, [-2, -1], "ortho", expect="f!!"))
    if name.endswith("n"):
        return d.pick(
            call(op, x, expect="!!!"),
            call(op, x, None, None, "ortho", expect="!!!"),
            call(op, x, None, [0, 2], expect="!f!"),
        )
    dim = d.dim(3)
    return call(op, x, None, dim, "ortho", expect=word(3, [dim], "!")) if d.flag() else call(op, x, expect="ff!")


@pytest.mark.parametrize("case", table.parameters())
def test_operator_commutes_with_removal(case: Case) -> None:
    check_case(case)


def covered() -> set[str]:
    """Return the operators that these tests cover."""
    return {name for case in table.cases for name in case.names}
