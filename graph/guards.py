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
from functools import lru_cache
from typing import Any

from .errors import InputError

Sizes = Mapping[str, Sequence[int]]

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


def understood(text: str, names: Sequence[str]) -> bool:
    """Whether a condition can be checked: it has only arithmetic, comparisons, and sizes of the inputs ``names``."""
    try:
        _evaluate(_parsed(text), {name: _Any() for name in names})
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
            used = {n.value for n in ast.walk(_parsed(text)) if isinstance(n, ast.Constant)}
            got = ", ".join(f"'{name}' of shape {list(shape)}" for name, shape in sizes.items() if name in used)
            raise InputError(
                f"{program} was captured where {text}, since its code branches on that, got {got}; capture it again "
                "with an example of such a size"
            )


def holds(text: str, sizes: Sizes) -> bool:
    """Whether a condition holds for the shapes of the tensor inputs; one that divides by zero does not."""
    try:
        return bool(_evaluate(_parsed(text), sizes))
    except ZeroDivisionError:
        return False


class _Any(Sequence[int]):
    """A shape of any rank, to try a condition on."""

    def __getitem__(self, index: Any) -> Any:
        return 7

    def __len__(self) -> int:
        return 1


@lru_cache(maxsize=1024)
def _parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _is_size(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Name) and node.func.id == "size"


def _evaluate(node: ast.expr, sizes: Sizes) -> Any:
    match node:
        case ast.Constant(value=int() | float() | bool() as value):
            return value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_evaluate(left, sizes), _evaluate(right, sizes))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_evaluate(operand, sizes))
        case ast.BoolOp(op=ast.And(), values=values):
            return all(_evaluate(v, sizes) for v in values)
        case ast.BoolOp(op=ast.Or(), values=values):
            return any(_evaluate(v, sizes) for v in values)
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _COMPARE for op in ops):
            values = [_evaluate(left, sizes), *(_evaluate(v, sizes) for v in others)]
            return all(_COMPARE[type(op)](a, b) for op, a, b in zip(ops, values, values[1:], strict=False))
        case ast.Call(args=[ast.Constant(value=str(name)), ast.Constant(value=int(dim))]) if _is_size(node):
            return sizes[name][dim]
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(_evaluate(v, sizes) for v in args))
    raise ValueError(f"a condition on sizes cannot hold {ast.unparse(node)}")
