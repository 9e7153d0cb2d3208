"""Attributes of torch's own layers: they follow from the shapes of their tensors and from the program's operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.fx import Node

from ..graph.operators import arg, base_name, groups_of, is_convolution, layer_of, weight_of
from ..graph.program import Program
from .attributes import Value
from .sizes import module_paths

TRANSPOSED = "transposed"


def is_layer(module: nn.Module, literals: Mapping[str, Any]) -> bool:
    """Whether the attributes of ``module`` follow from its own tensors; ``literals`` are those of `layer_literals`."""
    kinds = tuple(kind for kinds, _ in _LAYERS for kind in _flat(kinds))
    return isinstance(module, kinds) or bool(literals.get(TRANSPOSED))


def layer_attributes(module: nn.Module, literals: Mapping[str, Any]) -> dict[str, Value]:
    """Return the attributes of a layer that follow from its tensors.

    Args:
        module: With its new tensors.
        literals: What `layer_literals` found for it.
    """
    for kind, derive in _LAYERS:
        if isinstance(module, kind):
            values = derive(module, literals)
            return {name: value for name, value in values.items() if value is not None}
    if literals.get(TRANSPOSED):
        weight: Any = module.weight
        inner, outer = weight.shape
        # As transformers' Conv1D calls them, and as torch does.
        return {"nx": inner, "nf": outer, "in_features": inner, "out_features": outer}
    return {}


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

_SHAPED = ("layer_norm", "rms_norm")
_CHANNELS = ("batch_norm", "group_norm", "instance_norm")


def layer_literals(program: Program) -> dict[str, dict[str, Any]]:
    """Return, by module path, what the operator in its place says.

    These are ``groups``, ``normalized_shape``, ``channels``, and `TRANSPOSED` for a linear layer whose weight is
    ``[in, out]``: the operator takes it as it is, on the right of a matrix product.
    """
    out: dict[str, dict[str, Any]] = {}
    for node in program.nodes:
        paths, op = module_paths(node), base_name(node)
        if not paths or not op:
            continue
        values = out.setdefault(paths[-1], {})
        if is_convolution(node):
            values["groups"] = groups_of(node)
        elif op in _SHAPED:
            values["normalized_shape"] = arg(node, 1, "normalized_shape")
        elif op in _CHANNELS:
            source = node.args[0]
            assert isinstance(source, Node)
            values["channels"] = int(source.meta["val"].shape[1])
        elif _is_weight_of(paths[-1], weight_of(node)) and _takes_in_first(node):
            values[TRANSPOSED] = True
    return {path: values for path, values in out.items() if values}


def _takes_in_first(node: Node) -> bool:
    """Whether the weight of a layer is that of a product, ``[in, out]``."""
    layer = layer_of(node)
    return layer is not None and layer.inputs == -2


def _is_weight_of(path: str, source: Any) -> bool:
    if not isinstance(source, Node) or source.op != "get_attr" or len(source.meta["val"].shape) != 2:
        return False
    return source.target == (f"{path}.weight" if path else "weight")
