"""Conditions on sizes that a capture met: in the form of `graph.guards`, without those that change nothing."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..graph.guards import holds
from ..graph.operators import arg, base_name

# Sizes to try where a condition bounds a size from above.
LARGER = (64, 65, 128, 257, 512, 1024, 4096)
Labels = Mapping[int, Mapping[int, str]]


def guards_of(model: nn.Module, exported: torch.export.ExportedProgram, names: list[str]) -> list[str]:
    """Return the conditions on sizes that the trace met, in the form of `graph.guards`."""
    parameters = inspect.signature(model.forward).parameters
    kinds = {name: parameter.kind for name, parameter in parameters.items()}

    def size(match: re.Match[str]) -> str:
        head, *rest = re.findall(r"\['?([^\]']+)'?\]", match[1])
        if kinds.get(head) is inspect.Parameter.VAR_POSITIONAL and rest:
            head, *rest = f"arg{rest[0]}", *rest[1:]
        elif kinds.get(head) is inspect.Parameter.VAR_KEYWORD and rest:
            head, *rest = rest
        return f"size({'.'.join([head, *rest])!r}, {match[2]})"

    texts = [re.sub(r"L((?:\[[^\]]+\])+)\.size\(\)\[(\d+)\]", size, text) for text in exported._guards_code]
    return list(dict.fromkeys(texts))


def without_idle(
    guards: Sequence[str],
    gm: GraphModule,
    names: Sequence[str],
    leaves: Sequence[Any],
    labels: Labels,
    capture: Callable[[list[Any]], GraphModule],
) -> list[str]:
    """Leave out the conditions that bound a size from above and behind which the same operators run.

    The U-Nets of diffusers, for one, make a tensor contiguous from a batch of 64 on. Such a model is captured again, at a
    size that breaks the condition, and the graphs are compared.

    Args:
        guards: Conditions that `graph.guards` understands.
        gm: The graph of the capture.
        names: Of the inputs.
        leaves: Example inputs.
        labels: Names of dynamic dimensions, by input and dimension.
        capture: Returns the graph for example inputs, all sizes static.
    """
    kept = list(guards)
    for text in guards:
        larger = _breaking(text, names, leaves, labels) if text in kept else None
        if larger is None:
            continue
        try:
            other = capture(larger)
        # A model that cannot be captured at that size is right to have the condition.
        except Exception:
            continue
        if same_computation(gm, other):
            sizes = _sizes(names, larger)
            kept = [g for g in kept if holds(g, sizes)]
    return kept


def _sizes(names: Sequence[str], leaves: Iterable[Any]) -> dict[str, Sequence[int]]:
    return {name: leaf.shape for name, leaf in zip(names, leaves, strict=True) if isinstance(leaf, Tensor)}


def _breaking(text: str, names: Sequence[str], leaves: Sequence[Any], labels: Labels) -> list[Any] | None:
    """Return inputs with one dynamic dimension made larger, so that the condition does not hold; None if none does."""
    for label in dict.fromkeys(label for dims in labels.values() for label in dims.values()):
        for size in LARGER:
            larger = [_resized(leaf, labels.get(i, {}), label, size) for i, leaf in enumerate(leaves)]
            if not holds(text, _sizes(names, larger)):
                return larger
    return None


def _resized(leaf: Any, dims: Mapping[int, str], label: str, size: int) -> Any:
    for dim, own in dims.items():
        if own == label:
            leaf = leaf.index_select(dim, torch.arange(size, device=leaf.device) % leaf.shape[dim])
    return leaf


def same_computation(dynamic: GraphModule, static: GraphModule) -> bool:
    """Whether two captures of one model run the same operators on the same values, whatever sizes they were made for."""
    a, b = _calls(dynamic), _calls(static)
    number: dict[Node, int] = {}
    for i, (x, y) in enumerate(zip_longest(a, b)):
        if x is None or y is None or x.op != y.op or (x.op != "placeholder" and x.target != y.target):
            return False
        if not _same_arguments(_leaves(x), _leaves(y), number):
            return False
        number[x] = number[y] = i
    return True


def _calls(gm: GraphModule) -> list[Node]:
    """Return the nodes that compute tensors; arithmetic of sizes is not compared, its results are."""
    return [n for n in gm.graph.nodes if n.op == "output" or not _is_size(n) and not _gives_operand(n)]


def _is_size(node: Node) -> bool:
    value = node.meta.get("val")
    return node.op == "call_function" and isinstance(value, (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))


def _leaves(node: Node) -> list[Any]:
    return pytree.tree_leaves((node.args, dict(sorted(node.kwargs.items()))))


def _same_arguments(a: list[Any], b: list[Any], number: Mapping[Node, int]) -> bool:
    if len(a) != len(b):
        return False
    for x, y in zip(a, b, strict=True):
        x, y = _source(x), _source(y)
        if isinstance(x, Node) and _is_size(x):
            if not isinstance(y, (int, float)) and not (isinstance(y, Node) and _is_size(y)):
                return False
        elif isinstance(x, Node) != isinstance(y, Node):
            return False
        elif number[x] != number[y] if isinstance(x, Node) else x != y:
            return False
    return True


def _source(value: Any) -> Any:
    """Return the node whose values a node gives."""
    while isinstance(value, Node) and _gives_operand(value):
        value = value.args[0]
    return value


def _gives_operand(node: Node) -> bool:
    """Whether the result has the operand's values: another layout in memory, or a slice that takes everything.

    Export leaves the latter out where sizes are static.
    """
    if base_name(node) == "contiguous":
        return True
    whole = (None, 0), (None, sys.maxsize), (1,)
    given = arg(node, 2, "start"), arg(node, 3, "end"), arg(node, 4, "step", 1)
    return base_name(node) == "slice" and all(value in values for value, values in zip(given, whole, strict=True))
