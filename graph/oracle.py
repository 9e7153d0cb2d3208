"""The mask oracle: what a removal must equal, computed without removing anything.

Masking sets the removed entries of every parameter to zero and leaves all shapes as they are. Where an operator takes
a statistic over a removed axis (a norm, a mean, a sum of what is not zero), the oracle computes that one operator on
the kept indices only, and scatters its result back. A removal is right if the smaller program's output equals this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node, map_arg

from .axes import Axis, factors, find
from .depgraph import DepGraph, check_keep
from .program import get_tensor
from .resize import RemovalRecord
from .rules import Resizer, rule_for
from .rules.base import is_tensor


def masked_parameters(model: nn.Module, record: RemovalRecord) -> dict[str, Tensor]:
    """Return copies of the parameters that ``record`` shrinks, by name, with every removed entry set to zero.

    Run the model with them by ``torch.func.functional_call``, which keeps tied parameters tied.
    """
    parameters = dict(model.named_parameters())
    masked = {}
    for name, dims in record.tensors.items():
        if name not in parameters:
            continue  # a buffer, or a second name of a tied parameter
        out = parameters[name].detach().clone()
        for dim, cut in dims.items():
            gone = np.setdiff1d(np.arange(cut.of), np.asarray(cut.kept))
            out.index_fill_(dim, torch.from_numpy(gone), 0)
        masked[name] = out
    return masked


def masked_outputs(graph: DepGraph, keep: Mapping[str, Any], inputs: list[Any]) -> list[Any]:
    """Run the unresized program with the removed indices masked, statistics taken over the kept ones.

    Args:
        graph: Analysis of the program to run.
        keep: Group name to kept indices, as for `resize`.
        inputs: Flat inputs of the program.

    Returns:
        The flat outputs.
    """
    program = graph.program
    graph.check_current()
    rz = Resizer(graph.analysis, check_keep(graph, dict(keep)))
    marked = {mark.node for mark in (*graph.analysis.labels, *graph.analysis.sums) if rz.changed(mark.axis)}
    env: dict[Node, Any] = {}
    values = iter(inputs)
    with torch.no_grad():
        for node in program.nodes:
            if node.op == "placeholder":
                env[node] = next(values)
            elif node.op == "get_attr":
                env[node] = _masked(get_tensor(program.graph_module, str(node.target)), rz, rz.of(node))
            elif node.op == "output":
                outputs: Any = map_arg(node.args[0], lambda n: env[n])
                return list(outputs)
            elif node in marked:
                env[node] = _on_kept(rz, node, env)
            else:
                args, kwargs = map_arg((node.args, node.kwargs), lambda n: env[n])
                env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                if _has_nan(env[node]) and not any(_has_nan(env[source]) for source in node.all_input_nodes):
                    # The zeros of masked indices were divided by their own norm.
                    env[node] = _on_kept(rz, node, env)
    raise AssertionError("a graph has an output")


def _has_nan(value: Any) -> bool:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return any(is_tensor(v) and v.is_floating_point() and bool(v.isnan().any()) for v in values)


def _masked(tensor: Tensor | None, rz: Resizer, dims: tuple[Axis, ...]) -> Any:
    if not isinstance(tensor, nn.Parameter):
        return tensor
    out = tensor.detach().clone()
    for dim, axis in enumerate(dims):
        kept = rz.kept(axis)
        if kept is not None:
            out.index_fill_(dim, torch.from_numpy(np.setdiff1d(np.arange(axis.size), kept)), 0)
    return out


def _on_kept(rz: Resizer, node: Node, env: Mapping[Node, Any]) -> Any:
    """Run one operator on the kept indices of its inputs; put the result back where it belongs."""
    scratch = torch.fx.Graph()
    twins = {source: scratch.placeholder(source.name) for source in node.all_input_nodes}
    twin = scratch.node_copy(node, lambda n: twins[n])
    rule = rule_for(node.target)
    if rule is not None and rule.resize is not None:
        rule.resize(rz.on_copy({twin: node, **{t: s for s, t in twins.items()}}), twin)
    small = {twins[source]: _select(env[source], rz, rz.of(source)) for source in twins}
    args, kwargs = map_arg((twin.args, twin.kwargs), lambda n: small[n])
    result = twin.target(*args, **kwargs)  # type: ignore[operator]
    dims = rz.analysis.dims[node]
    if isinstance(result, (tuple, list)):
        return tuple(_scatter(r, rz, d) for r, d in zip(result, dims, strict=True))
    return _scatter(result, rz, dims)


def _select(value: Any, rz: Resizer, dims: tuple[Axis, ...]) -> Any:
    if not is_tensor(value):
        return value
    for dim, axis in enumerate(dims):
        if rz.changed(axis):
            copies = value.shape[dim] // _static_size(axis)
            value = value.index_select(dim, torch.from_numpy(_indices(rz, axis, copies)))
    return value


def _scatter(value: Any, rz: Resizer, dims: tuple[Axis, ...]) -> Any:
    if not is_tensor(value):
        return value
    for dim, axis in enumerate(dims):
        if rz.changed(axis):
            left = math.prod(int(rz.size(f)) for f in factors(axis) if type(f.size) is int)
            copies = value.shape[dim] // left
            shape = list(value.shape)
            shape[dim] = copies * _static_size(axis)
            value = value.new_zeros(shape).index_copy(dim, torch.from_numpy(_indices(rz, axis, copies)), value)
    return value


def _static_size(axis: Axis) -> int:
    """Return the product of the factors whose size is known: all of them, or all but a dynamic batch."""
    return math.prod(f.size for f in factors(axis) if type(f.size) is int)


def _indices(rz: Resizer, axis: Axis, copies: int) -> np.ndarray:
    """Return the kept indices of an axis; a dynamic factor keeps all of its ``copies``."""
    if type(find(axis).size) is int:
        kept = rz.kept(axis)
        assert kept is not None
        return kept
    out = np.zeros(1, dtype=np.int64)
    for factor in factors(axis):
        size = factor.size if type(factor.size) is int else copies
        kept = rz.kept(factor)
        out = (out[:, None] * size + (np.arange(size) if kept is None else kept)).reshape(-1)
    return out
