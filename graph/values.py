"""What is recorded of a node's value (``meta["val"]``) as plain data, and fake tensors from it after loading."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Node

from .encoding import decode, encode
from .errors import ArtifactError
from .symbols import SymbolTable, encode_expression, is_symbolic


def encode_value(value: Any) -> Any:
    """Return a node's value as plain data: a tensor as its shape, dtype and device, a size as its expression.

    Raises:
        ArtifactError: A size has no saved form, or the value is no tensor, number or sequence of those.
    """
    if isinstance(value, Tensor):
        return {"tensor": describe(value)}
    if is_symbolic(value):
        return {"size": encode_expression(value.node.expr)}
    if isinstance(value, (tuple, list)):
        kind = "values" if isinstance(value, tuple) else "list"
        return {kind: [encode_value(item) for item in value]}
    return {"constant": encode(value)}


def describe(tensor: Tensor) -> dict[str, Any]:
    """Return shape, dtype and device of a tensor, and its strides where they are not the usual ones."""
    if tensor.layout is not torch.strided:
        raise ArtifactError(f"a tensor of layout {tensor.layout} cannot be saved")
    data = {
        "shape": [_size(size) for size in tensor.shape],
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "device": str(tensor.device),
    }
    stride = [_size(step) for step in tensor.stride()]
    if stride != _usual_stride(data["shape"], tensor):
        data["stride"] = stride
    return data


def decode_value(data: Any, table: SymbolTable) -> Any:
    """Return the value that `encode_value` wrote, tensors as fake ones. Call it under the table's fake mode."""
    if not isinstance(data, dict) or len(data) != 1:
        raise ArtifactError(f"{data!r} is no recorded value")
    ((kind, value),) = data.items()
    if kind == "tensor":
        return empty(value, table)
    if kind == "size":
        return table.size(value)
    if kind == "values":
        return tuple(decode_value(item, table) for item in value)
    if kind == "list":
        return [decode_value(item, table) for item in value]
    if kind == "constant":
        return decode(value)
    raise ArtifactError(f"{kind!r} is no kind of recorded value")


def empty(data: dict[str, Any], table: SymbolTable) -> Tensor:
    """Return an uninitialised tensor as `describe` described it."""
    shape = [table.size(size) for size in data["shape"]]
    if any(size < 0 for size in shape if type(size) is int):
        raise ArtifactError(f"{shape} is no shape")
    dtype, device = decode({"dtype": data["dtype"]}), decode({"device": data["device"]})
    if "stride" not in data:
        elem = torch.empty(shape, dtype=dtype, device="meta")
    else:
        elem = torch.empty_strided(shape, list(map(table.size, data["stride"])), dtype=dtype, device="meta")
    return FakeTensor(table.mode, elem, device)


def at_example_sizes(value: Any, table: SymbolTable) -> Any:
    """Return a recorded value with every symbolic size replaced by its example. Call it under a fake mode."""
    if isinstance(value, (tuple, list)):
        return type(value)(at_example_sizes(item, table) for item in value)
    if not isinstance(value, Tensor):
        return value
    shape = [table.example(s.node.expr) if isinstance(s, torch.SymInt) else s for s in value.shape]
    return torch.empty(shape, dtype=value.dtype, device=value.device)  # type: ignore[arg-type]


def symbols_of(graph_module: GraphModule) -> Iterator[tuple[Any, Any]]:
    """Yield ``(symbol, shape environment)`` for every symbol in the recorded values, in graph order."""
    for node in all_nodes(graph_module):
        yield from _symbols(node.meta.get("val"))


def all_nodes(graph_module: GraphModule) -> Iterator[Node]:
    """Yield the nodes of a graph module and of the graphs inside it (branches of ``cond`` and the like)."""
    for module in graph_module.modules():
        if isinstance(module, GraphModule):
            yield from module.graph.nodes


def _symbols(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _symbols(item)
    elif isinstance(value, Tensor):
        yield from _symbols(tuple(value.shape))
    elif is_symbolic(value):
        for symbol in sorted(value.node.expr.free_symbols, key=str):
            yield symbol, value.node.shape_env


def _size(size: Any) -> Any:
    return size if type(size) is int else encode_expression(size.node.expr)


def _usual_stride(shape: list[Any], tensor: Tensor) -> list[Any]:
    if any(type(size) is not int for size in tensor.shape):
        # Comparing symbolic products would add guards; the text of the expressions is compared instead.
        usual, step = [], 1
        for size in reversed(tensor.shape):
            usual.append(_size(step))
            step = step * size if type(size) is not int or size > 1 else step
        return usual[::-1]
    return list(torch.empty(shape, device="meta").stride())
