"""Verify a program: structure, then every recorded shape and dtype, on fake tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node, map_arg

from .errors import GraphwrightError, VerificationError
from .program import Program, get_tensor


def verify(program: Program) -> None:
    """Check structure, then replay the graph on fake tensors and compare with every ``meta["val"]``.

    Nothing is computed on real data and no device is needed. Cost is linear in the number of nodes.

    Raises:
        VerificationError: The graph is malformed, a node has no ``val``, an operator does not accept the shapes
            it is given, or gives another shape or dtype than recorded. Names node, module and source line.
    """
    gm = program.graph_module
    try:
        gm.graph.lint()
    except (RuntimeError, ValueError) as err:
        raise VerificationError(str(err).splitlines()[0]) from err
    placeholders = sum(node.op == "placeholder" for node in gm.graph.nodes)
    if placeholders != len(program.inputs):
        raise VerificationError(f"the graph has {placeholders} inputs, the program says {len(program.inputs)}")
    replay(gm, check=True)


def replay(gm: GraphModule, check: bool) -> None:
    """Run the graph on fake tensors; compare with ``meta["val"]`` (``check``) or record it there."""
    mode = fake_mode(gm)
    env: dict[Node, Any] = {}
    with mode, torch.no_grad():
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                value = node.meta.get("val")
            elif node.op == "get_attr":
                value = _fake_attribute(gm, node, mode)
            elif node.op == "output":
                break
            else:
                value = _run(gm, node, env)
            if check and node.op in ("call_function", "get_attr"):
                _compare(node, value)
            elif not check and node.op != "placeholder":
                node.meta["val"] = value
            env[node] = value


def fake_mode(gm: GraphModule) -> FakeTensorMode:
    """Return the fake tensor mode that the graph's recorded values belong to."""
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def _fake_attribute(gm: GraphModule, node: Node, mode: FakeTensorMode) -> Any:
    tensor = get_tensor(gm, str(node.target))
    if tensor is None:
        return node.meta.get("val")
    recorded = node.meta.get("val")
    if isinstance(recorded, FakeTensor) and recorded.fake_mode is mode and _signature(recorded) == _signature(tensor):
        return recorded  # the same shape: nothing to make anew
    return mode.from_tensor(tensor, static_shapes=True)


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
        shapes = [list(n.meta["val"].shape) for n in node.all_input_nodes if isinstance(env.get(n), Tensor)]
        message = next(iter(str(err).splitlines()), type(err).__name__)
        raise VerificationError(f"{message} (argument shapes {shapes})", node) from err


def _signature(value: Tensor) -> tuple[tuple[str, ...], torch.dtype]:
    return tuple(map(str, value.shape)), value.dtype


def _compare(node: Node, value: Any) -> None:
    recorded = node.meta.get("val")
    if recorded is None and value is not None:
        raise VerificationError("the node has no meta['val']", node)
    pairs = zip(value, recorded, strict=True) if isinstance(value, (tuple, list)) else [(value, recorded)]
    for got, want in pairs:
        if isinstance(got, Tensor) and isinstance(want, Tensor) and not _same(got, want):
            raise VerificationError(
                f"meta['val'] says {list(want.shape)} {want.dtype}, the operator gives {list(got.shape)} {got.dtype}", node
            )


def _same(got: Tensor, want: Tensor) -> bool:
    if got.dtype is not want.dtype or got.dim() != want.dim():
        return False
    # Symbolic sizes are compared by equality only where both are plain; a data-dependent size is new each time.
    return all(a == b for a, b in zip(got.shape, want.shape, strict=True) if type(a) is int and type(b) is int)
