"""Verify a program: structure, then every recorded shape and dtype, on fake tensors."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node, map_arg

from .errors import GraphwrightError, VerificationError, first_line
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
    _check_structure(gm)
    placeholders = gm.graph.find_nodes(op="placeholder")
    if len(placeholders) != len(program.inputs):
        raise VerificationError(f"the graph has {len(placeholders)} inputs, the program says {len(program.inputs)}")
    outputs = next(iter(reversed(gm.graph.nodes))).args[0]
    leaves = program.out_spec.num_leaves
    if not isinstance(outputs, (tuple, list)) or len(outputs) != leaves:
        raise VerificationError(f"the graph returns {outputs}, the program's output structure has {leaves} leaves")
    symbolic = any("unbacked_bindings" in node.meta for node in gm.graph.nodes)
    mode = fake_mode(gm) if symbolic else FakeTensorMode(allow_non_fake_inputs=True)
    examples = iter(program.example)
    replay = _Replay(gm, mode, symbolic)
    env = replay.env
    for node in gm.graph.find_nodes(op="get_attr"):
        env[node] = replay.attribute(node)
    with mode, torch.no_grad():
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                example = next(examples)
                value = node.meta.get("val") if symbolic else _fake(mode, example)
            elif node.op == "get_attr":
                value = env[node]
            elif node.op == "output":
                break
            else:
                value = replay.run(node)
            _compare(node, value)
            env[node] = value


def _check_structure(gm: GraphModule) -> None:
    """Check that every node is used after its definition and every attribute exists; the rest is torch's own lint."""
    defined: set[Node] = set()
    last = None
    for node in gm.graph.nodes:
        for source in node.all_input_nodes:
            if source not in defined:
                state = "of another graph" if source.graph is not gm.graph else "defined after it or erased"
                raise VerificationError(f"it uses %{source.name}, which is {state}", node)
        if node.op == "get_attr" and not _exists(gm, str(node.target)):
            raise VerificationError(f"there is no tensor or graph '{node.target}'", node)
        defined.add(node)
        last = node
    if last is None or last.op != "output":
        raise VerificationError("the graph does not end in an output", last)
    try:
        gm.graph.lint()
    except (RuntimeError, ValueError) as err:
        raise VerificationError(first_line(err)) from err


def _exists(gm: GraphModule, target: str) -> bool:
    try:
        operator.attrgetter(target)(gm)
    except AttributeError:
        return False
    return True


def fake_mode(gm: GraphModule) -> FakeTensorMode:
    """Return the fake tensor mode that the graph's recorded values belong to."""
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_tensor(mode: FakeTensorMode, like: Tensor, shape: Sequence[Any] | None = None) -> Tensor:
    """Return a fake tensor of the dtype and device of ``like``: with its strides, or contiguous of another ``shape``.

    Ten times as fast as an allocation under ``mode``, which dispatches. Call it outside of any mode.
    """
    if shape is None:
        meta = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")
    else:
        meta = torch.empty(shape, dtype=like.dtype, device="meta")
    return FakeTensor(mode, meta, like.device)


def _fake(mode: FakeTensorMode, value: Any) -> Any:
    return mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value


class _Replay:
    """Runs nodes on fake tensors; equal calls, of which a model of repeated blocks is full, run once.

    Two calls are equal when the operator, every literal and every operand's shape, strides, dtype and device are. Only
    operators that are functions of those are remembered: none that writes into an operand, and in a graph that
    changes a tensor's shape in place, or has sizes that depend on data, none at all.
    """

    def __init__(self, gm: GraphModule, mode: FakeTensorMode, symbolic: bool) -> None:
        self.gm = gm
        self.mode = mode
        self.env: dict[Node, Any] = {}
        self._remembers = not symbolic and not any(_changes_shape_in_place(node) for node in gm.graph.nodes)
        self._known: dict[Any, Any] = {}
        self._signatures: dict[int, Any] = {}

    def attribute(self, node: Node) -> Any:
        """Return a fake tensor for a parameter, buffer or constant."""
        tensor = get_tensor(self.gm, str(node.target))
        if tensor is None:
            # What is no tensor is a branch of `cond` or the body of an autocast region, which its operator calls.
            return operator.attrgetter(str(node.target))(self.gm)
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or not self._remembers:
            return _fake(self.mode, tensor)
        key = _tensor_signature(tensor)
        if key not in self._known:
            self._known[key] = fake_tensor(self.mode, tensor)
        return self._known[key]

    def run(self, node: Node) -> Any:
        """Return what a call gives, computed or remembered."""
        key = self._key(node)
        if key is None:
            return _run(self.gm, node, self.env)
        if key not in self._known:
            self._known[key] = _run(self.gm, node, self.env)
        return self._known[key]

    def _key(self, node: Node) -> Any:
        target = node.target
        if not self._remembers or not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
            return None
        key = (target, self._signature(node.args), self._signature(node.kwargs))
        try:
            hash(key)
        except TypeError:
            return None
        return key

    def _signature(self, value: Any) -> Any:
        if isinstance(value, Node):
            return self._signature_of(self.env[value])
        if isinstance(value, (tuple, list)):
            return tuple(map(self._signature, value))
        if isinstance(value, Mapping):
            return tuple((k, self._signature(v)) for k, v in value.items())
        # 1, 1.0 and True are equal and give results of different types.
        return type(value), value

    def _signature_of(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return self._signature(value)
        known = self._signatures.get(id(value))
        if known is None:
            known = self._signatures[id(value)] = _tensor_signature(value)
        return known


def _tensor_signature(tensor: Tensor) -> Any:
    return (Tensor, tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.is_conj(), tensor.is_neg())


def _changes_shape_in_place(node: Node) -> bool:
    if node.op != "call_function":
        return node.op == "call_method"
    return torch.Tag.inplace_view in getattr(node.target, "tags", ())


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
        raise VerificationError(f"{first_line(err)} (argument shapes {shapes})", node) from err


def _compare(node: Node, value: Any) -> None:
    recorded = node.meta.get("val")
    if recorded is None and isinstance(value, (Tensor, tuple, list)):
        raise VerificationError("the node has no meta['val']", node)
    pairs = (
        zip(value, () if recorded is None else recorded, strict=True)
        if isinstance(value, (tuple, list))
        else [(value, recorded)]
    )
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
