"""Normalisations, by the law of ``rule_oracle``: exact per channel, labelled where statistics run over an axis."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rule_oracle import Call, Case, Draw, Table, aten, call, check_case

table = Table()


def vectors(d: Draw, size: int, count: int) -> list[Any]:
    """Draw up to ``count`` vectors of positive numbers, None for those left out."""
    return [torch.nn.Parameter(d.tensor(size).abs() + 0.5) if d.flag() else None for _ in range(count)]


def words(values: list[Any], word: str = "f") -> str:
    return "".join(f" {word}" for v in values if v is not None)


@table("batch_norm")
def batch_norm_in_evaluation(d: Draw) -> Call:
    x = d.tensor(*d.shape(2, 4))
    mean, var = d.tensor(x.shape[1]), d.tensor(x.shape[1]).abs() + 0.5
    affine = vectors(d, x.shape[1], 2)
    return call(
        aten.batch_norm.default,
        x,
        *affine,
        mean,
        var,
        False,
        0.1,
        1e-5,
        False,
        expect="f" * x.dim() + words(affine) + " f f",
    )


@table("batch_norm instance_norm")
def statistics_of_the_input_are_labelled(d: Draw) -> Call:
    x = d.tensor(d.int(2, 3), d.size(), *d.shape(1, 2, one=False))
    affine = vectors(d, x.shape[1], 2)
    space = "l" * (x.dim() - 2)
    rest = *affine, None, None, True, 0.1, 1e-5, False
    return d.pick(
        call(aten.batch_norm.default, x, *rest, expect="lf" + space + words(affine)),
        call(aten.instance_norm.default, x, *rest, expect="ff" + space + words(affine)),
    )


@table("instance_norm")
def instance_norm_with_running_statistics(d: Draw) -> Call:
    x = d.tensor(*d.shape(3, 4))
    mean, var = d.tensor(x.shape[1]), d.tensor(x.shape[1]).abs() + 0.5
    affine = vectors(d, x.shape[1], 2)
    rest = *affine, mean, var, False, 0.1, 1e-5, False
    return call(aten.instance_norm.default, x, *rest, expect="f" * x.dim() + words(affine) + " f f")


@table("native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training")
def batch_norm_as_it_is_decomposed(d: Draw) -> Call:
    x = d.tensor(d.int(2, 3), d.size(), *d.shape(0, 2))
    mean, var = d.tensor(x.shape[1]), d.tensor(x.shape[1]).abs() + 0.5
    affine = vectors(d, x.shape[1], 2)
    train = d.flag()
    lead, space = ("l", "l" * (x.dim() - 2)) if train else ("f", "f" * (x.dim() - 2))
    expect = lead + "f" + space + words(affine) + " f f"
    return d.pick(
        call(aten.native_batch_norm.default, x, *affine, mean, var, train, 0.1, 1e-5, expect=expect),
        call(aten._native_batch_norm_legit.default, x, *affine, mean, var, train, 0.1, 1e-5, expect=expect),
        call(
            aten._native_batch_norm_legit_no_training.default,
            x,
            *affine,
            mean,
            var,
            0.1,
            1e-5,
            expect="f" * x.dim() + words(affine) + " f f",
        ),
    )


@table("_native_batch_norm_legit")
def batch_norm_without_running_statistics(d: Draw) -> Call:
    x = d.tensor(3, d.size(), 4)
    return call(aten._native_batch_norm_legit.no_stats, x, None, None, True, 0.1, 1e-5, expect="lfl")


@table("layer_norm native_layer_norm rms_norm _fused_rms_norm")
def norm_over_trailing_dimensions(d: Draw) -> Call:
    x = d.tensor(*d.shape(1, 4))
    rank = d.int(1, x.dim())
    shape = list(x.shape[x.dim() - rank :])
    lead = "f" * (x.dim() - rank)
    weight, bias = (d.weight(*shape) if d.flag() else None for _ in range(2))
    both, one = (lead + "l" * rank + words(v, "l" * rank) for v in ([weight, bias], [weight]))
    return d.pick(
        call(aten.layer_norm.default, x, shape, weight, bias, 1e-5, expect=both),
        call(aten.layer_norm.default, x, shape, expect=lead + "l" * rank),
        call(aten.native_layer_norm.default, x, shape, weight, bias, 1e-5, expect=both),
        call(aten.rms_norm.default, x, shape, weight, expect=one),
        call(aten.rms_norm.default, x, shape, weight, 1e-6, expect=one),
        call(aten._fused_rms_norm.default, x, shape, weight, 1e-6, expect=one),
    )


@table("group_norm")
def group_norm_keeps_its_groups(d: Draw) -> Call:
    groups, width = d.int(1, 4), d.int(1, 4)
    x = d.tensor(d.size(), groups * width, *d.shape(0, 2))
    affine = vectors(d, groups * width, 2)
    letter = "l" if width > 1 else "!"
    return call(
        aten.group_norm.default, x, groups, *affine, expect="f" + letter + "!" * (x.dim() - 2) + words(affine, letter)
    )


@table("_weight_norm")
def weight_norm_over_all_dimensions_but_one(d: Draw) -> Call:
    v = d.weight(*d.shape(2, 3))
    dim = d.pick(0, v.dim() - 1, -v.dim())
    g = d.weight(*(size if i == dim % v.dim() else 1 for i, size in enumerate(v.shape)))
    word = "".join("f" if i == dim % v.dim() else "l" for i in range(v.dim()))
    return call(aten._weight_norm.default, v, g, *((dim,) if dim or d.flag() else ()), expect=f"{word} {word}")


@table("_weight_norm")
def weight_norm_over_everything(d: Draw) -> Call:
    v = d.weight(*d.shape(2, 3))
    return call(aten._weight_norm.default, v, d.weight(), -1, expect=f"{'l' * v.dim()} -")


@pytest.mark.parametrize("case", table.parameters())
def test_operator_commutes_with_removal(case: Case) -> None:
    check_case(case)


def covered() -> set[str]:
    """Return the operators that these tests cover."""
    return {name for case in table.cases for name in case.names}
