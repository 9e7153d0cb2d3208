"""Grouped matrix products, which transformers' mixtures of experts are made of, as ONNX operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._ops import OpOverload
from torch.fx import GraphModule

GROUPED_PRODUCT = "transformers::grouped_mm_fallback"  # exists once transformers is imported


def translations(gm: GraphModule) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return a translation to ONNX for the operators in ``gm`` that torch has none for."""
    targets = {node.target for node in gm.graph.nodes if isinstance(node.target, OpOverload)}
    return {target: grouped_product for target in targets if target.name() == GROUPED_PRODUCT}


def grouped_product(rows: Any, weight: Any, offs: Any) -> Any:
    """Translate a grouped product: each run of rows times its own matrix.

    That is, for each matrix, a slice whose ends are data and a product; a matrix without rows gives an empty one.

    Args:
        rows: [rows, in], sorted by group.
        weight: [groups, in, out], the number of groups known.
        offs: [groups], where each group's rows end. What follows the last gives zeros.
    """
    import onnxscript

    op: Any = onnxscript.opset18
    groups, width = weight.shape[0], weight.shape[2]
    first = op.Constant(value_ints=[0])
    ends = op.Cast(offs, to=7)  # int64
    products, start = [], first
    for group in range(groups):
        end = op.Slice(ends, op.Constant(value_ints=[group]), op.Constant(value_ints=[group + 1]), first)
        matrix = op.Gather(weight, op.Constant(value_int=group), axis=0)
        products.append(op.MatMul(op.Slice(rows, start, end, first), matrix))
        start = end
    rest = op.Sub(op.Shape(rows, start=0, end=1), start)
    shape = op.Concat(rest, op.Constant(value_ints=[width]), axis=0)
    products.append(op.Expand(op.CastLike(op.Constant(value_float=0.0), rows), shape))
    return op.Concat(*products, axis=0)
