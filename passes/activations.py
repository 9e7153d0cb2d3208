"""Statistics of activations: how large the features are that each layer reads, on calibration batches."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node

from ..graph.operators import is_convolution, layer_of, weight_of
from ..graph.program import Program
from .base import Context
from .criteria import first_names
from .watched import calibration_values


def activation_means(program: Program, ctx: Context) -> dict[tuple[str, int], Tensor]:
    """Return the mean of ``|x|`` of every feature that a layer reads, over ``ctx.batches``.

    Returns:
        ``[features]`` by the layer's weight and the dimension of it that meets them. Grouped convolutions, whose weights
        meet each feature in one group only, and layers with computed weights are left out.

    Raises:
        PreconditionError: There is no loss that calls the program, or no batch.
    """
    read = _reads(program)
    totals: dict[tuple[str, int], Tensor] = {}
    for values in calibration_values(program, [node.name for node, _ in read.values()], ctx):
        for (key, (_, dim)), value in zip(read.items(), values, strict=True):
            mean = value.abs().double().movedim(dim, 0).flatten(1).mean(1)
            totals[key] = totals[key] + mean if key in totals else mean
    return totals


def _reads(program: Program) -> dict[tuple[str, int], tuple[Node, int]]:
    """Return by weight and dimension the node that a layer reads, and the dimension of its features."""
    names = first_names(program)
    found: dict[tuple[str, int], tuple[Node, int]] = {}
    for node in program.nodes:
        layer, weight = layer_of(node), weight_of(node)
        if layer is None or not isinstance(weight, Node) or weight.op != "get_attr":
            continue
        source, shape = node.all_input_nodes[0], weight.meta["val"].shape
        if source is weight or len(shape) < 2:
            continue
        value = source.meta["val"]
        dim = value.dim() - len(shape) + 1 if is_convolution(node) else value.dim() - 1
        inputs = layer.inputs % len(shape)
        if value.shape[dim] == shape[inputs]:
            found.setdefault((names[str(weight.target)], inputs), (source, dim))
    return found
