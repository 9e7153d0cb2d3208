"""Operators that act index by index, by the law of ``rule_oracle``: all their overloads, from their schemas."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from rule_oracle import Call, Case, Draw, Table, aten, call, check_case

from graphwright.graph.rules import ATEN, elementwise, rule_for

table = Table()

# Values of arguments that are not tensors, where the default of their type does not do.
VALUES = {
    "rounding_mode": "floor",
    "approximate": "tanh",
    "eps": 0.1,
    "min": -0.5,
    "max": 0.5,
    "n": 2,
    "lower": 0.1,
    "upper": 0.3,
    "std": 1.0,
    "train": False,
    "training": False,
    "dtype": torch.float64,
    "rtol": 1e-5,
    "atol": 1e-8,
    "generator": None,
    "cuda_enabled": False,
    "cpu_enabled": False,
    "cuda_dtype": torch.float16,
    "cpu_dtype": torch.bfloat16,
}
DTYPES = (torch.float64, torch.int64, torch.bool, torch.complex128)
# Covered below by hand: they draw random numbers, or their operands do not simply broadcast.
BY_HAND = frozenset(
    "dropout feature_dropout alpha_dropout feature_alpha_dropout rrelu rand_like randn_like bernoulli normal uniform "
    "empty_like prelu copy where to type_as fill _conj sym_size sym_numel sym_stride sym_storage_offset item "
    "_local_scalar_dense".split()
)


def sample(d: Draw, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    if dtype is torch.bool:
        return d.booleans(*shape)
    if dtype is torch.int64:
        return d.integers(5, *shape)
    return d.tensor(*shape, dtype=dtype)


def from_schema(overload: Any, dtype: torch.dtype, d: Draw) -> Call:
    """Draw operands that broadcast; an in-place form's first operand has the shape of the result."""
    schema = overload._schema
    shape = d.shape(0, 3)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    words = []
    for i, argument in enumerate(schema.arguments):
        kind = str(argument.type)
        if kind in ("Tensor", "Optional[Tensor]"):
            own = shape if i == 0 and schema.name.endswith("_") else d.stretched(shape)
            value: Any = sample(d, own, dtype)
            words.append("f" * len(own) or "-")
        elif argument.name in VALUES:
            value = VALUES[argument.name]
        elif argument.has_default_value():
            continue
        else:
            value = {"number": 2, "int": 1, "float": 0.5, "bool": True}[kind]
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    return call(overload, *args, expect=" ".join(words), **kwargs)


def overloads(name: str) -> list[Any]:
    """Return the overloads of an operator and of its in-place form that take and return tensors."""
    found = []
    for form in (name, f"{name}_"):
        packet = getattr(aten, form, None)
        for overload in () if packet is None else packet.overloads():
            op = getattr(packet, overload)
            takes = [str(a.type) for a in op._schema.arguments]
            gives = [str(r.type) for r in op._schema.returns]
            if "Tensor" in takes and "Tensor" in gives and not any(a.is_out for a in op._schema.arguments):
                found.append(op)
    return found


@functools.cache
def accepted(op: Any) -> torch.dtype | None:
    """Return the first dtype whose samples the operator takes; None if it takes no plain operands."""
    for dtype in DTYPES:
        made = from_schema(op, dtype, _Fixed())
        try:
            result = op(*made.args, **made.kwargs)
        except (RuntimeError, NotImplementedError, TypeError):
            continue
        if isinstance(result, torch.Tensor):
            return dtype
    return None


