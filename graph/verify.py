"""Verify a program: structure, then every recorded shape and dtype, on fake tensors."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node, map_arg

from .errors import GraphwrightError, VerificationError
from .program import Program, get_tensor


def verify(program: Program) -> None:
    """Check structure, then replay the graph on fake tensors and compare with every ``meta["val"]``.

    Nothing is computed on real data and no device is needed. Dynamic dimensions take their example sizes, unless the
    graph has sizes that depend on data, which only a symbolic replay can follow. Linear in the number of nodes.

    Raises:
        VerificationError: The graph is malformed, a node has no ``val``, an operator does not accept the shapes
            it is given, or gives another shape or dtype than recorded. Names node, module and source line.
    """
    gm = program.graph_module
    try:
        gm.graph.lint()
    except (RuntimeError, ValueError) as err:
        raise VerificationError(str(err).splitlines()[0]) from err
    placeholders = gm.graph.find_nodes(op="placeholder")
    if len(placeholders) != len(program.inputs):
        raise VerificationError(f"the graph has {len(placeholders)} inputs, the program says {len(program.inputs)}")
    outputs = next(iter(reversed(gm.graph.nodes))).args[0]
    leaves = program.out_spec.num_leaves
    if not isinstance(outputs, (tuple, list)) or len(outputs) != leaves:
        raise VerificationError(f"the graph returns {outputs}, the program's output structure has {leaves} leaves")
    symbolic = any("unbacked_bindings" in node.meta for node in gm.graph.nodes)
    mode = fake_mode(gm) if symbolic else FakeTensorMode(allow_non_fake_inputs=True)
    env: dict[Node, Any] = {}
    examples = iter(program.example)
    with mode, torch.no_grad():
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                example = next(examples)
                value = node.meta.get("val") if symbolic else _fake(mode, example)
            elif node.op == "get_attr":
                value = _attribute(gm, node, mode)
            elif node.op == "output":
                break
            else:
                value = _run(gm, node, env)
            _compare(node, value)
            env[node] = value


def fake_mode(gm: GraphModule) -> FakeTensorMode:
    """Return the fake tensor mode that the graph's recorded values belong to."""
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def _fake(mode: FakeTensorMode, value: Any) -> Any:
    return mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value


def _attribute(gm: GraphModule, node: Node, mode: FakeTensorMode) -> Any:
    tensor = get_tensor(gm, str(node.target))
    # What is no tensor is a branch of `cond` or the body of an autocast region, which its operator calls.
    return operator.attrgetter(str(node.target))(gm) if tensor is None else _fake(mode, tensor)


def _run(gm: GraphModule, node: Node, env: dict[Node, Any]) -> Any:
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: env[n])
    try:
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return gm.get_submodule(str(node.target))(*args, **kwargs)
    except GraphwrightError:
        raise
    # A foreign operator may refuse its inputs with any exception; each is a finding about this graph.
    except Exception as err:
        shapes = [list(env[n].shape) for n in node.all_input_nodes if isinstance(env.get(n), Tensor)]
        message = next(iter(str(err).splitlines()), type(err).__name__)
        raise VerificationError(f"{message} (argument shapes {shapes})", node) from err


def _compare(node: Node, value: Any) -> None:
    recorded = node.meta.get("val")
    if recorded is None and isinstance(value, (Tensor, tuple, list)):
        raise VerificationError("the node has no meta['val']", node)
    pairs = zip(value, recorded, strict=True) if isinstance(value, (tuple, list)) else [(value, recorded)]
    for got, want in pairs:
        if isinstance(got, Tensor) and isinstance(want, Tensor) and not _same(got, want):
            raise VerificationError(
                f"meta['val'] says {list(map(str, want.shape))} {want.dtype}, "
                f"the operator gives {list(map(str, got.shape))} {got.dtype}",
                node,
            )


def _same(got: Tensor, want: Tensor) -> bool:
    if got.dtype is not want.dtype or got.dim() != want.dim():
        return False
    # A dynamic dimension has its example size in the replay and a symbol on record.
    return all(a == b for a, b in zip(got.shape, want.shape, strict=True) if type(a) is int and type(b) is int)
