"""Conditions on the sizes of inputs that hold for a capture because the model's code asked for them.

A forward that branches on a dynamic size is captured on one of its branches. The condition under which it takes that
branch is kept as text such as ``size('sample', 0) < 64``. It is parsed and never run as Python, so that a file that
holds one cannot run anything.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .errors import InputError

Sizes = Mapping[str, Sequence[int]]
# A part of a condition, as a function of the sizes.
Part = Callable[[Sizes], Any]

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.USub: operator.neg, ast.Not: operator.not_}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "max": max,
    "min": min,
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "trunc": math.trunc,
}


# Conditions that were parsed. Not a cached function, through which torch.compile would follow the parser.
_PARSED: dict[str, Part] = {}


def prepare(guards: Sequence[str]) -> None:
    """Parse conditions now. torch.compile can follow the check of a parsed condition, but no parser.

    Raises:
        ValueError: A condition has something else than arithmetic, comparisons and sizes.
    """
    for text in guards:
        _parsed(text)


def understood(text: str, names: Sequence[str]) -> bool:
    """Whether a condition can be checked: it has only arithmetic, comparisons, and sizes of the inputs ``names``."""
    try:
        _parsed(text)({name: _Any() for name in names})
    except (SyntaxError, KeyError, TypeError, ValueError):
        return False
    except ArithmeticError:  # of the stand-in sizes
        return True
    return True


def check_guards(program: str, guards: Sequence[str], sizes: Sizes) -> None:
    """Raise `InputError` for the first condition that does not hold.

    Args:
        program: Its name, for the message.
        guards: Conditions.
        sizes: Shapes of the tensor inputs, by name.
    """
    for text in guards:
        if not holds(text, sizes):
            used = {n.value for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant)}
            got = ", ".join(f"'{name}' of shape {list(shape)}" for name, shape in sizes.items() if name in used)
            raise InputError(
                f"{program} was captured where {text}, since its code branches on that, got {got}; capture it again "
                "with an example of such a size"
            )


def holds(text: str, sizes: Sizes) -> bool:
    """Whether a condition holds for the shapes of the tensor inputs; one that divides by zero does not."""
    try:
        return bool(_parsed(text)(sizes))
    except ZeroDivisionError:
        return False


class _Any(Sequence[int]):
    """A shape of any rank, to try a condition on."""

    def __getitem__(self, index: Any) -> Any:
        return 7

    def __len__(self) -> int:
        return 1


def _parsed(text: str) -> Part:
    if text not in _PARSED:
        _PARSED[text] = _part(ast.parse(text, mode="eval").body)
    return _PARSED[text]


def _is_size(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Name) and node.func.id == "size"


def _part(node: ast.expr) -> Part:
    match node:
        case ast.Constant(value=int() | float() | bool() as value):
            return lambda sizes: value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _applied(_BINARY[type(op)], [left, right])
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _applied(_UNARY[type(op)], [operand])
        case ast.BoolOp(op=op, values=values):
            return _joined([_part(v) for v in values], isinstance(op, ast.And))
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _COMPARE for op in ops):
            return _compared([_COMPARE[type(op)] for op in ops], [_part(v) for v in (left, *others)])
        case ast.Call(args=[ast.Constant(value=str(name)), ast.Constant(value=int(dim))]) if _is_size(node):
            return lambda sizes: sizes[name][dim]
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            return _applied(_FUNCTIONS[name], args)
    raise ValueError(f"a condition on sizes cannot hold {ast.unparse(node)}")


def _applied(function: Callable[..., Any], operands: Sequence[ast.expr]) -> Part:
    parts = [_part(operand) for operand in operands]
    return lambda sizes: function(*[part(sizes) for part in parts])


def _joined(parts: Sequence[Part], every: bool) -> Part:
    """``and`` of all parts, or ``or``; what comes after the one that decides is not looked at."""

    def joined(sizes: Sizes) -> bool:
        for part in parts:
            if bool(part(sizes)) is not every:
                return not every
        return every

    return joined


def _compared(operators: Sequence[Callable[[Any, Any], bool]], parts: Sequence[Part]) -> Part:
    """A chain such as ``a < b < c``."""

    def compared(sizes: Sizes) -> bool:
        values = [part(sizes) for part in parts]
        for i, compare in enumerate(operators):
            if not compare(values[i], values[i + 1]):
                return False
        return True

    return compared
