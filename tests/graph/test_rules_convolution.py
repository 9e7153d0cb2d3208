"""Convolutions, pooling, windows and channel reshuffles, by the law of ``rule_oracle``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rule_oracle import Call, Case, Draw, Table, aten, call, check_case
from torch import Tensor

table = Table()

PLAIN = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
PADDED = (aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)


def channels(d: Draw) -> tuple[int, int, int]:
    """Draw ``(groups, input channels per group, output channels per group)``: plain, grouped, depthwise."""
    return d.pick((1, 3, 4), (1, 4, 1), (2, 3, 2), (3, 2, 2), (4, 1, 1), (4, 1, 3), (3, 2, 1), (2, 1, 1))


def operands(d: Draw, rank: int, groups: int, cin: int, cout: int, transposed: bool) -> tuple[Tensor, Tensor, Any, str]:
    """Return input, weight, bias or None, and what is expected of them."""
    space, kernel = [d.int(3, 5) for _ in range(rank)], [d.pick(1, 3) for _ in range(rank)]
    lead = [] if d.int(0, 3) == 0 else [d.size()]
    x = d.tensor(*lead, groups * cin, *space)
    outer, inner = (groups * cin, cout) if transposed else (groups * cout, cin)
    weight = d.weight(outer, inner, *kernel)
    bias = d.weight(groups * cout) if d.flag() else None
    words = ["f" * len(lead) + "f" + "!" * rank, "ff" + "!" * rank, *([] if bias is None else ["f"])]
    return x, weight, bias, " ".join(words)


@table("conv1d conv2d conv3d")
def convolution(d: Draw) -> Call:
    rank, (groups, cin, cout) = d.int(1, 3), channels(d)
    x, weight, bias, words = operands(d, rank, groups, cin, cout, False)
    stride = [d.int(1, 2) for _ in range(rank)]
    if d.flag():
        padding = d.pick("same", "valid")
        stride = [1] * rank if padding == "same" else stride
        return call(PADDED[rank - 1], x, weight, bias, stride, padding, [1] * rank, groups, expect=words)
    if groups == 1 and d.flag():
        return call(PLAIN[rank - 1], x, weight, bias, expect=words)
    return call(PLAIN[rank - 1], x, weight, bias, stride, [1] * rank, [1] * rank, groups, expect=words)


@table("conv_transpose1d conv_transpose2d conv_transpose3d")
def transposed_convolution(d: Draw) -> Call:
    rank, (groups, cin, cout) = d.int(1, 3), channels(d)
    x, weight, bias, words = operands(d, rank, groups, cin, cout, True)
    args = [2] * rank, [1] * rank, [1] * rank, groups
    return call(TRANSPOSED[rank - 1], x, weight, bias, *(args if groups > 1 or d.flag() else ()), expect=words)


@table("convolution _convolution")
def convolution_with_all_arguments(d: Draw) -> Call:
    rank, (groups, cin, cout), transposed = d.int(1, 2), channels(d), d.flag()
    x, weight, bias, words = operands(d, rank, groups, cin, cout, transposed)
    if x.dim() == rank + 1:
        x, words = x[None], "f" + words
    args = x, weight, bias, [1] * rank, [1] * rank, [1] * rank, transposed, [0] * rank, groups
    if d.flag():
        return call(aten.convolution.default, *args, expect=words)
    return call(aten._convolution.default, *args, False, False, True, True, expect=words)


@table("conv2d")
def convolution_with_a_computed_weight_is_a_sum(d: Draw) -> Call:
    x, weight = d.tensor(2, 4, 5, 5), d.tensor(3, 4, 3, 3)
    return call(aten.conv2d.default, x, weight, expect="fs!! fs!!")


def pooled(d: Draw, rank: int) -> tuple[Tensor, str]:
    lead = d.shape(1, 2)
    return d.tensor(*lead, *[4] * rank), "f" * len(lead) + "!" * rank


POOLS = "avg_pool max_pool adaptive_avg_pool adaptive_max_pool"


@table(" ".join(f"{name}{rank}d" for name in POOLS.split() for rank in (1, 2, 3)))
def pooling(d: Draw) -> Call:
    rank, name = d.int(1, 3), d.pick(*POOLS.split())
    x, words = pooled(d, rank)
    op = getattr(aten, f"{name}{rank}d").default
    return call(op, x, [2] * rank, expect=words)


@table(
    "_adaptive_avg_pool2d _adaptive_avg_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices"
)
def pooling_as_it_is_decomposed(d: Draw) -> Call:
    rank = d.int(1, 3)
    x, words = pooled(d, rank)
    adaptive = getattr(aten, f"_adaptive_avg_pool{max(rank, 2)}d").default
    with_indices = getattr(aten, f"max_pool{rank}d_with_indices").default
    if rank > 1 and d.flag():
        return call(adaptive, x, [2] * rank, expect=words)
    return call(with_indices, x, [2] * rank, expect=words)


NEAREST = ("upsample_nearest", "_upsample_nearest_exact")
LINEAR = {1: "upsample_linear1d", 2: "upsample_bilinear2d", 3: "upsample_trilinear3d"}
SMOOTH = ("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")


@table(" ".join([*(f"{n}{r}d" for n in NEAREST for r in (1, 2, 3)), *LINEAR.values(), *SMOOTH]))
def resampling(d: Draw) -> Call:
    rank = d.int(1, 3)
    x = d.tensor(d.size(), d.size(), *[4] * rank)
    words = "ff" + "!" * rank
    name = d.pick(*(f"{n}{rank}d" for n in NEAREST), LINEAR[rank], *(SMOOTH if rank == 2 else ()))
    align = () if "nearest" in name else (False,)
    if d.flag():
        sizes, factors = d.pick(([6] * rank, None), (None, [1.5] * rank))
        return call(getattr(aten, name).vec, x, sizes, *align, factors, expect=words)
    return call(getattr(aten, name).default, x, [6] * rank, *align, expect=words)


@table(" ".join(f"{name}_pad{rank}d" for name in ("reflection", "replication") for rank in (1, 2, 3)))
def padding_with_own_values(d: Draw) -> Call:
    rank, name = d.int(1, 3), d.pick("reflection", "replication")
    x, words = pooled(d, rank)
    return call(getattr(aten, f"{name}_pad{rank}d").default, x, [1] * (2 * rank), expect=words)


@table("im2col col2im", exact=True)
def windows_of_an_image(d: Draw) -> Call:
    lead = d.shape(1, 1) if d.flag() else []
    c, kernel = d.size(), [d.int(1, 3), d.int(1, 3)]
    rest = [1, 1], [0, 0], [1, 1]
    word = "f" * len(lead)
    if d.flag():
        return call(aten.im2col.default, d.ids(*lead, c, 4, 5), kernel, *rest, expect=word + "f!!")
    windows = (5 - kernel[0]) * (6 - kernel[1])
    x = d.ids(*lead, c * kernel[0] * kernel[1], windows)
    return call(aten.col2im.default, x, [4, 5], kernel, *rest, expect=word + ("p" if c > 1 else "?") + "!")


@table("unfold", exact=True)
def windows_along_one_dimension(d: Draw) -> Call:
    x = d.ids(*d.shape(1, 3, one=False))
    dim = d.dim(x.dim())
    word = ["f"] * x.dim()
    word[dim] = "!"
    size = d.int(1, x.shape[dim])
    return call(aten.unfold.default, x, dim, size, d.int(1, 2), expect="".join(word))


@table("pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle", exact=True)
def channels_exchanged_with_space(d: Draw) -> Call:
    lead, c, r = d.shape(0, 2), d.size(one=False), d.int(1, 3)
    word, groups = "f" * len(lead), d.int(1, 3)
    shuffle = d.pick(aten.channel_shuffle.default, aten.native_channel_shuffle.default)
    return d.pick(
        call(aten.pixel_shuffle.default, d.ids(*lead, c * r * r, 2, 3), r, expect=word + "p!!"),
        call(aten.pixel_unshuffle.default, d.ids(*lead, c, 2 * r, 3 * r), r, expect=word + "f!!"),
        call(shuffle, d.ids(2, groups * c, 3, 2), groups, expect="fpff"),
    )


@table("grid_sampler grid_sampler_2d")
def sampling_at_computed_places(d: Draw) -> Call:
    n, c = d.size(), d.size()
    flat = d.flag()
    space = [3, 4] if flat else [2, 3, 2]
    x, grid = d.tensor(n, c, *space), torch.rand(n, *space, len(space), dtype=torch.float64)
    op = aten.grid_sampler_2d.default if flat and d.flag() else aten.grid_sampler.default
    words = f"ff{'!' * len(space)} f{'!' * len(space)}!"
    return call(op, x, grid, 0, d.int(0, 2), d.flag(), expect=words)


@pytest.mark.parametrize("case", table.parameters())
def test_operator_commutes_with_removal(case: Case) -> None:
    check_case(case)


def covered() -> set[str]:
    """Return the operators that these tests cover."""
    return {name for case in table.cases for name in case.names}
