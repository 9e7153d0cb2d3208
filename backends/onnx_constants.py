"""Constants that the exporter's optimiser would take for 0 or 1."""

from __future__ import annotations

import math
from typing import Any

# The optimiser's patterns for ``x + 0`` and ``x * 1`` match with these tolerances (onnxscript's ``Constant`` pattern).
RELATIVE, ABSOLUTE = 1e-5, 1e-8


def optimize_exactly(onnx_program: Any) -> None:
    """Optimise a ``torch.onnx.ONNXProgram`` in place without losing small constants.

    The optimiser takes ``x + 1e-15`` for ``x`` and ``x * 1.000001`` too, so that ``0 / (0 + 1e-15)``, which is 0,
    becomes NaN. Numbers so close to 0 or 1 are inputs of the graph while it runs, of which it knows no value.
    """
    import onnx_ir as ir

    graph = onnx_program.model.graph
    hidden: dict[str, Any] = {}
    for value in [*graph.initializers.values(), *(node.outputs[0] for node in graph if node.op_type == "Constant")]:
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is None or not _nearly_neutral(tensor):
            continue
        name = f"hidden_constant_{len(hidden)}"
        stand_in = ir.Value(name=name, shape=ir.Shape([]), type=ir.TensorType(tensor.dtype))
        value.replace_all_uses_with(stand_in, replace_graph_outputs=True)
        graph.inputs.append(stand_in)
        hidden[name] = tensor
    onnx_program.optimize()
    graph = onnx_program.model.graph
    for value in [value for value in graph.inputs if value.name in hidden]:
        graph.inputs.remove(value)
        value.const_value = hidden[value.name]
        if value.uses() or value.is_graph_output():
            graph.register_initializer(value)


def _nearly_neutral(tensor: Any) -> bool:
    """Whether a scalar is one of the optimiser's 0 or 1 without being it."""
    if tensor.size != 1 or len(tensor.shape) or not tensor.dtype.is_floating_point():
        return False
    number = float(tensor.numpy())
    return any(
        number != neutral and math.isclose(number, neutral, rel_tol=RELATIVE, abs_tol=ABSOLUTE) for neutral in (0, 1)
    )
