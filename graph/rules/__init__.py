"""One rule per operator, by family; `rule_for` finds it, `register_rule` adds one for a foreign operator."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from ..operators import operator_name
from . import (
    attention,
    convolution,
    creation,
    elementwise,
    indexing,
    linear,
    normalisation,
    recurrent,
    reduction,
    shape,
)
from .base import Analysis, AxesRule, Dims, Resizer, Value
from .base import Label as Label

_FAMILIES = (
    elementwise,
    linear,
    convolution,
    normalisation,
    attention,
    reduction,
    shape,
    indexing,
    creation,
    recurrent,
)

# Rules of ATen operators by the operator's name without overload and without the underscore of in-place forms.
ATEN: dict[str, AxesRule] = {name: rule for family in _FAMILIES for name, rule in family.RULES.items()}

_BY_OVERLOAD = {**shape.RULES_BY_OVERLOAD, **creation.RULES_BY_OVERLOAD}

_foreign: dict[Any, AxesRule] = {}
_found: dict[Any, AxesRule | None] = {}
_POINTWISE = AxesRule(elementwise.broadcast)


def register_rule(
    target: Callable[..., Any],
    axes: Callable[[Analysis, Node], Value],
    resize: Callable[[Resizer, Node], None] | None = None,
) -> None:
    """Teach the analysis an operator of your own.

    Args:
        target: The operator as it stands in the graph, such as ``torch.ops.mylib.scale.default``.
        axes: Given the analysis and a node, returns the dims of the node's value: one `Axis` a dimension, a tuple of
            those for several outputs. It reads operands with ``analysis.of(node.args[i])``, ties dimensions with
            ``analysis.unify``, and freezes what must stay with ``analysis.freeze(axis, "why")``.
        resize: Rewrites the node's literal arguments from ``resizer.size(axis)``, where they hold a size.

    Raises:
        ValueError: The operator has a rule already, or is a family of overloads, of which a graph never holds but one.
    """
    if isinstance(target, torch._ops.OpOverloadPacket):
        raise ValueError(f"{target} has several overloads; register one of them, such as {target}.default")
    if rule_for(target) is not None:
        raise ValueError(f"{target} has a rule already")
    _foreign[target] = AxesRule(axes, resize)
    _found.pop(target, None)


def unregister_rule(target: Callable[..., Any]) -> None:
    """Forget a rule added by `register_rule`."""
    _foreign.pop(target, None)
    _found.pop(target, None)


def rule_for(target: Any) -> AxesRule | None:
    """Return the rule of an operator, None where there is none and everything it touches must freeze."""
    if target not in _found:
        _found[target] = _look_up(target)
    return _found[target]


def _look_up(target: Any) -> AxesRule | None:
    if target in _foreign:
        return _foreign[target]
    if target is operator.getitem:
        return AxesRule(_getitem)
    if not isinstance(target, torch._ops.OpOverload):
        return None
    if target.namespace != "aten":
        return linear.FOREIGN.get(operator_name(target))
    rule = _BY_OVERLOAD.get(str(target)) or ATEN.get(operator_name(target))
    if rule is None and torch.Tag.pointwise in target.tags:
        rule = _POINTWISE
    return rule and AxesRule(_positional(rule.axes), rule.resize)


def _positional(axes: Callable[[Analysis, Node], Value]) -> Callable[[Analysis, Node], Value]:
    """Move arguments given by name, as only hand-made nodes have them, to their positions, where rules read them."""

    def positional(an: Analysis, node: Node) -> Value:
        if node.kwargs:
            args, kwargs = list(node.args), dict(node.kwargs)
            for argument in node.target._schema.arguments[len(args) :]:  # type: ignore[union-attr]
                if argument.kwarg_only or not kwargs.keys() & _names_from(node, len(args)):
                    break
                args.append(kwargs.pop(argument.name, argument.default_value))
            if len(args) > len(node.args):
                node.args, node.kwargs = tuple(args), kwargs
        return axes(an, node)

    return positional


def _names_from(node: Node, index: int) -> set[str]:
    return {a.name for a in node.target._schema.arguments[index:] if not a.kwarg_only}  # type: ignore[union-attr]


def _getitem(an: Analysis, node: Node) -> Value:
    source = node.args[0]
    value = an.dims.get(source) if isinstance(source, Node) else None
    return None if value is None else value[node.args[1]]


__all__ = ["ATEN", "Analysis", "AxesRule", "Dims", "Resizer", "Value", "register_rule", "rule_for", "unregister_rule"]
