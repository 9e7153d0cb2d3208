"""Fold batch norm into the convolution or linear layer before it.

    before: y = batch_norm(conv2d(x, w), gamma, beta, mean, var)
    after:  y = conv2d(x, w * s, beta - mean * s)          s = gamma / sqrt(var + eps), per output channel

Refused where the convolution's result has other users or its weight is shared, and for a norm in training mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..graph.operators import bias_of, weight_of
from ..graph.program import Program, get_tensor, set_tensor, tensor_identity
from ..graph.rewriter import Rewriter
from .base import Context, Pass, PassResult, Skipped
from .unread import drop_unread

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default, aten.conv2d.padding)


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold every inference-mode batch norm into the layer that feeds it alone."""

    name: ClassVar[str] = "fold-batch-norm"

    def rewrite(self, program: Program, ctx: Context) -> PassResult:
        gm = program.graph_module
        rw = Rewriter(program, self.name)
        folded, skipped = 0, list[Skipped]()
        read_before = set(program.tensors())
        for norm in gm.graph.find_nodes(op="call_function", target=aten.batch_norm.default):
            reason = refusal(gm, norm)
            if reason is not None:
                skipped.append(Skipped(norm.name, reason))
                continue
            _fold(rw, norm)
            folded += 1
        if folded:
            drop_unread(gm, read_before)
        return PassResult(folded > 0, {"batch_norms_folded": folded}, tuple(skipped))


def refusal(gm: GraphModule, norm: Node) -> str | None:
    """Return why ``norm`` cannot be folded, None if it can."""
    layer = norm.args[0]
    if norm.args[5]:
        return "it is in training mode"
    if norm.args[3] is None:
        return "it has no running statistics"
    if not isinstance(layer, Node) or layer.target not in CONVOLUTIONS:
        return f"it follows {getattr(layer, 'target', layer)}, not a convolution or linear layer"
    if layer.target is aten.linear.default and layer.meta["val"].dim() != 2:
        return "the linear layer's features are not dimension 1"
    if layer.target is not aten.linear.default and layer.meta["val"].dim() != weight_of(layer).meta["val"].dim():
        return "the convolution's input has no batch, so that its channels are not dimension 1"
    if len(layer.users) > 1:
        return f"%{layer.name} has {len(layer.users)} users"
    for source in (*layer.args[1:3], *norm.args[1:5]):
        if isinstance(source, Node) and source.op != "get_attr":
            return f"%{source.name} is computed, not a parameter"
    if _uses(gm, layer.args[1]) > 1:
        return f"the weight {layer.args[1].target} is used elsewhere too"  # type: ignore[union-attr]
    return None


def _uses(gm: GraphModule, weight: Any) -> int:
    """Count the uses of a weight under any of its names."""
    reads = [(n, get_tensor(gm, str(n.target))) for n in gm.graph.find_nodes(op="get_attr")]
    same = next(tensor_identity(t) for n, t in reads if n is weight and t is not None)
    return sum(len(n.users) for n, t in reads if t is not None and tensor_identity(t) == same)


def _fold(rw: Rewriter, norm: Node) -> None:
    gm = rw.program.graph_module
    layer = norm.args[0]
    assert isinstance(layer, Node)
    gamma, beta, mean, var = (_tensor(gm, a) for a in norm.args[1:5])
    eps = norm.args[7]
    assert mean is not None and var is not None
    weight_node = layer.args[1]
    assert isinstance(weight_node, Node)
    weight = _tensor(gm, weight_node)
    assert weight is not None
    scale = torch.rsqrt(var.double() + eps)  # type: ignore[operator]
    if gamma is not None:
        scale = scale * gamma.double()
    old_bias = bias_of(layer)
    bias = _tensor(gm, old_bias)
    shift = (torch.zeros_like(scale) if bias is None else bias.double()) - mean.double()
    shift = shift * scale + (0 if beta is None else beta.double())
    shape = [-1] + [1] * (weight.dim() - 1)
    set_tensor(gm, str(weight_node.target), _like(weight, weight.double() * scale.view(shape)))
    name = str(weight_node.target).removesuffix("weight") + "folded_bias"
    parameter = nn.Parameter(shift.to(weight.dtype), weight.requires_grad)
    if isinstance(old_bias, Node) and old_bias.target == name:  # of the norm that was folded before this one
        bias_node = old_bias
        set_tensor(gm, name, parameter)
    else:
        bias_node = rw.tensor(name, parameter, origin=layer)
    assert callable(layer.target)
    folded = rw.call(layer.target, layer.args[0], weight_node, bias_node, *layer.args[3:], origin=layer)
    rw.replace(norm, folded)


def _tensor(gm: GraphModule, node: Any) -> Tensor | None:
    return get_tensor(gm, node.target).detach() if isinstance(node, Node) else None  # type: ignore[union-attr]


def _like(old: Tensor, new: Tensor) -> Tensor:
    new = new.to(old.dtype)
    return nn.Parameter(new, old.requires_grad)
