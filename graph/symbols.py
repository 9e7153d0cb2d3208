"""Symbolic sizes as plain data, and fresh symbols for them after loading.

A dynamic dimension is a symbol of torch's ``ShapeEnv``; what is computed from it (batch times heads, a padded
length) is a sympy expression. Expressions are written as nested lists, ``["Mul", 3, "s77"]``, and only the
classes named here are rebuilt: sympy's own parser evaluates text as Python and is never used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from sympy.core.relational import Relational
from sympy.logic.boolalg import BooleanAtom, BooleanFunction
from torch._subclasses import FakeTensorMode
from torch.utils._sympy import functions

from .errors import ArtifactError

_SYMPY = (
    "Add", "Mul", "Pow", "Abs",
    "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "Piecewise",
)  # fmt: skip
_TORCH = (
    "FloorDiv", "ModularIndexing", "Where", "PythonMod", "Mod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv",
    "LShift", "RShift", "Max", "Min", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv", "TruncToFloat",
    "TruncToInt", "RoundToInt", "RoundDecimal", "ToFloat", "Identity",
)  # fmt: skip
_CLASSES: dict[str, Any] = {name: getattr(sympy, name) for name in _SYMPY}
_CLASSES |= {name: getattr(functions, name) for name in _TORCH if hasattr(functions, name)}
_NAMES = {cls: name for name, cls in _CLASSES.items()}


def encode_expression(expr: Any) -> Any:
    """Return a sympy expression as an int, a float, a bool, a symbol's name or ``[class, *arguments]``.

    Raises:
        ArtifactError: The expression has a function that this format does not know.
    """
    if isinstance(expr, (bool, int)):
        return expr
    if isinstance(expr, BooleanAtom):
        return bool(expr)
    if isinstance(expr, sympy.Symbol):
        return expr.name
    if isinstance(expr, sympy.Integer):
        return int(expr)
    if isinstance(expr, sympy.Float):
        return float(expr)
    if isinstance(expr, sympy.Rational):
        return ["Mul", int(expr.p), ["Pow", int(expr.q), -1]]
    name = _NAMES.get(type(expr))
    if name is None:
        raise ArtifactError(f"the symbolic size {expr} cannot be saved: {type(expr).__name__} has no saved form")
    return [name, *map(encode_expression, expr.args)]


class SymbolTable:
    """The symbols of one loaded program.

    Args:
        hints: Example size of every symbol, None where the size depends on data.
        labels: What to call a symbol; those that carry the same label get numbers.
    """

    def __init__(self, hints: Mapping[str, int | None], labels: Mapping[str, str]) -> None:
        # Here, since these two modules take seconds to import.
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        self.env = ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True)
        self.mode = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=True)
        self._hints: dict[Any, int | None] = {}
        self.symbols: dict[str, Any] = {}
        self._plain: dict[str, Any] = {}
        taken: set[str] = set()
        for name, hint in hints.items():
            label = free = labels.get(name, name)
            while free in taken:
                free = f"{label}.{len(taken)}"
            taken.add(free)
            self.symbols[name] = self._new(free, hint)
            self._hints[self.symbols[name]] = hint

    def size(self, data: Any) -> Any:
        """Return the int, SymInt, SymFloat or SymBool that ``data`` (of `encode_expression`) stands for."""
        if isinstance(data, (bool, int, float)):
            return data
        if isinstance(data, str) and data in self._plain:
            return self._plain[data]
        made = self._made(self.expression(data))
        if isinstance(data, str):
            self._plain[data] = made
        return made

    def _made(self, expr: Any) -> Any:
        if isinstance(expr, (Relational, BooleanFunction, BooleanAtom)):
            return self.env.create_symboolnode(expr)  # type: ignore[arg-type]
        make = self.env.create_symintnode if expr.is_integer else self.env.create_symfloatnode
        return make(expr, hint=self.example(expr))

    def expression(self, data: Any) -> Any:
        """Return the sympy expression in this table's symbols."""
        if isinstance(data, bool):
            return sympy.true if data else sympy.false
        if isinstance(data, int):
            return sympy.Integer(data)
        if isinstance(data, float):
            return sympy.Float(data)
        if isinstance(data, str):
            if data not in self.symbols:
                raise ArtifactError(f"the size '{data}' is none of the symbols {list(self.symbols)}")
            return self.symbols[data]
        if isinstance(data, list) and data and data[0] in _CLASSES:
            return _CLASSES[data[0]](*map(self.expression, data[1:]))
        raise ArtifactError(f"{data!r} is no symbolic size")

    def example(self, expr: Any) -> int | float | None:
        """Return the value of an expression at the example sizes, None where it depends on data."""
        if any(self._hints[symbol] is None for symbol in expr.free_symbols):
            return None
        value = expr.xreplace({s: sympy.Integer(self._hints[s] or 0) for s in expr.free_symbols})
        return int(value) if expr.is_integer else float(value)

    def _new(self, name: str, hint: int | None) -> Any:
        if hint is None:
            return self.env.create_unbacked_symint().node.expr
        from torch._dynamo.source import ConstantSource
        from torch.fx.experimental.symbolic_shapes import DimDynamic

        source = ConstantSource(name)
        return self.env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC, do_not_specialize_zero_one=True)


def is_symbolic(value: object) -> bool:
    """Whether ``value`` is a size, flag or number that is computed from symbols."""
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def encode_path(path: Sequence[Any]) -> list[list[Any]]:
    """Return as plain data where torch's tracing finds a size that depends on data.

    Raises:
        ArtifactError: It is found in a way that has no saved form.
    """
    out = []
    for key in path:
        name = type(key).__name__
        if name not in ("CallMethodKey", "SequenceKey", "DivideByKey", "ConvertIntKey"):
            raise ArtifactError(f"a size that depends on data is found by {name}, which cannot be saved")
        fields = [getattr(key, field) for field in key.__dataclass_fields__]
        out.append([name, *(field if isinstance(field, str) else int(field) for field in fields)])
    return out


def decode_path(data: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
    """Return the key path that `encode_path` wrote."""
    from torch.fx.experimental.symbolic_shapes import CallMethodKey, ConvertIntKey, DivideByKey

    out: list[Any] = []
    for name, *values in data:
        if name == "CallMethodKey" and values[0] in ("size", "stride", "storage_offset", "item"):
            out.append(CallMethodKey(values[0]))
        elif name == "SequenceKey":
            out.append(pytree.SequenceKey(int(values[0])))
        elif name == "DivideByKey":
            out.append(DivideByKey(int(values[0])))
        elif name == "ConvertIntKey":
            out.append(ConvertIntKey())
        else:
            raise ArtifactError(f"{name} of {values} does not say where a size is found")
    return tuple(out)