class _Fixed(Draw):
    """Draws one fixed example, to find out what an operator accepts."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def int(self, low: int, high: int) -> int:
        return min(high, 2)

    def pick(self, *values: Any) -> Any:
        return values[0]


def pointwise_without_entry() -> list[str]:
    """Return the operators that have a rule only because torch tags them as pointwise."""
    registered = [
        full.removeprefix("aten::").split(".")[0]
        for full in torch._C._dispatch_get_all_op_names()
        if full.startswith("aten::")
    ]
    names = sorted({name.removesuffix("_") for name in registered if not name.startswith("__")})
    return [n for n in names if n not in ATEN and any(rule_for(op) is not None for op in overloads(n))]


BY_SCHEMA = [n for n in elementwise.RULES if n not in BY_HAND]
TAGGED = pointwise_without_entry()


def schema_cases(names: list[str]) -> list[Any]:
    out = []
    for name in names:
        for op in overloads(name):
            if (dtype := accepted(op)) is not None:
                make = functools.partial(from_schema, op, dtype)
                out.append(pytest.param(Case((name,), make), id=str(op).removeprefix("aten.")))
    return out


@table("where")
def where_with_scalars_on_either_side(d: Draw) -> Call:
    shape = d.shape(1, 3)
    own = [d.stretched(shape) for _ in range(3)]
    words = ["f" * len(s) or "-" for s in own]
    condition, a, b = d.booleans(*own[0]), d.tensor(*own[1]), d.tensor(*own[2])
    return d.pick(
        call(aten.where.self, condition, a, b, expect=" ".join(words)),
        call(aten.where.ScalarOther, condition, a, 0.5, expect=" ".join(words[:2])),
        call(aten.where.ScalarSelf, condition, 0.5, b, expect=f"{words[0]} {words[2]}"),
    )


@table("masked_fill")
def masked_fill_with_a_tensor(d: Draw) -> Call:
    x = d.tensor(*d.shape(1, 3))
    mask = d.booleans(*d.stretched(x.shape))
    op = d.pick(aten.masked_fill.Tensor, aten.masked_fill_.Tensor)
    return call(op, x, mask, d.tensor(), expect=f"{'f' * x.dim()} {'f' * mask.dim() or '-'} -")


@table("prelu")
def prelu_with_a_slope_per_channel_or_one(d: Draw) -> Call:
    x = d.tensor(*d.shape(1, 4))
    slopes = d.pick(1, x.shape[1]) if x.dim() > 1 else 1
    return call(aten.prelu.default, x, d.weight(slopes), expect=f"{'f' * x.dim()} f")


@table("copy")
def copy_broadcasts_its_source(d: Draw) -> Call:
    x = d.tensor(*d.shape(1, 3))
    source = d.tensor(*d.stretched(x.shape))
    return call(
        d.pick(aten.copy.default, aten.copy_.default), x, source, expect=f"{'f' * x.dim()} {'f' * source.dim()}"
    )


@table("to type_as")
def cast_like_another_tensor_of_any_shape(d: Draw) -> Call:
    x, other = d.tensor(*d.shape(1, 3)), d.integers(3, *d.shape(1, 2))
    return call(d.pick(aten.to.other, aten.type_as.default), x, other, expect=f"{'f' * x.dim()} {'f' * other.dim()}")


@table("to fill _conj empty_like")
def keeps_the_shape_of_its_first_operand(d: Draw) -> Call:
    x = d.tensor(*d.shape(1, 3))
    word = "f" * x.dim()
    return d.pick(
        call(aten.to.dtype, x, torch.float32, expect=word),
        call(aten.fill.Scalar, x, 3.0, expect=word),
        call(aten.fill_.Tensor, x, torch.tensor(3.0, dtype=torch.float64), expect=f"{word} -"),
        call(aten._conj.default, x.to(torch.complex128), expect=word),
        call(aten.empty_like.default, x, expect=word, random=True),
    )


@table("rand_like randn_like bernoulli normal uniform")
def random_numbers_are_labelled(d: Draw) -> Call:
    x = torch.rand(d.shape(1, 3), dtype=torch.float64)
    word = "l" * x.dim()
    other = torch.rand(d.stretched(x.shape), dtype=torch.float64)
    words = f"{word} {'l' * other.dim() or '-'}"
    return d.pick(
        call(aten.rand_like.default, x, expect=word, random=True),
        call(aten.randn_like.default, x, expect=word, random=True),
        call(aten.bernoulli.default, x, expect=word, random=True),
        call(aten.bernoulli_.float, x, 0.5, expect=word, random=True),
        call(aten.bernoulli_.Tensor, x, other, expect=words, random=True),
        call(aten.normal.Tensor_Tensor, x, other, expect=words, random=True),
        call(aten.normal.float_Tensor, 0.0, x, expect=word, random=True),
        call(aten.normal_.default, x, 0.0, 1.0, expect=word, random=True),
        call(aten.uniform_.default, x, 0.0, 1.0, expect=word, random=True),
    )


@table("normal")
def random_numbers_of_a_given_size_are_frozen(d: Draw) -> Call:
    shape = d.shape(1, 2)
    return call(aten.normal.float_float, 0.0, 1.0, shape, out="!" * len(shape), random=True)


@table("dropout feature_dropout alpha_dropout feature_alpha_dropout rrelu")
def dropout_is_exact_in_evaluation_and_labelled_in_training(d: Draw) -> Call:
    x, train = d.tensor(*d.shape(2, 3)), d.flag()
    word = ("l" if train else "f") * x.dim()
    if d.int(0, 4) == 0:
        return call(d.pick(aten.rrelu.default, aten.rrelu_.default), x, 0.1, 0.3, train, expect=word, random=train)
    op = d.pick(
        aten.dropout.default,
        aten.dropout_.default,
        aten.feature_dropout.default,
        aten.alpha_dropout.default,
        aten.feature_alpha_dropout_.default,
    )
    return call(op, x, 0.5, train, expect=word, random=train)


@table("item _local_scalar_dense")
def reading_a_value_freezes(d: Draw) -> Call:
    return call(d.pick(aten.item.default, aten._local_scalar_dense.default), d.tensor(*[1] * d.int(0, 2)))


@table("sym_size sym_numel sym_stride sym_storage_offset")
def reading_a_size_freezes_it(d: Draw) -> Call:
    x = d.tensor(*d.shape(2, one=False))
    return d.pick(
        call(aten.sym_size.int, x, 0, expect="!f"),
        call(aten.sym_size.int, x, -1, expect="f!"),
        call(aten.sym_size.default, x, expect="!!"),
        call(aten.sym_stride.int, x, 1, expect="!!"),
        call(aten.sym_numel.default, x, expect="!!"),
        call(aten.sym_storage_offset.default, x, expect="!!"),
    )


@pytest.mark.parametrize("case", table.parameters())
def test_operator_commutes_with_removal(case: Case) -> None:
    check_case(case)


@pytest.mark.parametrize("case", schema_cases(BY_SCHEMA))
def test_elementwise_operator_commutes_with_removal(case: Case) -> None:
    check_case(case, share=0.2)


@pytest.mark.parametrize("case", schema_cases(TAGGED))
def test_operator_tagged_pointwise_commutes_with_removal(case: Case) -> None:
    check_case(case, share=0.2)


def test_pointwise_operator_with_several_results_commutes() -> None:
    def frexp(d: Draw) -> Call:
        x = d.tensor(*d.shape(1, 3))
        return call(aten.frexp.Tensor, x, expect="f" * x.dim(), out=f"{'f' * x.dim()} {'f' * x.dim()}")

    check_case(Case(("frexp",), frexp))


@pytest.mark.parametrize("name", sorted(elementwise.ZERO_PRESERVING - {"data", "to", "prelu", "view_as_complex"}))
def test_zero_preserving_operator_gives_zero_for_zero(name: str) -> None:
    ops = [(op, dtype) for op in overloads(name) if (dtype := accepted(op)) is not None]
    for op, dtype in ops:
        made = from_schema(op, dtype, _Fixed())
        assert not op(torch.zeros_like(made.args[0]), *made.args[1:], **made.kwargs).any(), op
    assert ops


def covered() -> set[str]:
    """Return the operators with an entry in the table of rules that these tests cover."""
    by_schema = {n for n in BY_SCHEMA if any(accepted(op) is not None for op in overloads(n))}
    return by_schema | {name for case in table.cases for name in case.names}
