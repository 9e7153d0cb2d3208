"""Half precision: a verified float32 ONNX file converted to float16, except where float16 loses the result."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

from ..graph.errors import ExportError
from .onnx_order import order_for_runtime

# Sums of squares overflow at 65504, and a softmax over many entries loses the small ones.
BLOCKED_OPERATORS = (
    "LayerNormalization",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
    "GroupNormalization",
    "InstanceNormalization",
    "BatchNormalization",
    "LpNormalization",
    "Softmax",
    "LogSoftmax",
)
# The parts of a norm that the exporter did not recognise, and what stands between them.
STATISTICS = ("Pow", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "Sqrt", "Reciprocal")
_BETWEEN_STATISTICS = ("Add", "Sub", "Mul", "Div", "Max", "Min", "Clip", "Neg", "Identity")
RECURRENT = ("LSTM", "GRU", "RNN")

# Position times frequency: at 1000 a float16 has steps of 0.5, and a sine needs its argument to a fraction of that.
_PERIODIC = ("Sin", "Cos")
_ARGUMENT_OPERATORS = frozenset(
    "Cast Mul Div Add Sub Neg Exp Pow Unsqueeze Squeeze Reshape Expand Concat Transpose Slice Identity Range "
    "MatMul Tile Gather Where".split()
)


def convert_to_float16(source: Path, target: Path) -> int:
    """Write the float32 ONNX file ``source`` as ``target`` with float16 weights and arithmetic; return the node count.

    Inputs and outputs keep their types. Norms, softmax, and what computes the argument of a sine or cosine (time and
    position embeddings) stay float32.

    Args:
        source: With external data beside it.
        target: In another folder; its external data lie beside it as ``<name>.data``.

    Raises:
        ExportError: The model has a recurrent layer.
    """
    import onnx
    import onnx_ir
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    model = onnx.load(source)
    recurrent = [node for node in model.graph.node if node.op_type in RECURRENT]
    if recurrent:
        # Not even with these nodes kept in float32: the process dies while the session is made.
        raise ExportError(
            f"the model has {len(recurrent)} recurrent layers, and ONNX Runtime 1.32 crashes when it loads the float16 form "
            "of such a model on the CPU; export it without fp16"
        )
    converted = convert_float_to_float16(
        model,
        keep_io_types=True,
        disable_shape_infer=True,  # every value has its type; inference would serialise the weights, 2 GB at most
        op_block_list=[*DEFAULT_OP_BLOCK_LIST, *BLOCKED_OPERATORS, *STATISTICS],
        node_block_list=sorted(periodic_arguments(model.graph) | between_statistics(model.graph)),
    )
    model = onnx_ir.from_proto(converted)
    model.graph.sort()  # the converter appends its casts at the end
    _join_float32_nodes(model)
    order_for_runtime(model)
    onnx_ir.save(model, target, external_data=f"{target.name}.data")
    return len(converted.graph.node)


def _join_float32_nodes(model: Any) -> None:
    """Let a float32 node read the float32 result of another one.

    The converter puts a cast to float16 behind every float32 node and a cast back in front of the next, which rounds
    what was to be kept exact, and overflows.
    """
    import onnx_ir

    full, half = onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16
    for node in list(model.graph.all_nodes()):
        if node.op_type != "Cast" or node.outputs[0].dtype != full or node.outputs[0].is_graph_output():
            continue
        down = node.inputs[0].producer()
        if down is None or down.op_type != "Cast" or node.inputs[0].dtype != half or down.inputs[0].dtype != full:
            continue
        node.outputs[0].replace_all_uses_with(down.inputs[0])
        node.graph.remove(node, safe=True)
        if not down.outputs[0].uses() and not down.outputs[0].is_graph_output():
            down.graph.remove(down, safe=True)


def between_statistics(graph: Any) -> set[str]:
    """Return the names of the nodes of an ``onnx.GraphProto`` that compute with nothing but statistics and constants.

    Such as the addition of epsilon between a mean of squares and its root.
    """
    constant = {tensor.name for tensor in graph.initializer} | {""}
    constant |= {output for node in graph.node if node.op_type == "Constant" for output in node.output}
    statistics: set[str] = set()
    found: set[str] = set()
    for node in graph.node:
        varying = [name for name in node.input if name not in constant]
        if node.op_type in STATISTICS:
            statistics.update(node.output)
        elif node.op_type in _BETWEEN_STATISTICS and varying and statistics.issuperset(varying):
            statistics.update(node.output)
            found.add(node.name)
    return found


def periodic_arguments(graph: Any) -> set[str]:
    """Return the names of the sine and cosine nodes of an ``onnx.GraphProto`` and of what computes their arguments.

    The walk back ends at convolutions, norms, activations and multiplications by a weight matrix: those are the
    network, not an embedding.
    """
    producer = {output: node for node in graph.node for output in node.output}
    matrices = {tensor.name for tensor in graph.initializer if sum(size > 1 for size in tensor.dims) > 1}
    matrices |= {node.output[0] for node in graph.node if node.op_type == "Transpose" and node.input[0] in matrices}
    queue = deque(node for node in graph.node if node.op_type in _PERIODIC)
    found = {node.name for node in queue}
    while queue:
        for name in queue.popleft().input:
            node = producer.get(name)
            if node is None or node.name in found or node.op_type not in _ARGUMENT_OPERATORS:
                continue
            if node.op_type == "MatMul" and any(value in matrices for value in node.input):
                continue
            found.add(node.name)
            queue.append(node)
    return found
