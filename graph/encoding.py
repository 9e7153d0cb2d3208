"""Operators and their arguments as plain data.

Whatever JSON has itself (None, bool, int, finite float, text, list) stands for itself; everything else is an
object with one key that says what it is: ``{"node": "add_1"}``, ``{"tuple": [...]}``, ``{"dtype": "float32"}``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from .errors import ArtifactError
from .treespec import import_trusted

_OPERATOR = (
    "add sub mul truediv floordiv mod pow neg pos abs eq ne lt le gt ge and_ or_ not_ xor is_ is_not getitem"
).split()
_MATH = "ceil floor trunc sqrt log exp prod".split()
_TORCH = "sym_float sym_int sym_max sym_min sym_not sym_ite sym_sum sym_sqrt".split()
# What a graph may call besides operators of torch.ops: arithmetic on sizes, and picking from a tuple.
_FUNCTIONS: dict[str, Any] = {f"operator.{name}": getattr(operator, name) for name in _OPERATOR}
_FUNCTIONS |= {f"math.{name}": getattr(math, name) for name in _MATH}
_FUNCTIONS |= {f"torch.{name}": getattr(torch, name) for name in _TORCH if hasattr(torch, name)}
_FUNCTION_NAMES = {function: name for name, function in _FUNCTIONS.items()}
_HIGHER_ORDER = frozenset(
    "cond while_loop map_impl scan wrap_with_autocast wrap_with_set_grad_enabled tag_activation_checkpoint".split()
)
# They open or write files; no captured model has them.
_FORBIDDEN = frozenset({"aten::from_file"})
_BY_NAME = {
    "dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format,
}  # fmt: skip


def encode_target(target: Any) -> str:
    """Return an operator's qualified name, such as ``aten::add.Tensor`` or ``operator.getitem``.

    Raises:
        ArtifactError: It is no operator that can be found again by its name.
    """
    if isinstance(target, torch._ops.OpOverload):
        return f"{target._schema.name}.{target._overloadname}"
    if isinstance(target, torch._ops.HigherOrderOperator) and target.name() in _HIGHER_ORDER:
        return f"higher_order::{target.name()}"
    try:
        return _FUNCTION_NAMES[target]
    except (KeyError, TypeError):
        name = getattr(target, "__name__", str(target))
        raise ArtifactError(
            f"the call of {name} cannot be saved: only operators of torch.ops and arithmetic on sizes can; "
            "register it with torch.library.custom_op"
        ) from None


def decode_target(name: str, modules: Mapping[str, str]) -> Callable[..., Any]:
    """Return the operator called ``name``.

    Args:
        name: What `encode_target` wrote.
        modules: By name of a foreign operator, the module that defines it.

    Raises:
        ArtifactError: There is no such operator, or its library is neither imported nor trusted.
    """
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    schema, _, overload = name.partition(".")
    space, _, short = schema.partition("::")
    if space == "higher_order":
        if short not in _HIGHER_ORDER:
            raise ArtifactError(f"the program calls {name}, which this version does not load")
        return getattr(torch.ops.higher_order, short)
    if schema in _FORBIDDEN or not short:
        raise ArtifactError(f"the program calls {name}, which this version does not load")
    if schema in modules and not _registered(space, short):
        import_trusted(modules[schema], f"the program calls the operator {schema} of {modules[schema]}")
    try:
        return getattr(getattr(getattr(torch.ops, space), short), overload)
    except (AttributeError, RuntimeError):
        hint = f"import the library that defines it before loading, torch is {torch.__version__}"
        raise ArtifactError(f"the program calls the operator {name}, which is not registered: {hint}") from None


def defining_module(target: Any) -> str | None:
    """Return the module whose import registers a foreign operator, None where that is unknown or not needed."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace in ("aten", "prims", "prim"):
        return None
    from torch._library.custom_ops import OPDEFS

    made = OPDEFS.get(target._schema.name)
    module = None if made is None else made._init_fn.__module__
    return module if module is None or module.partition(".")[0] != "__main__" else None


def _registered(space: str, short: str) -> bool:
    try:
        getattr(getattr(torch.ops, space), short)
    except (AttributeError, RuntimeError):
        return False
    return True


def encode(value: Any) -> Any:
    """Return an argument of a node, or a constant input, as plain data.

    Raises:
        ArtifactError: The value has no saved form.
    """
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, complex):
        return {"complex": [encode(value.real), encode(value.imag)]}
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, (tuple, list)):
        if type(value).__name__ not in ("tuple", "list", "immutable_list", "Size"):
            raise ArtifactError(f"a {type(value).__name__} cannot be saved as an argument")
        items = [encode(item) for item in value]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if value is Ellipsis:
        return {"ellipsis": None}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, cls in _BY_NAME.items():
        if isinstance(value, cls):
            return {kind: str(value).removeprefix("torch.")}
    if isinstance(value, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)):
        return {"operator": encode_target(value)}
    raise ArtifactError(f"a value of type {type(value).__name__} cannot be saved: {value!r}")


def decode(data: Any, nodes: Mapping[str, Node] | None = None, modules: Mapping[str, str] | None = None) -> Any:
    """Return the value that `encode` wrote; ``nodes`` are the graph's nodes so far, by name.

    Raises:
        ArtifactError: The data is of no known kind, or names an unknown node, dtype, device or operator.
    """
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    if isinstance(data, list):
        return [decode(item, nodes, modules) for item in data]
    if not isinstance(data, dict) or len(data) != 1:
        raise ArtifactError(f"{data!r} is no saved value")
    ((kind, value),) = data.items()
    if kind == "node":
        if nodes is None or value not in nodes:
            raise ArtifactError(f"the node %{value} is used before it is defined")
        return nodes[value]
    if kind == "operator":
        return decode_target(value, modules or {})
    if kind in ("tuple", "complex", "slice", "range"):
        items = [decode(item, nodes, modules) for item in value]
        return tuple(items) if kind == "tuple" else {"complex": complex, "slice": slice, "range": range}[kind](*items)
    if kind == "dict":
        return {decode(key, nodes, modules): decode(item, nodes, modules) for key, item in value}
    if kind == "float":
        return float(value)
    if kind == "ellipsis":
        return ...
    return _decode_named(kind, value)


def _decode_named(kind: str, value: Any) -> Any:
    if kind == "device":
        try:
            return torch.device(value)
        except RuntimeError as err:
            raise ArtifactError(f"torch {torch.__version__} knows no device {value!r}") from err
    cls = _BY_NAME.get(kind)
    found = getattr(torch, str(value), None)
    if cls is None or not isinstance(found, cls):
        raise ArtifactError(f"torch {torch.__version__} knows no {kind} {value!r}")
    return found


__all__ = ["decode", "decode_target", "defining_module", "encode", "encode_target"]
