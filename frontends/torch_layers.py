"""Attributes of torch's own layers: they follow from the shapes of their tensors and from the program's operators."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from ..graph.program import Program
from .attributes import Value
from .sizes import module_paths


def is_layer(module: nn.Module) -> bool:
    """Whether the attributes of ``module`` follow from its own tensors."""
    return isinstance(module, tuple(kind for kinds, _ in _LAYERS for kind in _flat(kinds))) or _is_conv1d(module)


def layer_attributes(module: nn.Module, literals: Mapping[str, Any]) -> dict[str, Value]:
    """Return the attributes of a layer that follow from its tensors.

    Args:
        module: With its new tensors.
        literals: ``groups`` of the convolution and ``normalized_shape`` of the norm that the program has in its place.
    """
    for kind, derive in _LAYERS:
        if isinstance(module, kind):
            values = derive(module, literals)
            return {name: value for name, value in values.items() if value is not None}
    if _is_conv1d(module):
        weight: Any = module.weight
        return {"nx": weight.shape[0], "nf": weight.shape[1]}
    return {}


def _is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' linear layer with a transposed weight ``[in, out]``."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and isinstance(weight, Tensor)


def _flat(kinds: Any) -> tuple[type, ...]:
    return kinds if isinstance(kinds, tuple) else (kinds,)


def _linear(m: nn.Linear, _: Mapping[str, Any]) -> dict[str, Any]:
    return {"in_features": m.weight.shape[1], "out_features": m.weight.shape[0]}


def _bilinear(m: nn.Bilinear, _: Mapping[str, Any]) -> dict[str, Any]:
    out, first, second = m.weight.shape
    return {"in1_features": first, "in2_features": second, "out_features": out}


def _conv(m: Any, literals: Mapping[str, Any]) -> dict[str, Any]:
    groups = literals.get("groups", m.groups)
    outer, inner = m.weight.shape[:2]
    first, second = ("in_channels", "out_channels") if m.transposed else ("out_channels", "in_channels")
    return {first: outer, second: inner * groups, "groups": groups}


def _batch_norm(m: Any, literals: Mapping[str, Any]) -> dict[str, Any]:
    found = next((t for t in (m.weight, m.running_mean) if t is not None), None)
    return {"num_features": found.shape[0] if found is not None else literals.get("channels")}


def _shaped_norm(m: Any, literals: Mapping[str, Any]) -> dict[str, Any]:
    shape = m.weight.shape if m.weight is not None else literals.get("normalized_shape")
    return {"normalized_shape": None if shape is None else tuple(int(s) for s in shape)}


def _group_norm(m: nn.GroupNorm, literals: Mapping[str, Any]) -> dict[str, Any]:
    return {"num_channels": m.weight.shape[0] if m.weight is not None else literals.get("channels")}


def _embedding(m: Any, _: Mapping[str, Any]) -> dict[str, Any]:
    return {"num_embeddings": m.weight.shape[0], "embedding_dim": m.weight.shape[1]}


def _prelu(m: nn.PReLU, _: Mapping[str, Any]) -> dict[str, Any]:
    return {"num_parameters": m.weight.shape[0]}


def _recurrent(m: nn.RNNBase, _: Mapping[str, Any]) -> dict[str, Any]:
    gates = {"LSTM": 4, "GRU": 3}.get(m.mode, 1)
    first: Any = m.weight_ih_l0
    projection: Any = getattr(m, "weight_hr_l0", None)
    return {
        "input_size": first.shape[1],
        "hidden_size": first.shape[0] // gates,
        "proj_size": 0 if projection is None else projection.shape[0],
    }


def _recurrent_cell(m: nn.RNNCellBase, _: Mapping[str, Any]) -> dict[str, Any]:
    return {"input_size": m.weight_ih.shape[1], "hidden_size": m.weight_hh.shape[1]}


_LAYERS: tuple[tuple[Any, Callable[[Any, Mapping[str, Any]], dict[str, Any]]], ...] = (
    (nn.Linear, _linear),
    (nn.Bilinear, _bilinear),
    (nn.modules.conv._ConvNd, _conv),
    (nn.modules.batchnorm._NormBase, _batch_norm),
    ((nn.LayerNorm, nn.RMSNorm), _shaped_norm),
    (nn.GroupNorm, _group_norm),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    (nn.PReLU, _prelu),
    (nn.RNNBase, _recurrent),
    (nn.RNNCellBase, _recurrent_cell),
)


# ---------------------------------------------------------------------- what the program says of its layers

_GROUPS_AT = {
    "conv1d": 6,
    "conv2d": 6,
    "conv3d": 6,
    "conv_transpose1d": 6,
    "conv_transpose2d": 6,
    "conv_transpose3d": 6,
}
_SHAPE_AT = {"layer_norm": 1, "rms_norm": 1}
_CHANNELS = ("batch_norm", "group_norm", "instance_norm")


def layer_literals(program: Program) -> dict[str, dict[str, Any]]:
    """Return, by module path, the ``groups``, ``normalized_shape`` or ``channels`` of the operator in its place."""
    out: dict[str, dict[str, Any]] = {}
    for node in program.nodes:
        if node.op != "call_function":
            continue
        paths = module_paths(node)
        schema = getattr(node.target, "_schema", None)
        if not paths or schema is None:
            continue
        op = re.sub(r"_$", "", schema.name.split("::")[1])
        values = out.setdefault(paths[-1], {})
        if op in _GROUPS_AT:
            values["groups"] = _argument(node, _GROUPS_AT[op], "groups", 1)
        elif op in _SHAPE_AT:
            values["normalized_shape"] = _argument(node, _SHAPE_AT[op], "normalized_shape", None)
        elif op in _CHANNELS:
            source = node.args[0]
            assert isinstance(source, Node)
            values["channels"] = int(source.meta["val"].shape[1])
    return {path: values for path, values in out.items() if values}


def _argument(node: Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)
