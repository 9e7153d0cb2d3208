"""Captures through torch.export and without it, compared node by node."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from graphwright.frontends.capture import capture
from graphwright.frontends.direct_trace import NotDirect
from graphwright.graph.program import Program, get_tensor

# Constants of the code are numbered, and nodes named, as they come; torch.export counts more than it keeps.
NUMBERED = "lifted_tensor_"


def exported(monkeypatch: pytest.MonkeyPatch, model: nn.Module, args: Any, kwargs: Any = None) -> Program:
    """Capture through torch.export."""

    def refuse(*_args: Any) -> Any:
        raise NotDirect("asked not to")

    with monkeypatch.context() as patch:
        patch.setattr("graphwright.frontends.direct_trace.direct_trace", refuse)
        return capture(model, args, kwargs, {})


def direct(monkeypatch: pytest.MonkeyPatch, model: nn.Module, args: Any, kwargs: Any = None) -> Program:
    """Capture without torch.export, which is not there."""

    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        raise AssertionError("torch.export was called")

    with monkeypatch.context() as patch:
        patch.setattr(torch.export, "export", refuse)
        return capture(model, args, kwargs, {})


def described(program: Program, origins: bool = True) -> list[Any]:
    """Return what is known of every node, with nodes and constants by their place."""
    place: dict[Any, Any] = {}
    rows: list[Any] = []
    for node in program.nodes:
        target = node.target if node.op == "call_function" else str(node.target)
        if node.op == "get_attr" and NUMBERED in str(node.target):
            tensor = get_tensor(program.graph_module, str(node.target))
            assert tensor is not None
            target = (tensor.dtype, tensor.tolist())
        place[node] = ("node", target) if node.op == "get_attr" else ("node", len(rows))
        arguments = torch.fx.map_arg((node.args, dict(sorted(node.kwargs.items()))), lambda n: place[n])
        values = pytree.tree_leaves(node.meta.get("val"))
        shapes = [(tuple(v.shape), v.dtype, v.stride(), v.device) if isinstance(v, Tensor) else v for v in values]
        origin = node.meta.get("stack_trace"), list((node.meta.get("nn_module_stack") or {}).items())
        row = node.op, target, arguments, shapes, origin if origins and node.op == "call_function" else None
        # Those of parameters stand where torch.export puts its inputs, which is before or after ours.
        if node.op != "get_attr":
            rows.append(row)
    state = {name: id(t) for name, t in program.graph_module.state_dict(keep_vars=True).items() if NUMBERED not in name}
    read = sorted(str(n.target) for n in program.nodes if n.op == "get_attr" and NUMBERED not in str(n.target))
    return [rows, state, read, program.out_spec]


def same(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, args: Any, kwargs: Any = None, origins: bool = True
) -> None:
    """Assert that both ways give one program."""
    quick = direct(monkeypatch, model, args, kwargs)
    assert described(quick, origins) == described(exported(monkeypatch, model, args, kwargs), origins)
    assert sum(node.op == "call_function" for node in quick.nodes) > 0
