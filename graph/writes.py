"""Which tensors of its module a graph writes into when it runs, and copies of these that keep sharing what they shared."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from .operators import MAY_GIVE_INPUT, STATISTICS, arg, base_name

_NONE: frozenset[str] = frozenset()


def written(graph: Graph) -> list[str]:
    """Return the names of the tensors that operators of the graph write into, through views too."""
    owners: dict[Node, frozenset[str]] = {}  # of a value the tensors of the module that it is, or shows a part of
    found: dict[str, None] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            owners[node] = frozenset((str(node.target),))
        elif node.op == "call_function":
            shown = _NONE
            for value, shares, writes in _arguments(node):
                reached = _NONE.union(*(owners.get(n, _NONE) for n in _nodes(value)))
                if writes:
                    found.update(dict.fromkeys(sorted(reached)))
                if shares:
                    shown |= reached
            if shown:
                owners[node] = shown
    return list(found)


def _arguments(node: Node) -> Iterator[tuple[Any, bool, bool]]:
    """Yield each argument, whether the result may share its memory, and whether the operator writes into it."""
    if node.target is operator.getitem:
        yield node.args[0], True, False
        return
    schema, name = getattr(node.target, "_schema", None), base_name(node)
    if schema is None:
        return
    statistics = name in STATISTICS and bool(arg(node, *STATISTICS[name]))
    for i, argument in enumerate(schema.arguments):
        value, info = arg(node, i, argument.name), argument.alias_info
        shares = info is not None or (i == 0 and name in MAY_GIVE_INPUT)
        writes = (info is not None and info.is_write) or (statistics and argument.name.startswith("running_"))
        yield value, shares, writes


def _nodes(value: Any) -> list[Node]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [v for v in values if isinstance(v, Node)]


def owned(names: Iterable[str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of the tensors called ``names``, and of those that share memory with them, which share it again.

    Args:
        names: Of the tensors that something writes into.
        tensors: All tensors by name.
    """
    own: dict[str, Tensor] = {}
    for name in names:
        if name in own or name not in tensors:
            continue
        sharing = {other: t for other, t in tensors.items() if _overlap(t, tensors[name])}
        own |= _copies(sharing or {name: tensors[name]})
    return {name: _like(copy, tensors[name]) for name, copy in own.items()}


def _copies(sharing: Mapping[str, Tensor]) -> dict[str, Tensor]:
    spans = [span for t in sharing.values() if (span := _span(t)) is not None]
    if not spans:
        made: dict[int, Tensor] = {}
        return {name: made.setdefault(id(t), t.detach().clone()) for name, t in sharing.items()}
    first = min(span.first for span in spans) & ~15  # where a number of any type may begin
    memory = next(iter(sharing.values())).untyped_storage()[first : max(span.end for span in spans)].clone()
    copies = {}
    for name, t in sharing.items():
        offset = t.storage_offset() - first // t.element_size()
        copies[name] = torch.empty(0, dtype=t.dtype, device=t.device).set_(memory, offset, t.shape, t.stride())
    return copies


def _like(copy: Tensor, original: Tensor) -> Tensor:
    return nn.Parameter(copy, original.requires_grad) if isinstance(original, nn.Parameter) else copy


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have elements at one place in memory."""
    if a is b:
        return True
    x, y = _span(a), _span(b)
    return x is not None and y is not None and x.storage == y.storage and x.first < y.end and y.first < x.end


class _Span(NamedTuple):
    """Where a tensor lies: its storage, its first byte, and the byte after its last."""

    storage: int
    first: int
    end: int


def _span(tensor: Tensor) -> _Span | None:
    """Return where a tensor lies; None where there is no memory to compare."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.numel() == 0:
        return None
    width = tensor.element_size()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first = int(tensor.storage_offset()) * width
    return _Span(tensor.untyped_storage()._cdata, first, first + (int(last) + 1) * width)
